rule figures:
    input:
        measured=plan.measured(),
        frames=lambda wildcards: plan.picture_frames(),
    output:
        directory("<results>/figures"),
    log:
        "<results>/logs/figures.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=plan.mem_mb("figures"),
        runtime=plan.runtime("figures"),
    params:
        config=plan.settings_file,
        settings=plan.digest("methods", "metrics", "bits", "picture"),
        code=code_digest(
            "qvsr/stages/figures.py",
            "qvsr/report/figures.py",
            "qvsr/report/tables.py",
            "qvsr/results.py",
            "qvsr/statistics.py",
            "qvsr/data/clips.py",
        ),
    shell:
        "python -m qvsr figures --config {params.config} --out {output} {input.measured} > {log} 2>&1"
