#!/bin/sh
# Everything of CUDA on one GPU in under 8 minutes: sh scripts/gpu_check.sh FOLDER
# Builds the kernels for this GPU, runs the tests that need it, NVIDIA's compute-sanitizer where it is found, and the benchmark; writes
# gpu_check.json and gpu_check.md to FOLDER. Needs a Python (PYTHON=...) with torch, numpy, safetensors and pytest, and nvcc.
# Without a GPU the kernels are built for every architecture, one line says that there is none, and the exit code is 1.
set -eu
folder="${1:?a folder for the results is needed: sh scripts/gpu_check.sh FOLDER}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/gpu_check.py "$folder"
