# One job a row and noise seed: to start costs more than to measure a clip.


rule measure:
    input:
        pred=lambda wildcards: plan.row_frames(wildcards.dataset, wildcards.method, wildcards.bits, wildcards.seed),
        gt=lambda wildcards: plan.row_frames(wildcards.dataset, "ground_truth"),
        fp=lambda wildcards: plan.row_frames(wildcards.dataset, "full_precision", suffix=wildcards.seed),
    output:
        "<results>/measured/{dataset}/{method}-{bits}{seed}.jsonl",
    log:
        "<results>/logs/measure/{dataset}/{method}-{bits}{seed}.log",
    wildcard_constraints:
        bits=r"W\d+A\d+",
        seed=r"(-seed\d+)?",
    conda:
        "../../environment.yml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.mem_mb("measure"),
        runtime=plan.runtime("measure"),
    params:
        config=plan.settings_file,
        clips=lambda wildcards: [f"--clip {clip}" for clip in plan.clips(wildcards.dataset)],
        pred=lambda wildcards: plan.row_folder(wildcards.dataset, wildcards.method, wildcards.bits, wildcards.seed),
        gt=lambda wildcards: plan.row_folder(wildcards.dataset, "ground_truth", "W32A32"),
        fp=lambda wildcards: plan.row_folder(wildcards.dataset, "full_precision", "W32A32", wildcards.seed),
        execution=lambda wildcards: plan.execution(wildcards.method),
        seed=lambda wildcards: plan.noise_seed(wildcards.seed),
        weights=plan.assets_here(),  # named, so that one that arrives makes stale what says n/a
        cache=str(plan.output / "cache" / "metrics"),  # values by content, no output of a rule; it may be deleted at any time
        settings=plan.digest("metrics", "protocol", "require_all", "vsreval", "threads", "backbone.name"),
        code=code_digest(
            "qvsr/stages/measure.py",
            "qvsr/measuring.py",
            "qvsr/data/assets.py",
            "qvsr/data/clips.py",
            "qvsr/models/flow.py",
            "qvsr/results.py",
            "qvsr/protocols.py",
            "config/protocols/*.yaml",
            "config/assets.yaml",
            "metrics/*.py",
        ),
    shell:
        "python -m qvsr measure --config {params.config} --set seed={params.seed} --pred {params.pred} --gt {params.gt} --fp {params.fp} {params.clips}"
        " --dataset {wildcards.dataset} --method {wildcards.method} --bits {wildcards.bits}"
        " {params.execution} --cache {params.cache} --out {output} > {log} 2>&1"
