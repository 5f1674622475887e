"""What it costs to score on Ray where there is but one machine, beside the local engine on the same shards.

    python benchmarks/ray_engine.py

The engines take turns, each with few shards and with many of 1,000 made-up photos, by the tiny encoder. What a further
shard takes is told apart from what is done once: Ray is started, and its process imports and loads all anew.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from noisyclean.encoders import create_encoder
from noisyclean.evaluation.bench.throughput.corpus import PHOTO, make_pairs, write_tars
from noisyclean.evaluation.bench.throughput.scoring import Clock, Subject
from noisyclean.scoring.engines import EngineName
from noisyclean.scoring.score import BANK_FILE, score

PAIRS = 1000


def seconds(subject: Subject, tars: Sequence[Path], engine: EngineName, out: Path) -> float:
    """Score into a new ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shutil.copy(subject.folder / BANK_FILE, out)
    clock = Clock()
    paths = list(map(str, tars))
    score(paths, model=subject.folder, out=out, workers=subject.workers, device="cpu", engine=engine, progress=clock)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--few", type=int, default=4, help="shards")
    parser.add_argument("--many", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--times", type=int, default=3, help="rounds; their medians are told")
    wanted = parser.parse_args()
    engines: tuple[EngineName, ...] = get_args(EngineName)
    rates: dict[EngineName, list[float]] = {engine: [] for engine in engines}
    once: dict[EngineName, list[float]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tars = write_tars(home / "shards", make_pairs(wanted.many * PAIRS, PHOTO), PAIRS)
        subject = Subject.make(home / "model", create_encoder("noisyclean-tiny"), torch.device("cpu"), wanted.workers)
        for _, engine in itertools.product(range(wanted.times), engines):
            few, many = (seconds(subject, tars[:count], engine, home / "out") for count in (wanted.few, wanted.many))
            a_shard = (many - few) / (wanted.many - wanted.few)
            rates[engine].append(PAIRS / a_shard)
            once[engine].append(few - wanted.few * a_shard)
            print(f"{engine}: {few:.1f} s and {many:.1f} s", flush=True)
    print("\n| engine | pairs/s | done once, s |\n|---|---|---|")
    for engine in engines:
        print(f"| {engine} | {statistics.median(rates[engine]):.0f} | {statistics.median(once[engine]):.1f} |")
    ratios = [ray / local for local, ray in zip(*rates.values(), strict=True)]
    print(f"\nRay over local, within a round: {', '.join(f'{one:.2f}' for one in ratios)}")


if __name__ == "__main__":
    main()
