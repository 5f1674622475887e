#!/bin/sh
# The tables of docs/performance.md on a GPU: sh benchmarks/gpu.sh [FOLDER [SHARDS MODEL]]
#
# Needs CUDA and `pip install '.[bench]'`; no network. On a machine with 16 cores it makes 3 GB of pictures in $TMPDIR.
# FOLDER gets the figures of each model as JSON, the rates by either way to decode over a longer run, and how far the ways
# agree: on SHARDS of JPEGs, as MODEL scores them; where they are not named, on drawn pictures of 480 px, as an encoder
# fitted to others like them does.
set -eu
out=${1:-bench-gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
for model in ViT-B-32 ViT-S-16; do
    for decode in fast gpu; do
        noisyclean bench throughput -m "$model" --device cuda --decode "$decode" --json >"$out/$model-$decode.json"
        echo "$out/$model-$decode.json"
    done
done
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
python -c "
import noisyclean as nc
nc.generate_corpus('$made/many', pairs=20000, image_size=480, pairs_per_shard=128)
"
python benchmarks/decoding.py scoring "$made/many" -m ViT-B-32 --device cuda --times 3 | tee "$out/scoring.md"
if [ $# -lt 3 ]; then
    python -c "
import noisyclean as nc
for seed in (0, 1):
    nc.generate_corpus('$made/%d' % seed, pairs=5000, seed=seed, image_size=480)
"
    noisyclean fit "$made/0" -o "$made/run" -r demo --device cuda
    set -- "$out" "$made/1" "$made/run/fold-0/encoder"
fi
python benchmarks/decoding.py fidelity "$2" -m "$3" --device cuda | tee "$out/fidelity.md"
