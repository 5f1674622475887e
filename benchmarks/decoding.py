"""How fast pictures become model input, and what ways of decoding that are not exact change.

    python benchmarks/decoding.py rates SHARDS
    python benchmarks/decoding.py fidelity SHARDS -m RUN/fold-0/encoder
    python benchmarks/decoding.py scoring SHARDS -m ViT-B-32

``rates``: samples a second of one core's time, which contention does not change much, for single steps and for whole
loaders with their workers; all take turns, and medians are printed. ``fidelity``: SHARDS are scored by a model that was
not fitted to them, with ``--decode exact``, ``fast`` and ``gpu``, and the last two compared with the first. What a GPU
decodes, only ``--device cuda`` tells: on a CPU ``gpu`` takes libjpeg. ``scoring``: pairs a second of ``score`` from the
first tar to the last Parquet file with ``fast`` and ``gpu`` in turn, beside decoding and the model alone; of a hundred
shards or more, as processes take a moment to start.
"""

from __future__ import annotations

import argparse
import io
import resource
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import open_clip
import pandas as pd
import torch
import webdataset
from PIL import Image
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

import noisyclean as nc
from noisyclean.cli.console import progress_bar
from noisyclean.corpus.decoding import Decode
from noisyclean.corpus.locate import Shard, find_shards
from noisyclean.corpus.parallel import default_workers
from noisyclean.corpus.shards import ShardReader
from noisyclean.corpus.stream import stream_chunks
from noisyclean.device import choose_device
from noisyclean.encoders import DualEncoder, create_encoder
from noisyclean.evaluation.bench.throughput.rounds import rate, ratio, take_turns
from noisyclean.evaluation.bench.throughput.scoring import Subject, named_encoder
from noisyclean.manifest.schema import MEASURED

SAMPLES = 200
CHUNK = 128


def rates(shards: list[Shard], encoder: DualEncoder, workers: int, times: int) -> None:
    """Print samples a second of each way."""
    torch.set_num_threads(1)
    samples = [one for one in islice(ShardReader(shards[0]), SAMPLES) if one.fault is None]
    size = encoder.config["preprocess_cfg"]["size"]
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=size), is_train=False)

    def with_open_clip() -> int:
        for one in samples:
            transform(Image.open(io.BytesIO(one.image or b"")).convert("RGB"))
        return len(samples)

    def with_noisyclean(decode: Decode) -> int:
        preprocessor = replace(encoder.preprocessor, decode=decode)
        for one in samples:
            preprocessor.prepare(one.image or b"")
        return len(samples)

    def tokens() -> int:
        return len(encoder.preprocessor.tokens([one.caption or "" for one in samples]))

    def reading() -> int:
        return sum(1 for _ in islice(ShardReader(shards[0]), SAMPLES))

    def plain_loader() -> int:
        pairs = webdataset.WebDataset([one.path for one in shards], shardshuffle=False, empty_check=False)
        pairs = pairs.decode("pilrgb").to_tuple("jpg;png", "txt")
        pairs = pairs.map_tuple(transform, lambda caption: encoder.preprocessor.tokens([caption])[0]).batched(CHUNK)
        return sum(len(images) for images, _ in DataLoader(pairs, batch_size=None, num_workers=workers))

    def loader(decode: Decode) -> int:
        preprocessor = replace(encoder.preprocessor, decode=decode)
        return sum(len(one.image) for one in stream_chunks(shards, preprocessor, chunk_size=CHUNK, workers=workers))

    steps = {
        "Pillow and open_clip's transform": with_open_clip,
        "--decode exact": lambda: with_noisyclean("exact"),
        "--decode fast": lambda: with_noisyclean("fast"),
        "--decode gpu, what is left to the workers": lambda: with_noisyclean("gpu"),
        "tokens": tokens,
        "reading the tar": reading,
    }
    loaders = {
        "webdataset, Pillow and open_clip's transform": plain_loader,
        "stream_chunks, exact": lambda: loader("exact"),
        "stream_chunks, fast": lambda: loader("fast"),
        f"stream_chunks, gpu, on {encoder.device}": lambda: loader("gpu"),
    }
    print_rates("steps", steps, times)
    print_rates(f"loaders, workers: {workers}", loaders, times)


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def print_rates(title: str, ways: dict[str, Callable[[], int]], times: int) -> None:
    """A table of medians; the ways take turns, so that a machine busy with something else is so for all."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(times):
        for name, way in ways.items():
            started = cpu_seconds()
            found[name].append(way() / (cpu_seconds() - started))
    first = statistics.median(next(iter(found.values())))
    print(f"\n| {title} | samples/s a core | ratio |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):,.0f} | {statistics.median(values) / first:.2f} |", flush=True)


def fidelity(shards: list[str], model: str, device: torch.device) -> None:
    """Print how far scores and splits of each way agree with those of the exact one."""
    found: dict[Decode, pd.DataFrame] = {}
    for decode in get_args(Decode):
        with tempfile.TemporaryDirectory() as out:
            nc.score(shards, model=model, out=out, decode=decode, device=str(device))
            found[decode] = nc.Manifest(out).pairs().sort_values(["shard", "index"], ignore_index=True)
    exact = found.pop("exact")
    print(f"| rank correlation with exact, on {device} | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for name in MEASURED:
        ranks = [spearmanr(exact[name], one[name], nan_policy="omit").statistic for one in found.values()]
        print(f"| {name} | {' | '.join(f'{one:.6f}' for one in ranks)} |")
    same = [np.mean(exact["split"].astype(str) == one["split"].astype(str)) for one in found.values()]
    print(f"| same split, of {len(exact):,} pairs | {' | '.join(f'{one:.2%}' for one in same)} |")


def scoring(shards: list[Shard], model: str, device: torch.device, workers: int, times: int) -> None:
    """Print pairs a second by each way to decode, medians."""
    tars = [Path(one.path) for one in shards]
    encoder = named_encoder(model)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subjects = {}
        for decode in ("fast", "gpu"):
            encoder.decode_as(decode)
            subjects[decode] = Subject.make(root / decode, encoder, device, workers)
        first = subjects["fast"]
        passes = first.passes(tars)
        ways: dict[str, Callable[[], float]] = {"model alone": rate(lambda: first.run(passes))}
        for decode, subject in subjects.items():
            subject.score(tars[:workers], root / "out")  # whatever is done but once
            ways[f"decoding alone, {decode}"] = rate(partial(subject.load, tars))
            ways[f"from tar to Parquet, {decode}"] = lambda one=subject: one.score(tars, root / "out")[1]
        with progress_bar() as progress:
            found = take_turns("scoring", ways, times, progress)
    print(f"| {model} on {device}, {workers} workers | pairs/s | over the model alone |\n|---|---|---|")
    for name, rates in found.items():
        print(f"| {name} | {statistics.median(rates):,.0f} | {ratio(found, name, 'model alone'):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["rates", "fidelity", "scoring"])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("-m", "--model", default="noisyclean-run/fold-0/encoder", help="what scores")
    parser.add_argument("--size", type=int, default=224, help="side of the model's input in pixels, for rates")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--device", help="where the model is; default: a GPU if there is one")
    wanted = parser.parse_args()
    device = choose_device(wanted.device)
    if wanted.what == "fidelity":
        fidelity(wanted.shards, wanted.model, device)
    elif wanted.what == "scoring":
        scoring(find_shards(wanted.shards), wanted.model, device, wanted.workers, wanted.times)
    else:
        encoder = create_encoder("noisyclean-tiny", image_size=wanted.size, context_length=77).to(device)
        rates(find_shards(wanted.shards), encoder, wanted.workers, wanted.times)


if __name__ == "__main__":
    main()
