#!/bin/sh
# `make test-slurm`: starts a Slurm cluster of one node, runs the workflow's tests through it, ends it. The daemons' keys, state and logs are in
# a temporary folder; Snakemake's executor is in another, so that the default environment stays as it is. Both are removed.
# Debian's packages slurm-wlm and munge are installed where they are missing, and stay.
set -eu
python="${1:-python}"
case "$python" in */*) python="$(cd "$(dirname "$python")" && pwd)/$(basename "$python")" ;; esac
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps daemons

if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
    if ! command -v apt-get >/dev/null; then
        echo "error: slurmctld, slurmd and munged are needed and there is no apt-get here: install Slurm and MUNGE by hand" >&2
        exit 1
    fi
    if [ "$(id -u)" = 0 ]; then
        as_root=""
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        as_root="sudo"
    else
        echo "error: the packages slurm-wlm and munge are missing and only root can install them: run 'apt-get install slurm-wlm munge' as root" >&2
        exit 1
    fi
    $as_root apt-get update -q
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge
fi

plugins="$(mktemp -d)"
trap 'rm -rf "$plugins"' EXIT
trap 'exit 1' HUP INT TERM
# what these two need beside themselves is in requirements.lock
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$plugins" --requirement workflow/profiles/slurm/requirements.txt
QVSR_SLURM_PLUGINS="$plugins" "$python" -m pytest -q -n 0 tests/workflow/test_slurm.py
