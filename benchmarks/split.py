"""How long `noisyclean split` takes, and how much memory, over made-up scores of any number of pairs.

    python benchmarks/split.py 1e6 12.8e6

For each size: scores of 10,000-pair shards are made in a temporary folder (90 MB a million), and split in a process of
its own, several times. Printed are the median time, the peak memory of that process, and the rows lost, if any.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from noisyclean.files import write_json
from noisyclean.manifest.nulls import NEAR_MISS, RANDOM, write_nulls
from noisyclean.manifest.parts import PartInfo, write_part
from noisyclean.manifest.schema import MEASURED, PART_SCHEMA
from noisyclean.manifest.splitting import OUT_FILE

SHARD_PAIRS = 10_000
NULL = 131_072
NOISE = 0.4
WORDS = ["a", "red", "blue", "photo", "of", "the", "dog", "cat", "house", "in", "snow", "people", "night", "new"]

SPLIT = """
import json, resource, sys, time
from noisyclean.manifest.splitting import split
started = time.perf_counter()
summary = split(sys.argv[1])
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": seconds, "peak_gib": peak, "rows": summary.pairs}))
"""


def make_scores(out: Path, pairs: int) -> None:
    """An OUT folder as ``score`` leaves it: 40 % mismatches, and half of the true pairs above the whole null."""
    random = np.random.default_rng(0)
    shards = [f"{number:08d}" for number in range(pairs // SHARD_PAIRS)]
    for shard in shards:
        write_part(out, shard, _part(shard, random), PartInfo("scorer", "source"))
    uniform = np.arange(1, 1001) / 1000
    nulls = {
        "fold": np.zeros(2000),
        "kind": np.repeat([RANDOM, NEAR_MISS], 1000),
        **{name: np.tile(uniform, 2) for name in ("similarity", "match_score", "p_value")},
    }
    write_nulls(out, pa.table(nulls))
    write_json(out / OUT_FILE, {"shards": shards, "null_pairs": 8192, "scorer": "scorer", "model": "made up"})


def _part(shard: str, random: np.random.Generator) -> pa.Table:
    n = SHARD_PAIRS
    matched = random.random(n) >= NOISE
    p = random.integers(1, NULL + 2, n) / (NULL + 1)
    p[matched & (random.random(n) < 0.5)] = 1 / (NULL + 1)
    uids = random.integers(0, 2**63, (n, 2))
    words = np.array(WORDS)[random.integers(0, len(WORDS), (n, 9))]
    columns = {
        "key": [f"{shard}{i:04d}" for i in range(n)],
        "shard": [shard] * n,
        "index": range(n),
        "uid": [f"{high:016x}{low:016x}" for high, low in uids],
        "url": [f"https://example.org/{high:x}.jpg" for high in uids[:, 0]],
        "caption": [" ".join(caption) for caption in words],
        "width": random.integers(200, 900, n),
        "height": random.integers(200, 900, n),
        "fold": np.zeros(n),
        "in_sample": np.zeros(n, np.bool_),
        **{name: random.normal(size=n) for name in MEASURED},
        "match_score": random.normal(size=n) + 8 * matched,
        "similarity": random.random(n) + matched,
        "p_value": p,
        "near_miss_p_value": random.random(n),
    }
    nothing = [None] * n
    arrays = [pa.array(columns.get(one.name, nothing)).cast(one.type, safe=False) for one in PART_SCHEMA]
    return pa.table(arrays, schema=PART_SCHEMA)


def measure(out: Path, times: int) -> Iterator[dict[str, float]]:
    """Split ``times`` times."""
    for _ in range(times):
        done = subprocess.run([sys.executable, "-c", SPLIT, str(out)], capture_output=True, text=True, check=True)
        yield json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", nargs="+", type=float, help="sizes, such as 1e6")
    parser.add_argument("--times", type=int, default=3)
    wanted = parser.parse_args()
    print("| pairs | seconds | million pairs/s | peak GiB | rows lost |\n|---|---|---|---|---|")
    for pairs in map(int, wanted.pairs):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            make_scores(out, pairs)
            runs = list(measure(out, wanted.times))
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = max(run["peak_gib"] for run in runs)
        lost = pairs // SHARD_PAIRS * SHARD_PAIRS - int(runs[0]["rows"])
        print(f"| {pairs:,} | {seconds:.1f} | {pairs / seconds / 1e6:.2f} | {peak:.2f} | {lost} |", flush=True)


if __name__ == "__main__":
    main()
