# Builds the paper's data sets from the archives that their settings name. A set that is there whole is taken as it is, and its archives may be
# deleted. Names of clips are in the archives: a run lists the clips of a set once it is built.

plan.wait_for = lambda dataset: checkpoints.dataset.get(dataset=dataset, asked=plan.asked(dataset))


rule datasets:
    input:
        [plan.built(dataset) for dataset in plan.used() if plan.unbuilt(dataset)],


checkpoint dataset:
    input:
        lambda wildcards: plan.archives(wildcards.dataset),
    output:
        touch("<results>/datasets/{dataset}-{asked}"),
    log:
        "<results>/logs/datasets/{dataset}-{asked}.log",
    wildcard_constraints:
        dataset="[^/]+",
        asked="[0-9a-f]{16}",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=plan.mem_mb("dataset"),
        runtime=plan.runtime("dataset"),
    params:
        config=plan.settings_file,
        sources=lambda wildcards, input: [f"{option} {folder}" for option, folder in zip(("--from", "--lq-from"), input)],
    shell:
        "python -m qvsr dataset build {wildcards.dataset} --config {params.config} {params.sources} > {log} 2>&1"
