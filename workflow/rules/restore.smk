rule restore:
    input:
        weights=plan.weights(),
        checkpoint=lambda wildcards: plan.checkpoint(wildcards.method, wildcards.bits),
        lq="<results>/clips/{dataset}/LQ/{clip}",
    output:
        directory("<results>/restored/{dataset}/{method}-{bits}/{clip}"),
    log:
        "<results>/logs/restore/{dataset}/{method}-{bits}/{clip}.log",
    wildcard_constraints:
        method=plan.restored_here(),
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=1300,
    params:
        config=plan.settings_file,
        settings=plan.digest("backbone", "sampling", "seed", "threads"),
        code=code_digest(
            "qvsr/stages/restore.py",
            "qvsr/data/clips.py",
            "qvsr/models/**/*.py",
            "qvsr/quant/**/*.py",
            "!qvsr/quant/cost.py",
            "qvsr/kernels/**/*.py",
        ),
    shell:
        "python -m qvsr restore --config {params.config} --method {wildcards.method} --bits {wildcards.bits}"
        " --checkpoint '{input.checkpoint}' --lq {input.lq} --out {output} > {log} 2>&1"
