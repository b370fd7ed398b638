rule clips:
    input:
        lambda wildcards: plan.sources(wildcards.dataset, wildcards.clip),
    output:
        gt=directory("<results>/clips/{dataset}/GT/{clip}"),
        lq=directory("<results>/clips/{dataset}/LQ/{clip}"),
    log:
        "<results>/logs/clips/{dataset}/{clip}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=plan.mem_mb("clips"),
        runtime=plan.runtime("clips"),
    params:
        config=plan.settings_file,
        settings=lambda wildcards: plan.clip_digest(wildcards.dataset, wildcards.clip),
        code=code_digest(
            "qvsr/stages/clips.py",
            "qvsr/data/clips.py",
            "qvsr/data/datasets.py",
            "qvsr/data/degrade.py",
            "qvsr/data/motion.py",
            "qvsr/data/published.py",
        ),
    shell:
        "python -m qvsr clips --config {params.config} --dataset {wildcards.dataset} --clip {wildcards.clip}"
        " --gt {output.gt} --lq {output.lq} > {log} 2>&1"
