#!/bin/sh
# The tables of docs/performance.md on a GPU: sh benchmarks/gpu.sh [FOLDER]
#
# Needs CUDA and `pip install '.[bench]'`; no network. On a machine with 16 cores it makes 2 GB of pictures in $TMPDIR.
# FOLDER gets the figures of each model as JSON.
set -eu
out=${1:-bench-gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
for model in ViT-B-32 ViT-S-16; do
    noisyclean bench throughput -m "$model" --device cuda --json >"$out/$model.json"
    echo "$out/$model.json"
done
