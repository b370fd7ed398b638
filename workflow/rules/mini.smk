# Trains mgld-mini again. The main job reads the weights that are in the repository and never asks for these files.


rule mini_weights:
    output:
        "<results>/training/mgld-mini.safetensors",
        "<results>/training/mgld-mini-vae.safetensors",
    log:
        "<results>/logs/mini_weights.log",
    conda:
        "../../environment.yml"
    threads: workflow.cores or 1
    params:
        code=code_digest("qvsr/training/*.py", "qvsr/models/**/*.py", "qvsr/data/degrade.py"),
    shell:
        "python -m qvsr train --threads {threads} --out {output} > {log} 2>&1"
