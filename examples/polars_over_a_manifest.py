"""A manifest as a lazy polars frame, and one list of keys for each shard out of it.

python examples/polars_over_a_manifest.py noisyclean-out keys/     (pip install polars)
"""

import sys
from pathlib import Path

import polars as pl

out = sys.argv[1] if len(sys.argv) > 1 else "noisyclean-out"
keys = Path(sys.argv[2] if len(sys.argv) > 2 else "keys")

pairs = pl.scan_parquet(f"{out}/manifest/**/*.parquet", hive_partitioning=True)

print("How sure was the model of what it called clean, uncertain and noisy?")
print(
    pairs.filter(pl.col("split") != "unreadable")
    .group_by("split")
    .agg(pl.len().alias("pairs"), pl.col("match_probability", "similarity").mean())
    .sort("match_probability", descending=True)
    .collect()
)

print("Captions that are there more than once, and how many of them match:")
print(
    pairs.filter(pl.col("split") != "unreadable")
    .group_by("caption")
    .agg(pl.len().alias("pairs"), (pl.col("split") == "clean").mean().alias("clean"))
    .filter(pl.col("pairs") > 1)
    .sort("pairs", "caption", descending=[True, False])
    .head(10)
    .collect()
)

clean = pairs.filter(pl.col("split") == "clean").select("shard", "index", "key").sort("shard", "index").collect()
for (shard,), rows in clean.group_by("shard", maintain_order=True):
    path = keys / f"{shard}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows["key"]) + "\n", encoding="utf-8")
print(f"The keys of {len(clean)} clean pairs are in {keys}/, a file a shard")
