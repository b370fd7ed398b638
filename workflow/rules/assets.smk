# The files of weights that the metrics of the configuration read: `snakemake weights` fetches those that are not here. No other rule asks
# for them: a metric without its weights has no value, and its column says which file it lacks.


rule weights:
    input:
        plan.assets(),


rule asset:
    output:
        plan.asset_path("{file}"),
    log:
        "<results>/logs/assets/{file}.log",
    wildcard_constraints:
        file=r"[^/]+",
    conda:
        "../../environment.yml"
    shell:
        "python -m qvsr assets fetch {wildcards.file} > {log} 2>&1"
