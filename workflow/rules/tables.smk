rule tables:
    input:
        checkpoints=[file for method, bits in plan.rows() for file in plan.checkpoint(method, bits)],
        measured=plan.measured(),
    output:
        directory("<results>/tables"),
    log:
        "<results>/logs/tables.log",
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.mem_mb("tables"),
        runtime=plan.runtime("tables"),
    params:
        config=plan.settings_file,
        benchmarks=str(plan.output / "benchmarks" / "quantize"),  # what quantizing took; read where it is there
        checkpoints=lambda wildcards, input: [f"--checkpoint {file}" for file in input.checkpoints],
        settings=plan.digest("methods", "variants", "metrics", "backbone.unet", "backbone.context_tokens", "sampling.tile"),
        code=code_digest(
            "qvsr/stages/tables.py",
            "qvsr/report/tables.py",
            "qvsr/report/comparisons.py",
            "qvsr/report/fairness.py",
            "qvsr/report/paper.py",
            "qvsr/report/paper/*.csv",
            "qvsr/method_settings.py",
            "qvsr/results.py",
            "qvsr/statistics.py",
            "qvsr/quant/cost.py",
        ),
    shell:
        "python -m qvsr tables --config {params.config} --out {output} --benchmarks {params.benchmarks} {params.checkpoints}"
        " {input.measured} > {log} 2>&1"
