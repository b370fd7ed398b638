rule ablation:
    input:
        checkpoints=[file for method, bits in plan.ablated() for file in plan.checkpoint(method, bits)],
        measured=plan.measured(plan.ablated()),
    output:
        directory("<results>/ablation"),
    log:
        "<results>/logs/ablation.log",
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.mem_mb("ablation"),
        runtime=plan.runtime("ablation"),
    params:
        config=plan.settings_file,
        checkpoints=lambda wildcards, input: [f"--checkpoint {file}" for file in input.checkpoints],
        settings=plan.digest("ablation", "method", "variants", "metrics", "backbone.unet", "backbone.context_tokens", "sampling.tile"),
        code=code_digest(
            "qvsr/stages/ablation.py",
            "qvsr/stages/tables.py",
            "qvsr/report/ablation.py",
            "qvsr/report/fairness.py",
            "qvsr/report/tables.py",
            "qvsr/results.py",
            "qvsr/statistics.py",
            "qvsr/quant/cost.py",
        ),
    shell:
        "python -m qvsr ablation --config {params.config} --out {output} {params.checkpoints} {input.measured} > {log} 2>&1"
