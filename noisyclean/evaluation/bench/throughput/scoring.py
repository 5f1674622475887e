"""End to end, as users run it: ``score`` from tars to Parquet, and the passes of the model alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.nn import functional

from noisyclean.corpus.chunk import Chunk
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.stream import stream_chunks
from noisyclean.encoders import DualEncoder, create_encoder, load_encoder
from noisyclean.errors import NoisycleanError
from noisyclean.manifest.splitting import Summary
from noisyclean.progress import Silent, Task
from noisyclean.scoring.reference import ReferenceBank
from noisyclean.scoring.score import BANK_FILE, BANK_SIZE, CHUNK, default_batch, score
from noisyclean.scoring.window import padded_rows

_SCORE = """
import json, pathlib, sys
from noisyclean.scoring.score import score
shards, model, out, workers, device = sys.argv[1:]
summary = score(shards, model=model, out=out, workers=int(workers), device=device)
status = pathlib.Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps({"pairs": summary.pairs, "seconds": summary.seconds, "peak_mb": peak / 1024}))
"""


class Clock(Silent):
    """Times the task in which pairs are scored; what comes before and after it is done once a corpus."""

    seconds = 0.0

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Task]:
        started = time.perf_counter()
        with super().task(name, total, unit) as task:
            yield task
        if name == "scoring":
            self.seconds = time.perf_counter() - started


def named_encoder(name: str) -> DualEncoder:
    """That of an open_clip name with drawn weights, which are as fast as any; else what :func:`load_encoder` takes."""
    return create_encoder(name) if name in open_clip.list_models() else load_encoder(name)


@dataclass(frozen=True)
class Subject:
    """A model with a bank, on disk as ``score`` takes it and in memory, and how it is run.

    Attributes:
        folder: where encoder and bank lie.
        encoder: on the device.
        bank: ``BANK_SIZE`` made-up pairs, on the device: what is in them costs nothing.
        width: pairs in a pass.
        workers: decoding processes.
    """

    folder: Path
    encoder: DualEncoder
    bank: ReferenceBank
    width: int
    workers: int

    @classmethod
    def make(cls, folder: Path, encoder: DualEncoder, device: torch.device, workers: int) -> Subject:
        """Save the encoder, load it as ``score`` will, and give it a bank."""
        encoder.save(folder)
        encoder = load_encoder(str(folder)).to(device)
        with encoder.inference():
            values = encoder.encode_text(encoder.preprocessor.tokens(["how wide?"])).shape[1]
        bank = ReferenceBank.build(
            np.arange(BANK_SIZE),
            unit_vectors(BANK_SIZE, values, 0),
            unit_vectors(BANK_SIZE, values, 1),
            encoder.temperature.item(),
            np.arange(BANK_SIZE),
        )
        bank.save(folder / BANK_FILE, encoder=encoder.fingerprint())
        return cls(folder, encoder, bank.to(device), default_batch(device), workers)

    def score(self, tars: Sequence[Path], out: Path) -> tuple[Summary, float]:
        """Score into a new ``out``; how it went, and samples a second from the first tar to the last Parquet file."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        shutil.copy(self.folder / BANK_FILE, out)
        clock = Clock()
        summary = score(
            list(map(str, tars)),
            model=self.folder,
            out=out,
            workers=self.workers,
            device=str(self.encoder.device),
            progress=clock,
        )
        return summary, summary.pairs / clock.seconds

    def chunks(self, tars: Sequence[Path]) -> Iterator[Chunk]:
        """The tars decoded, with nothing else on the cores."""
        shards = find_shards(list(map(str, tars)))
        return stream_chunks(shards, self.encoder.preprocessor, chunk_size=CHUNK, workers=self.workers, in_order=False)

    def load(self, tars: Sequence[Path]) -> int:
        """Decode all pairs; returns how many."""
        return sum(len(chunk.image) for chunk in self.chunks(tars))

    def passes(self, tars: Sequence[Path]) -> Passes:
        """The passes that these tars take, decoded and in memory."""
        chunks = [chunk for chunk in self.chunks(tars) if len(chunk.image)]
        text = torch.cat([chunk.text for chunk in chunks])
        lengths = self.encoder.text_lengths(text)
        images = torch.cat([chunk.image for chunk in chunks])
        grouped = [text[torch.from_numpy(np.flatnonzero(lengths == one))] for one in np.unique(lengths)]
        return Passes(list(self._passes(images)), [one for group in grouped for one in self._passes(group)], len(text))

    def _passes(self, batch: Tensor) -> Iterator[Tensor]:
        """All of one width, as they are when scored: what is missing in the last is filled up."""
        for part in torch.split(batch, self.width):
            yield padded_rows(part, self.width - len(part))

    def run(self, passes: Passes) -> int:
        """The passes alone; returns how many pairs that were."""
        with self.encoder.inference():
            found = [self.encoder.encode_image(one) for one in passes.image]
            found += [self.encoder.encode_text(one) for one in passes.text]
            torch.cat(found).cpu()  # a GPU has done its work only then
        return passes.pairs


class Passes(NamedTuple):
    """Model input of so many pairs, pass by pass; captions among those of their length."""

    image: list[Tensor]
    text: list[Tensor]
    pairs: int


class OwnProcess(NamedTuple):
    """What scoring so many pairs took in a process of its own, from start to end."""

    pairs: int
    seconds: float
    peak_mb: float


def score_in_own_process(shards: Path, subject: Subject, out: Path) -> OwnProcess:
    """Score with a bank drawn from the corpus, all as the command does it; Linux only."""
    words = [str(shards), str(subject.folder), str(out), str(subject.workers), str(subject.encoder.device)]
    done = subprocess.run([sys.executable, "-c", _SCORE, *words], capture_output=True, text=True)
    if done.returncode:
        raise NoisycleanError(f"{shards}: scoring in a process of its own failed: {done.stderr.strip()[-500:]}")
    return OwnProcess(**json.loads(done.stdout))


def unit_vectors(count: int, values: int, seed: int) -> Tensor:
    """(count, values) random float32 unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, values, generator=generator), dim=1)
