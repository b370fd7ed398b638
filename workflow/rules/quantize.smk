rule quantize:
    input:
        weights=plan.weights(),
        calibration="<results>/calibration",
    output:
        "<results>/quantized/{method}-{bits}.safetensors",
    log:
        "<results>/logs/quantize/{method}-{bits}.log",
    benchmark:
        "<results>/benchmarks/quantize/{method}-{bits}.tsv"
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.mem_mb("quantize"),
        runtime=plan.runtime("quantize"),
        gpu=plan.gpu("quantize"),
    params:
        config=plan.settings_file,
        settings=lambda wildcards: plan.method_digest(wildcards.method),
        code=code_digest(
            "qvsr/stages/quantize.py",
            "qvsr/quant/**/*.py",
            "!qvsr/quant/cost.py",
            "qvsr/quantvsr.py",
            "qvsr/kernels/**/*.py",
            "qvsr/kernels/csrc/cpu/*",
            "qvsr/data/calibration.py",
            "qvsr/devices.py",
            "qvsr/models/**/*.py",
            "baselines/*.py",
        ),
    shell:
        "python -m qvsr quantize --config {params.config} --method {wildcards.method} --bits {wildcards.bits}"
        " --calibration {input.calibration} --out {output} > {log} 2>&1"
