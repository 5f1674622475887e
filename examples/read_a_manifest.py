"""Read what `noisyclean score` wrote: with noisyclean itself, with pandas and with DuckDB.

python examples/read_a_manifest.py noisyclean-out
"""

import sys
from pathlib import Path

import pandas as pd

import noisyclean as nc

out = Path(sys.argv[1] if len(sys.argv) > 1 else "noisyclean-out")

# 1. noisyclean: the summary and the rows of one split.
manifest = nc.Manifest(out)
print(f"{manifest.summary.pairs} pairs, {manifest.summary.estimated_noise:.1%} of them mismatched")
print(manifest.pairs("noisy", columns=["key", "caption", "match_probability"]).head())

# 2. pandas: the folder is one table, and `split` one of its columns.
rows = pd.read_parquet(out / "manifest")
print(rows["split"].value_counts())
print(rows.sort_values("rank")[["shard", "key", "caption", "match_score"]].head())

# 3. DuckDB: the worst shards, without loading the table.
try:
    import duckdb
except ImportError:
    sys.exit()
print(
    duckdb.sql(f"""
        select shard, avg((split = 'noisy')::int) as noisy, count(*) as pairs
        from read_parquet('{out}/manifest/**/*.parquet', hive_partitioning = true)
        group by shard order by noisy desc limit 5
    """)
)
