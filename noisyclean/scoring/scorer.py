"""Scoring a stream of decoded pairs: one row a sample, readable or not, gathered shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.corpus.identity import caption_id
from noisyclean.corpus.shards import Sample
from noisyclean.corpus.stream import Chunk
from noisyclean.manifest.schema import PART_SCHEMA, STATISTICS
from noisyclean.scoring.folds import FoldMap
from noisyclean.scoring.reference import ReferenceModel

_SCORES = (*STATISTICS, "p_value")
_FROM_SAMPLE = ("key", "shard", "index", "uid", "url", "caption", "width", "height", "fault")


@dataclass(frozen=True)
class ScoredShard:
    """All rows of one shard, as :data:`noisyclean.manifest.schema.PART_SCHEMA` has them."""

    shard: str
    table: pa.Table
    damage: str | None


class Scorer:
    """The models of all folds; says which one scores a pair."""

    def __init__(self, models: Sequence[ReferenceModel], folds: FoldMap | None) -> None:
        """``folds`` maps captions to models; None: there is only one model, which trained on none of the pairs."""
        if folds is None and len(models) != 1:
            raise ValueError("several models need a fold map")
        self.models = list(models)
        self.folds = folds

    def fold_of(self, captions: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) caption hashes → (N,) indices of models."""
        return np.zeros(len(captions), np.int64) if self.folds is None else self.folds.fold_of(captions)

    def fingerprint(self) -> str:
        """A digest of all models, banks and the fold map: equal fingerprints give equal scores."""
        digest = hashlib.blake2b(digest_size=16)
        for model in self.models:
            digest.update(model.fingerprint().encode())
        if self.folds is not None:
            digest.update(self.folds.captions.tobytes() + self.folds.exceptions.tobytes())
        return digest.hexdigest()


class ScoringStream:
    """Takes chunks in, gives whole shards out.

    Pairs queue up for their model until there are ``width`` of them, whatever chunks and shards they come from. Every
    forward pass so has the same shape, and a pair's score does not depend on what it happened to come with: matrix
    products of other shapes are rounded otherwise.
    """

    def __init__(self, scorer: Scorer, width: int) -> None:
        self._scorer = scorer
        self._queues = [_Queue(model, width) for model in scorer.models]
        self._open: dict[str, _ShardRows] = {}

    def add(self, chunk: Chunk) -> Iterator[ScoredShard]:
        """Take a chunk; yields the shards that it (or the passes it set off) completed."""
        rows = self._open.setdefault(chunk.shard, _ShardRows(chunk.shard))
        readable = rows.add(chunk)
        captions = np.array([caption_id(sample.caption or "") for sample in chunk.readable()], np.int64)
        folds = self._scorer.fold_of(captions)
        rows.fold[readable] = folds
        for fold, queue in enumerate(self._queues):
            (at,) = np.nonzero(folds == fold)
            if len(at):
                queue.add(_Waiting(rows, readable[at], captions[at], chunk.pixels[at], chunk.tokens[at]))
        yield from self._complete()

    def finish(self) -> Iterator[ScoredShard]:
        """Score what still waits; yields the last shards."""
        for queue in self._queues:
            queue.flush()
        yield from self._complete()

    def _complete(self) -> Iterator[ScoredShard]:
        for name in [name for name, rows in self._open.items() if rows.complete]:
            rows = self._open.pop(name)
            yield ScoredShard(name, rows.table(), rows.damage)


class _ShardRows:
    """The rows of one shard as they fill up."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.samples: list[Sample] = []
        self.fold = np.zeros(0, np.int64)
        self.scores = np.zeros((0, len(_SCORES)), np.float32)
        self.waiting = 0
        self.read = False
        self.damage: str | None = None

    @property
    def complete(self) -> bool:
        return self.read and self.waiting == 0

    def add(self, chunk: Chunk) -> NDArray[np.int64]:
        """Append the samples of a chunk; returns the places of the readable ones."""
        first = len(self.samples)
        self.samples.extend(chunk.samples)
        self.fold = np.resize(self.fold, len(self.samples))
        self.scores = np.concatenate([self.scores, np.full((len(chunk.samples), len(_SCORES)), np.nan, np.float32)])
        readable = first + np.array([i for i, sample in enumerate(chunk.samples) if sample.fault is None], np.int64)
        self.waiting += len(readable)
        self.read = chunk.last
        self.damage = chunk.damage
        return readable

    def table(self) -> pa.Table:
        unreadable = np.array([sample.fault is not None for sample in self.samples], np.bool_)
        columns = {
            name: pa.array([getattr(sample, name) for sample in self.samples], PART_SCHEMA.field(name).type)
            for name in _FROM_SAMPLE
        }
        columns["fold"] = pa.array(self.fold, PART_SCHEMA.field("fold").type, mask=unreadable)
        for i, name in enumerate(_SCORES):
            columns[name] = pa.array(self.scores[:, i], PART_SCHEMA.field(name).type, mask=unreadable)
        return pa.table([columns[name] for name in PART_SCHEMA.names], schema=PART_SCHEMA)


@dataclass(frozen=True)
class _Waiting:
    """Pairs of one shard that wait for one model."""

    rows: _ShardRows
    at: NDArray[np.int64]
    captions: NDArray[np.int64]
    pixels: Tensor
    tokens: Tensor

    def part(self, where: slice) -> _Waiting:
        return _Waiting(self.rows, self.at[where], self.captions[where], self.pixels[where], self.tokens[where])


@dataclass
class _Queue:
    model: ReferenceModel
    width: int
    waiting: list[_Waiting] = field(default_factory=list)
    count: int = 0

    def add(self, pairs: _Waiting) -> None:
        while self.count + len(pairs.at) >= self.width:
            room = self.width - self.count
            self._append(pairs.part(slice(0, room)))
            pairs = pairs.part(slice(room, None))
            self.flush()
        self._append(pairs)

    def _append(self, pairs: _Waiting) -> None:
        if len(pairs.at):
            self.waiting.append(pairs)
            self.count += len(pairs.at)

    def flush(self) -> None:
        if not self.waiting:
            return
        pixels = torch.cat([one.pixels for one in self.waiting])
        tokens = torch.cat([one.tokens for one in self.waiting])
        captions = np.concatenate([one.captions for one in self.waiting])
        scores = self._forward(pixels, tokens, captions)
        first = 0
        for one in self.waiting:
            one.rows.scores[one.at] = scores[first : first + len(one.at)]
            one.rows.waiting -= len(one.at)
            first += len(one.at)
        self.waiting, self.count = [], 0

    def _forward(self, pixels: Tensor, tokens: Tensor, captions: NDArray[np.int64]) -> NDArray[np.float32]:
        missing = self.width - len(captions)
        encoder, bank = self.model.encoder, self.model.bank
        with encoder.inference():
            image = encoder.encode_image(_padded(pixels, missing)).float()
            text = encoder.encode_text(_padded(tokens, missing)).float()
            found = bank.score(image, text, np.concatenate([captions, np.repeat(captions[-1:], missing)]))
            columns = torch.stack([getattr(found, name) for name in STATISTICS], dim=1)[: len(captions)].cpu().numpy()
        p = bank.p_values(columns[:, STATISTICS.index("match_score")])
        return np.column_stack([columns, p.astype(np.float32)])


def _padded(batch: Tensor, missing: int) -> Tensor:
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch
