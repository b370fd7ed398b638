# The settings of this run, defaults and overrides resolved: the one file that every stage reads. The stages take it as
# `ancient` and name the digest of the settings that they read, so that a change makes only those stages stale.


rule settings:
    output:
        "<results>/config.json",
    log:
        "<results>/logs/settings.log",
    conda:
        "../../environment.yml"
    params:
        settings=planning.to_json(plan.config),
    shell:
        "python -m qvsr config write --settings {params.settings:q} --out {output} > {log} 2>&1"
