# Files from elsewhere (config/assets.yaml). `snakemake weights` fetches those that the metrics of the configuration read and that are not
# here. No other rule asks for these: a metric without its weights has no value, and its column says which file it lacks. A rule that needs a
# checkpoint or the folder of a data set names plan.asset_path(...) as its input, and it is fetched.
from qvsr.data import assets as listed


localrules:  # run where snakemake does: a cluster's nodes may have no network
    asset,
    asset_folder,


rule weights:
    input:
        plan.assets(),


rule asset:
    output:
        plan.asset_path("{file}"),
    log:
        "<results>/logs/assets/{file}.log",
    wildcard_constraints:
        file=listed.names(unpacked=False),
    conda:
        "../../environment.yml"
    shell:
        "python -m qvsr assets fetch {wildcards.file} > {log} 2>&1"


rule asset_folder:
    output:
        directory(plan.asset_path("{folder}")),
    log:
        "<results>/logs/assets/{folder}.log",
    wildcard_constraints:
        folder=listed.names(unpacked=True),
    conda:
        "../../environment.yml"
    shell:
        "python -m qvsr assets fetch {wildcards.folder} > {log} 2>&1"
