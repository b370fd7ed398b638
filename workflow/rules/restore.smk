rule restore:
    input:
        weights=plan.weights(),
        checkpoint=lambda wildcards: plan.checkpoint(wildcards.method, wildcards.bits),
        lq="<results>/clips/{dataset}/LQ/{clip}",
    output:
        directory("<results>/restored/{dataset}/{method}-{bits}{seed}/{clip}"),
    log:
        "<results>/logs/restore/{dataset}/{method}-{bits}{seed}/{clip}.log",
    wildcard_constraints:
        method=plan.restored_here(),
        bits=r"W\d+A\d+",
        seed=r"(-seed\d+)?",
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.mem_mb("restore"),
        runtime=plan.runtime("restore"),
        gpu=plan.gpu("restore"),
    params:
        config=plan.settings_file,
        seed=lambda wildcards: plan.noise_seed(wildcards.seed),
        settings=plan.digest("backbone", "sampling", "threads", "device", "execution"),
        code=code_digest(
            "qvsr/stages/restore.py",
            "qvsr/data/clips.py",
            "qvsr/devices.py",
            "qvsr/models/**/*.py",
            "qvsr/quant/**/*.py",
            "!qvsr/quant/cost.py",
            "qvsr/kernels/**/*.py",
            "qvsr/kernels/csrc/cpu/*",
        ),
    shell:
        "python -m qvsr restore --config {params.config} --method {wildcards.method} --bits {wildcards.bits}"
        " --checkpoint '{input.checkpoint}' --seed {params.seed} --lq {input.lq} --out {output} > {log} 2>&1"
