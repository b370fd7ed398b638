# What quantization did to each layer, on request: `snakemake --cores 2 results/layers/maxmin-W4A4.csv`.


rule layers:
    input:
        weights=plan.weights(),
        checkpoint="<results>/quantized/{method}-{bits}.safetensors",
        calibration="<results>/calibration",
    output:
        table="<results>/layers/{method}-{bits}.csv",
        figure="<results>/layers/{method}-{bits}.png",
    log:
        "<results>/logs/layers/{method}-{bits}.log",
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.mem_mb("layers"),
        runtime=plan.runtime("layers"),
    params:
        config=plan.settings_file,
        settings=plan.digest("backbone", "sampling.tile", "threads"),
        code=code_digest(
            "qvsr/stages/layers.py",
            "qvsr/report/layers.py",
            "qvsr/report/figures.py",
            "qvsr/report/tables.py",
            "qvsr/results.py",
            "qvsr/statistics.py",
            "qvsr/quantvsr.py",
            "qvsr/quant/**/*.py",
            "qvsr/kernels/**/*.py",
            "qvsr/kernels/csrc/cpu/*",
            "qvsr/data/calibration.py",
            "qvsr/models/**/*.py",
        ),
    shell:
        "python -m qvsr layers --config {params.config} --checkpoint {input.checkpoint} --calibration {input.calibration}"
        " --out {output.table} > {log} 2>&1"
