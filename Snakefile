from snakemake.utils import min_version

min_version("9.14")

from qvsr import plan as planning
from qvsr.provenance import code_digest

planning.environment()
plan = planning.Plan.from_snakemake(config, workflow.configfiles)
planning.export(plan.config)
if workflow.remote_exec:
    plan.settings_here()


pathvars:
    results=str(plan.output),


onstart:
    plan.write_settings()  # what every stage reads; each rule names the digest of its part, so that only that part makes it stale
    plan.print_remarks()


include: "workflow/rules/datasets.smk"
include: "workflow/rules/clips.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/restore.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/ablation.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/layers.smk"
include: "workflow/rules/mini.smk"
include: "workflow/rules/bench.smk"
include: "workflow/rules/assets.smk"
include: "workflow/rules/convert.smk"


for rules_of_the_user in plan.rules():

    include: rules_of_the_user


rule all:
    default_target: True
    input:
        "<results>/tables",
        "<results>/figures",
