# Measured speed and memory, on request: `make bench`. Each measurement takes all cores, so that no other job of the run disturbs it; `unet` needs about 11 GB.


rule bench:
    output:
        rows="<results>/speed/{kind}.json",
        head="<results>/speed/{kind}.head.json",
    log:
        "<results>/logs/bench/{kind}.log",
    wildcard_constraints:
        kind="layers|unet|clip",
    conda:
        "../../environment.yml"
    threads: lambda wildcards: workflow.cores  # asked for when the rule runs, as in mini.smk
    params:
        code=code_digest(
            "qvsr/stages/bench.py",
            "qvsr/speed/*.py",
            "qvsr/quant/**/*.py",
            "qvsr/kernels/**/*.py",
            "qvsr/kernels/csrc/cpu/*",
            "qvsr/models/**/*.py",
        ),
    shell:
        "python -m qvsr bench {wildcards.kind} --threads {threads} --out {output.rows} > {log} 2>&1"


rule speed:
    input:
        expand("<results>/speed/{kind}.json", kind=("layers", "unet", "clip")),
        expand("<results>/speed/{kind}.head.json", kind=("layers", "unet", "clip")),
    output:
        directory("<results>/speed/tables"),
    log:
        "<results>/logs/speed.log",
    conda:
        "../../environment.yml"
    params:
        files=lambda wildcards, input: input[:3],
        code=code_digest("qvsr/stages/bench.py", "qvsr/report/speed.py", "qvsr/report/tables.py", "qvsr/speed/timing.py"),
    shell:
        "python -m qvsr speed --out {output} {params.files} > {log} 2>&1"
