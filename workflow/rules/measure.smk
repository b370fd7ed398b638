rule measure:
    input:
        pred=lambda wildcards: plan.frames(wildcards.dataset, wildcards.clip, wildcards.method, wildcards.bits),
        gt="<results>/clips/{dataset}/GT/{clip}",
        fp="<results>/restored/{dataset}/full_precision-W32A32/{clip}",
    output:
        "<results>/measured/{dataset}/{method}-{bits}/{clip}.jsonl",
    log:
        "<results>/logs/measure/{dataset}/{method}-{bits}/{clip}.log",
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=1100,
    params:
        config=plan.settings_file,
        execution=lambda wildcards: plan.execution(wildcards.method),
        settings=plan.digest("metrics", "protocol", "seed", "threads", "backbone.name"),
        code=code_digest(
            "qvsr/stages/measure.py",
            "qvsr/data/clips.py",
            "qvsr/results.py",
            "qvsr/protocols.py",
            "config/protocols/*.yaml",
            "metrics/*.py",
        ),
    shell:
        "python -m qvsr measure --config {params.config} --pred {input.pred} --gt {input.gt} --fp {input.fp}"
        " --dataset {wildcards.dataset} --method {wildcards.method} --bits {wildcards.bits}"
        " --execution {params.execution} --out {output} > {log} 2>&1"
