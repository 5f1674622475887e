"""A manifest as a Hugging Face dataset, a split each for clean, noisy, uncertain and unreadable.

python examples/huggingface_datasets.py noisyclean-out     (pip install datasets)
"""

import sys
from pathlib import Path

from datasets import load_dataset

out = Path(sys.argv[1] if len(sys.argv) > 1 else "noisyclean-out")

files = {}
for folder in sorted((out / "manifest").iterdir()):
    files[folder.name.removeprefix("split=")] = [str(path) for path in sorted(folder.rglob("*.parquet"))]

# 1. As tables that are mapped into memory.
pairs = load_dataset("parquet", data_files=files)
print({split: len(rows) for split, rows in pairs.items()})
if "clean" in pairs:
    best = pairs["clean"].sort("rank").select_columns(["shard", "key", "caption", "rank"])
    for row in best.select(range(min(5, len(best)))):
        print(row)

# 2. As a stream, for manifests that are larger than the disk's cache: nothing is copied.
if "uncertain" in files:
    doubtful = load_dataset("parquet", data_files=files, split="uncertain", streaming=True)
    for row in doubtful.filter(lambda row: row["match_probability"] > 0.5).take(5):
        print(f"{row['match_probability']:.2f} {row['shard']}/{row['key']}: {row['caption']}")
