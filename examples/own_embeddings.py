"""Score pairs that you have embedded yourself: no pictures and no model, only two arrays.

python examples/own_embeddings.py pairs.npz      # img and txt, float [pairs, width]; row i of both is a pair

A pairs.parquet beside it may describe the rows: key, uid, url, caption. With captions, pairs that share one are no
rivals of each other.
"""

import sys

import numpy as np

import noisyclean as nc

path = sys.argv[1] if len(sys.argv) > 1 else "pairs.npz"

# The temperature is that of the model that made them: 1 / exp(logit_scale), 0.01 for CLIP.
summary = nc.score(embeddings=path, temperature=0.01, out="embedded-out")
low, high = summary.noise_interval
print(f"{summary.pairs} pairs, {summary.estimated_noise:.1%} of them mismatched ({low:.1%} to {high:.1%})")

# `shard` is the file and `index` the row in it.
clean = nc.Manifest("embedded-out").pairs("clean", columns=["shard", "index"])
rows = np.sort(clean["index"].to_numpy())
np.save("keep.npy", rows)
print(f"{len(rows)} rows to keep: keep.npy")
