"""What is done with shards wherever it is done: decode, embed, score, and write the part of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from noisyclean.corpus.chunk import Chunk
from noisyclean.corpus.embeddings import Origin, save_embeddings, saved_origin
from noisyclean.corpus.locate import Shard
from noisyclean.errors import UsageError
from noisyclean.manifest.parts import PartInfo, write_part
from noisyclean.manifest.schema import SAMPLE
from noisyclean.scoring.scorer import ScoredShard, Scorer, ScoringStream


@dataclass(frozen=True)
class Place:
    """What a set of models has at its disposal: a device, and so many decoding processes."""

    device: torch.device
    workers: int


@dataclass(frozen=True)
class Saving:
    """Where the embeddings go, and what makes them."""

    directory: Path
    encoder: str
    temperature: float

    @classmethod
    def of(cls, directory: Path, scorer: Scorer, model: str) -> Saving:
        """The embeddings that the scorer's only model makes; ``model`` is what the user knows it as.

        Raises:
            UsageError: it has several.
        """
        if len(scorer.models) > 1:
            raise UsageError(
                f"--save-embeddings: each fold of {model} has its own model, whose embeddings cannot be compared; "
                f"name one of them: -m {model}/fold-0/encoder, which has trained on the other folds' pairs"
            )
        (only,) = scorer.models
        return cls(directory, only.encoder.fingerprint(), only.bank.temperature)

    def is_done(self, shard: str, source: str) -> bool:
        """Whether those of a shard in the state ``source`` are there.

        Raises:
            UsageError: there are others, or something else lies in their place.
        """
        saved = saved_origin(self.directory, shard)
        if saved is not None and saved.encoder != self.encoder:
            raise UsageError(f"{self.directory}: holds embeddings by another model; give another folder")
        return saved == self._origin(source)

    def save(self, one: ScoredShard, source: str) -> None:
        """Write those of a shard in the state ``source``."""
        rows = one.table.filter(one.table["fault"].is_null()).select(SAMPLE)
        save_embeddings(self.directory, one.shard, rows, *one.embeddings, self._origin(source))

    def _origin(self, source: str) -> Origin:
        return Origin(self.encoder, repr(self.temperature), source)


@dataclass(frozen=True)
class Work:
    """All that is to be known where shards are scored. It can be pickled.

    Attributes:
        scorer: puts the models with their banks on a device.
        chunks: shards → their pairs, ready for the scorer.
        batch_size: pairs in a pass.
        rematch: whether the best partners of each pair are looked for.
        saving: None: the embeddings are not kept.
        out: the OUT folder.
        fingerprint: the scorer's.
    """

    scorer: Callable[[torch.device], Scorer]
    chunks: Callable[[Sequence[Shard], Place], Iterator[Chunk]]
    batch_size: int
    rematch: bool
    saving: Saving | None
    out: Path
    fingerprint: str


class Done(NamedTuple):
    """How far it is: the names of the shards that were finished since the last word, and the samples read so far."""

    shards: list[str]
    samples: int


class Engine(Protocol):
    """Where shards are scored.

    Attributes:
        device: what the models run on there.
        own_device: what this process has for what is computed once, before any shard is scored.
    """

    device: torch.device
    own_device: torch.device

    def run(self, work: Work, shards: Mapping[Shard, str]) -> Iterator[Done]:
        """Score the shards, each given with its state, and write a part of each."""


def score_shards(work: Work, scorer: Scorer, place: Place, shards: Mapping[Shard, str]) -> Iterator[Done]:
    """Score and write the shards, each given with its state, by what ``work.scorer`` has put on the place."""
    stream = ScoringStream(scorer, work.batch_size, keep_embeddings=work.saving is not None, rematch=work.rematch)
    states = {shard.name: state for shard, state in shards.items()}

    def written(finished: Iterable[ScoredShard]) -> Done:
        names = []
        for one in finished:
            if work.saving is not None:
                work.saving.save(one, states[one.shard])
            write_part(work.out, one.shard, one.table, PartInfo(work.fingerprint, states[one.shard], one.damage or ""))
            names.append(one.shard)
        return Done(names, stream.samples)

    for chunk in work.chunks(list(shards), place):
        yield written(stream.add(chunk))
    yield written(stream.finish())
