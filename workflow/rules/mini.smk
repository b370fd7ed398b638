# Trains the small backbone again, into a folder of its own: the main job reads the weights that are in the repository and never
# asks for these files. Photographs, states and curves are kept in `state`, from which a killed training goes on.


rule mini_weights:
    output:
        weights="<results>/training/mgld-mini.safetensors",
        vae="<results>/training/mgld-mini-vae.safetensors",
    log:
        "<results>/logs/mini_weights.log",
    conda:
        "../../environment.yml"
    threads: lambda wildcards: workflow.cores  # asked for when the rule runs: a run that hands all jobs to a cluster has no number of its own
    params:
        config=plan.settings_file,
        state=str(plan.output / "training" / "state"),
        settings=plan.digest("training", "backbone"),
        code=code_digest(
            "qvsr/stages/train.py",
            "qvsr/training/*.py",
            "qvsr/models/**/*.py",
            "qvsr/data/degrade.py",
            "qvsr/data/motion.py",
        ),
    shell:
        "python -m qvsr train --config {params.config} --weights {output.weights} --vae-weights {output.vae}"
        " --state {params.state} > {log} 2>&1"
