"""``bench throughput``: all of it in one run."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import noisyclean
from noisyclean.corpus.decoding import Decode
from noisyclean.corpus.device_decoding import require_decoder
from noisyclean.corpus.locate import ShardSpec
from noisyclean.corpus.parallel import default_workers
from noisyclean.device import choose_device
from noisyclean.errors import NoisycleanError
from noisyclean.evaluation.bench.throughput.corpus import (
    PHOTO,
    THUMBNAIL,
    RawPair,
    break_some,
    link_tars,
    make_pairs,
    take_pairs,
    write_tars,
)
from noisyclean.evaluation.bench.throughput.fitting import fitting_ways
from noisyclean.evaluation.bench.throughput.parts import BANK_SIZES, bank_ways, stage_seconds, text_ways
from noisyclean.evaluation.bench.throughput.plain import MISSING, PlainLoop, is_installed
from noisyclean.evaluation.bench.throughput.result import TINY, Throughput
from noisyclean.evaluation.bench.throughput.rounds import Rates, rate, ratio, take_turns
from noisyclean.evaluation.bench.throughput.scoring import Subject, named_encoder, score_in_own_process
from noisyclean.progress import SILENT, Progress
from noisyclean.scoring.score import BANK_SIZE

MODEL = "ViT-S-16"
PAIRS_PER_WORKER = 768
PAIRS_PER_TAR = 128
CPU_SHARE = 4
"""On a CPU a large model takes its time: it is given the first of so many parts of the pairs."""
MEMORY_TARS = 10
MEMORY_PAIRS_PER_TAR = 1000
MEMORY_COPIES = 10
"""The larger corpus has each of the smaller one's tars under so many names."""


def bench_throughput(
    shards: ShardSpec | None = None,
    *,
    model: str | None = None,
    times: int = 5,
    workers: int | None = None,
    device: str | None = None,
    decode: Decode = "fast",
    progress: Progress = SILENT,
) -> Throughput:
    """Measure scoring and training on this machine; nothing is left behind.

    Args:
        shards: pairs to measure on, the first 768 for each worker; None: made-up ones, 640 × 480 JPEGs of 80 KB.
        model: an open_clip name, for a model with random weights, which are as fast as any, or what
            :func:`noisyclean.encoders.load_encoder` takes. None: ``ViT-S-16``.
        times: rounds in which everything that is compared takes turns.
        workers: decoding processes; None: as many as there are cores.
        device: a torch device; None: CUDA if there is one, else the CPU.
        decode: how pictures become model input where scoring is measured.
        progress: who is told how it goes.

    Raises:
        UsageError: the shards or the model cannot be what is meant, or the device cannot decode.
        NoisycleanError: the shards hold no pair.
    """
    place = choose_device(device)
    workers = default_workers() if workers is None else workers
    name = MODEL if model is None else model
    # Loaded before anything is made: a wrong name is told at once.
    encoders = [named_encoder(one) for one in (name, TINY)]
    for one in encoders:
        one.decode_as(decode)
    if decode == "gpu":
        require_decoder(place)
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="noisyclean-bench-") as folder:
        root = Path(folder)
        progress.say("making the corpus")
        corpus = _Corpus.make(root / "corpus", shards, PAIRS_PER_WORKER * max(workers, 1), place)
        subject, tiny = (
            Subject.make(root / f"model-{number}", encoder, place, workers) for number, encoder in enumerate(encoders)
        )
        figures = _scoring(subject, tiny, corpus, times, root / "out", progress)
        figures |= _kernels(subject, corpus, times, progress)
        figures |= _stages(subject, tiny, corpus, root / "out", progress)
        figures["bank_share"] = figures["stages"]["bank"] * figures["rates"]["end_to_end"] / 1000
        figures |= _fitting(corpus, times, place, workers, progress)
        figures |= _memory(tiny, corpus, root, progress)
    load.append(os.getloadavg()[0])
    return Throughput(
        **figures,
        machine={
            "cores": default_workers(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
            "precision": str(subject.encoder.dtype or torch.float32).removeprefix("torch."),
            "torch": torch.__version__,
            "noisyclean": noisyclean.__version__,
            "model": name,
            "workers": workers,
            "decode": decode,
            "width": subject.width,
            "times": times,
            "pairs": corpus.pairs,
            "picture_kb": round(corpus.picture_kb, 1),
            "load": [round(one, 2) for one in load],
        },
        notes=[] if is_installed() else [MISSING],
    )


@dataclass(frozen=True)
class _Corpus:
    """Tars of the pairs, of the same with some pictures broken, the first ones for a large model, and thumbnails."""

    whole: list[Path]
    broken: list[Path]
    first: list[Path]
    thumbnails: list[Path]
    pairs: int
    picture_kb: float

    @classmethod
    def make(cls, root: Path, shards: ShardSpec | None, most: int, device: torch.device) -> _Corpus:
        pairs: list[RawPair] = list(make_pairs(most, PHOTO) if shards is None else take_pairs(shards, most))
        if not pairs:
            raise NoisycleanError("the shards hold no pair of a picture and a caption; `noisyclean inspect` says why")
        whole = write_tars(root / "whole", pairs, PAIRS_PER_TAR)
        return cls(
            whole,
            write_tars(root / "broken", break_some(pairs), PAIRS_PER_TAR),
            whole[: -(-len(whole) // CPU_SHARE)] if device.type == "cpu" else whole,
            write_tars(
                root / "thumbnails", make_pairs(MEMORY_TARS * MEMORY_PAIRS_PER_TAR, THUMBNAIL), MEMORY_PAIRS_PER_TAR
            ),
            len(pairs),
            sum(len(image) for image, _ in pairs) / len(pairs) / 1024,
        )


def _scoring(
    subject: Subject, tiny: Subject, corpus: _Corpus, times: int, out: Path, progress: Progress
) -> dict[str, Any]:
    passes, tiny_passes = subject.passes(corpus.first), tiny.passes(corpus.whole)
    lost = []

    def with_broken() -> float:
        summary, reached = tiny.score(corpus.broken, out)
        lost.append(corpus.pairs - summary.pairs)
        return reached

    slow = {"model": rate(lambda: subject.run(passes)), "end_to_end": lambda: subject.score(corpus.first, out)[1]}
    fast = {
        "loader": rate(lambda: subject.load(corpus.whole)),
        "tiny_loader": rate(lambda: tiny.load(corpus.whole)),
        "tiny_model": rate(lambda: tiny.run(tiny_passes)),
        "tiny_end_to_end": lambda: tiny.score(corpus.whole, out)[1],
        "tiny_end_to_end_1%_broken": with_broken,
    }
    if is_installed():
        plain = PlainLoop(subject.folder, subject.encoder.device)
        # It is slow, and half as many tell its rate as well.
        few = corpus.first[: -(-len(corpus.first) // 2)]
        slow["plain_loop"] = rate(lambda: plain.score(few, subject.width, subject.workers))
        fast["plain_loader"] = rate(lambda: plain.load(corpus.whole, subject.width, subject.workers))
    found = take_turns(f"scoring with {subject.folder.name}", slow, times, progress)
    found |= take_turns("decoding, and scoring with the tiny encoder", fast, times, progress)
    shared = subject.encoder.device.type == "cpu"
    return {
        "end_to_end_over_model": ratio(found, "end_to_end", "model"),
        "end_to_end_over_limit": _over_limit(found, "end_to_end", "model", "loader", shared),
        "tiny_end_to_end_over_model": ratio(found, "tiny_end_to_end", "tiny_model"),
        "tiny_end_to_end_over_limit": _over_limit(found, "tiny_end_to_end", "tiny_model", "tiny_loader", shared),
        "over_plain_loop": ratio(found, "end_to_end", "plain_loop") if is_installed() else None,
        "loader_over_plain": ratio(found, "loader", "plain_loader") if is_installed() else None,
        "corrupt_slowdown": 1 - ratio(found, "tiny_end_to_end_1%_broken", "tiny_end_to_end"),
        "rows_lost": max(lost),
        "rates": {way: median(rates) for way, rates in found.items()},
    }


def _over_limit(found: Rates, way: str, model: str, loader: str, shared: bool) -> float:
    """The median of a way's rate over what a model and a loader allow, on the same cores or GPU, or side by side."""
    rounds = zip(found[way], found[model], found[loader], strict=True)
    return median(a * (1 / b + 1 / c if shared else 1 / min(b, c)) for a, b, c in rounds)


def _kernels(subject: Subject, corpus: _Corpus, times: int, progress: Progress) -> dict[str, Any]:
    device = subject.encoder.device
    sizes = {size: bank_ways(device, size) for size in BANK_SIZES}
    ways = {f"bank of {size}": rate(classify) for size, (classify, _) in sizes.items()}
    ways["products"] = rate(sizes[BANK_SIZE][1])
    ways["short texts"], ways["full texts"] = text_ways(subject, corpus.first)
    found = take_turns("bank and captions", ways, times, progress)
    return {
        "bank_over_matmul": ratio(found, "products", f"bank of {BANK_SIZE}"),
        "text_speedup": ratio(found, "short texts", "full texts"),
        "growth_in_bank": [{"bank": size, "seconds": 1000 / median(found[f"bank of {size}"])} for size in BANK_SIZES],
    }


def _stages(subject: Subject, tiny: Subject, corpus: _Corpus, out: Path, progress: Progress) -> dict[str, Any]:
    with progress.task("stages, one by one", 2, "models") as task:
        stages = stage_seconds(subject, corpus.first[:1], out)
        task.advance()
        tiny_stages = stage_seconds(tiny, corpus.first, out)
        task.advance()
    return {"stages": stages, "tiny_stages": tiny_stages}


def _fitting(corpus: _Corpus, times: int, device: torch.device, workers: int, progress: Progress) -> dict[str, float]:
    ways = fitting_ways(corpus.thumbnails[:2], device, workers)
    found = take_turns("training", {name: rate(way) for name, way in ways._asdict().items()}, times, progress)
    return {
        "fit_over_bare": ratio(found, "fit", "bare"),
        "refilter_share": ratio(found, "fit", "refilter"),
    }


def _memory(tiny: Subject, corpus: _Corpus, root: Path, progress: Progress) -> dict[str, Any]:
    if sys.platform != "linux":
        return {"memory_growth_mb": None, "growth_in_pairs": []}
    found = []
    with progress.task("scoring in processes of their own", 2, "corpora") as task:
        for copies in (1, MEMORY_COPIES):
            linked = link_tars(root / f"copies-{copies}", corpus.thumbnails, copies)
            found.append(score_in_own_process(linked, tiny, root / f"out-{copies}"))
            task.advance(1, f"{found[-1].pairs:,} pairs")
    return {
        "memory_growth_mb": found[1].peak_mb - found[0].peak_mb,
        "growth_in_pairs": [one._asdict() for one in found],
    }
