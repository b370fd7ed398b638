rule calibrate:
    input:
        weights=plan.weights(),
        lq=lambda wildcards: plan.calibration_clips(),
    output:
        directory("<results>/calibration"),
    log:
        "<results>/logs/calibrate.log",
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.mem_mb("calibrate"),
        runtime=plan.runtime("calibrate"),
        gpu=plan.gpu("calibrate"),
    params:
        config=plan.settings_file,
        settings=plan.digest("backbone", "sampling", "calibration", "seed", "threads", "device"),
        code=code_digest(
            "qvsr/stages/calibrate.py",
            "qvsr/data/clips.py",
            "qvsr/data/calibration.py",
            "qvsr/devices.py",
            "qvsr/models/**/*.py",
            "qvsr/kernels/graphs.py",
        ),
    shell:
        "python -m qvsr calibrate --config {params.config} --out {output} {input.lq} > {log} 2>&1"
