# Makes the backbone's weights from the official checkpoints, once; only where `official` names them, since the default run has its own.
if plan.official():

    rule convert:
        input:
            **plan.official(),
        output:
            weights=str(plan.config.backbone.weights),
            vae_weights=str(plan.config.backbone.vae_weights),
        log:
            "<results>/logs/convert.log",
        conda:
            "../../environment.yml"
        threads: plan.config.threads
        resources:
            mem_mb=plan.mem_mb("convert"),
            runtime=plan.runtime("convert"),
        params:
            config=plan.settings_file,
            settings=plan.digest("backbone", "official"),
            code=code_digest(
                "qvsr/stages/convert.py",
                "qvsr/models/convert.py",
                "qvsr/models/text.py",
                "qvsr/models/checkpoints.py",
                "qvsr/models/layers.py",
                "qvsr/models/unet.py",
                "qvsr/models/structure.py",
                "qvsr/models/autoencoder.py",
            ),
        shell:
            "python -m qvsr convert --config {params.config} > {log} 2>&1"
