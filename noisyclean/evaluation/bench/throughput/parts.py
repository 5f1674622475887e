"""The stages of scoring one by one, and its kernels beside what they are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from noisyclean.corpus.decoding import Encoded
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.shards import ShardReader
from noisyclean.evaluation.bench.throughput.scoring import Subject, unit_vectors
from noisyclean.manifest.parts import PartInfo, write_part
from noisyclean.scoring.reference import MIN_BANK, BankedEncoder, ReferenceBank
from noisyclean.scoring.score import CHUNK
from noisyclean.scoring.scorer import NoEncoder, Scorer, ScoringStream
from noisyclean.srem import bank_statistics

BANK_VALUES = 512
BANK_PAIRS = 256
BANK_SIZES = (1024, 4096, 8192, 16384)
TEMPERATURE = 0.05


def stage_seconds(subject: Subject, tars: Sequence[Path], out: Path) -> dict[str, float]:
    """Seconds that 1,000 pairs of these tars take in each stage, in this process, one stage after the other."""
    shards = find_shards(list(map(str, tars)))
    encoder, preprocessor, bank = subject.encoder, subject.encoder.preprocessor, subject.bank
    samples = [sample for shard in shards for sample in ShardReader(shard) if sample.fault is None]
    captions = [sample.caption or "" for sample in samples]
    passes = subject.passes(tars)
    image, text = (unit_vectors(subject.width, bank.image.shape[1], seed).to(encoder.device) for seed in (2, 3))
    strangers = np.full(subject.width, -1)

    def read() -> None:
        for shard in shards:
            for _ in ShardReader(shard):
                pass

    def decode() -> None:
        for start in range(0, len(samples), CHUNK):
            prepared = [preprocessor.prepare(sample.image or b"") for sample in samples[start : start + CHUNK]]
            left = dict(enumerate(one for one in prepared if isinstance(one, Encoded)))
            image, _ = preprocessor.finish(torch.empty(0), left)
            image[:1].cpu()  # a GPU has done its work only then

    def tokenise() -> None:
        for start in range(0, len(captions), CHUNK):
            preprocessor.tokens(captions[start : start + CHUNK])

    def classify() -> None:
        for _ in passes.image:
            bank.score(image, text, strangers).similarity.cpu()

    stages: dict[str, Callable[[], object]] = {
        "read": read,
        "decode_and_resize": decode,
        "tokenise": tokenise,
        "image_tower": lambda: subject.run(passes._replace(text=[])),
        "text_tower": lambda: subject.run(passes._replace(image=[])),
        "bank": classify,
        "rows_and_parquet": _rows_and_parquet(subject, tars, out),
    }
    return {name: 1000 * _seconds(stage) / len(samples) for name, stage in stages.items()}


def _rows_and_parquet(subject: Subject, tars: Sequence[Path], out: Path) -> Callable[[], None]:
    """All that scoring does besides: the towers left out, and hardly a bank to speak of."""
    small = ReferenceBank.build(
        np.arange(MIN_BANK), unit_vectors(MIN_BANK, 8, 0), unit_vectors(MIN_BANK, 8, 1), subject.bank.temperature
    )
    chunks = [
        replace(chunk, image=unit_vectors(len(chunk.image), 8, 2), text=unit_vectors(len(chunk.image), 8, 3))
        for chunk in subject.chunks(tars)
    ]

    def run() -> None:
        scorer = Scorer([BankedEncoder(NoEncoder("made up", torch.device("cpu")), small)], None)
        stream = ScoringStream(scorer, subject.width)
        for chunk in chunks:
            for one in stream.add(chunk):
                write_part(out, one.shard, one.table, PartInfo("made up", ""))
        for one in stream.finish():
            write_part(out, one.shard, one.table, PartInfo("made up", ""))

    return run


def bank_ways(device: torch.device, size: int) -> tuple[Callable[[], int], Callable[[], int]]:
    """Classifying ``BANK_PAIRS`` pairs against a bank of ``size``, and the two matrix products in it alone."""
    image, text = (unit_vectors(BANK_PAIRS, BANK_VALUES, seed).to(device) for seed in (0, 1))
    bank_image, bank_text = (unit_vectors(size, BANK_VALUES, seed).to(device) for seed in (2, 3))
    strangers = torch.full((BANK_PAIRS,), -1, device=device)

    def classify() -> int:
        bank_statistics(image, text, bank_image, bank_text, TEMPERATURE, strangers).swapped_entropy.cpu()
        return BANK_PAIRS

    def multiply() -> int:
        with torch.inference_mode():
            products = image @ bank_text.T, text @ bank_image.T
            for one in products:
                one[0, 0].cpu()
        return BANK_PAIRS

    return classify, multiply


def text_ways(subject: Subject, tars: Sequence[Path]) -> tuple[Callable[[], float], Callable[[], float]]:
    """Captions a second: those of one length together, as in a large window, and over the full context.

    One pass tells how long each length takes; what counts is how many captions are of it.
    """
    encoder, width = subject.encoder, subject.width
    tokens = torch.cat([chunk.text for chunk in subject.chunks(tars) if len(chunk.text)])
    lengths, counts = np.unique(encoder.text_lengths(tokens), return_counts=True)
    passes = [_filled(tokens[torch.from_numpy(encoder.text_lengths(tokens) == one)], width) for one in lengths]
    any_length = _filled(tokens, width)

    def grouped() -> float:
        seconds = [_seconds(lambda one=one: encoder.encode_text(one).cpu(), 1) for one in passes]  # type: ignore[misc]
        return width * float(counts.sum() / (counts @ np.array(seconds)))

    def full() -> float:
        return width / _seconds(lambda: encoder.model.encode_text(any_length.to(encoder.device)).cpu(), 1)  # type: ignore[operator]

    return grouped, full


def _filled(tokens: Tensor, width: int) -> Tensor:
    """``width`` rows of these, again and again where there are fewer."""
    return tokens[torch.arange(width) % len(tokens)]


def _seconds(stage: Callable[[], object], times: int = 3) -> float:
    """The median of some runs."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        with torch.inference_mode():
            stage()
        found.append(time.perf_counter() - started)
    return median(found)
