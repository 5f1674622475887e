"""The main job from Python: fit, score, tighten the split, list the keys to keep.

python examples/clean_with_the_api.py shards/
"""

import sys

import noisyclean as nc

shards = sys.argv[1] if len(sys.argv) > 1 else "shards/"
overrides = sys.argv[2:]  # recipe keys, such as optimiser.epochs=3

nc.fit(shards, out="api-run", overrides=overrides)
summary = nc.score(shards, model="api-run", out="api-out")
low, high = summary.noise_interval
print(f"{summary.estimated_noise:.1%} of the pairs are mismatched (95 % interval {low:.1%} to {high:.1%})")

summary = nc.split("api-out", fdr=0.01)
clean = nc.Manifest("api-out").pairs("clean")
print(f"{len(clean)} pairs with at most 1 % mismatches expected")
clean[["shard", "key"]].to_csv("keep.csv", index=False)
