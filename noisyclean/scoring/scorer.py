"""Scoring a stream of pairs, decoded or embedded: one row a sample, readable or not, gathered shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.corpus.chunk import ROWS, Chunk
from noisyclean.corpus.identity import pair_id
from noisyclean.manifest.schema import PART_SCHEMA, STATISTICS
from noisyclean.scoring.folds import FoldMap
from noisyclean.scoring.reference import BankedEncoder
from noisyclean.scoring.window import FOUND, Window

NOT_FINITE = "score is not finite"


@dataclass(frozen=True)
class NoEncoder:
    """Stands where an encoder would: the pairs come embedded. ``origin`` says by what, as far as that is known."""

    origin: str
    device: torch.device

    def inference(self) -> AbstractContextManager[None]:
        """No gradients."""
        return torch.inference_mode()

    def encode_image(self, image: Tensor, /) -> Tensor:
        """(B, d) unit-norm float32 as they are, on the device."""
        return image.to(self.device)

    def encode_text(self, text: Tensor, /) -> Tensor:
        """(B, d) unit-norm float32 as they are, on the device."""
        return text.to(self.device)

    def text_lengths(self, text: Tensor, /) -> NDArray[np.int64]:
        """(B,) zeros: there is no context to fill."""
        return np.zeros(len(text), np.int64)

    def fingerprint(self) -> str:
        """The origin: there are no weights to digest."""
        return self.origin


@dataclass(frozen=True)
class ScoredShard:
    """All rows of one shard, as :data:`noisyclean.manifest.schema.PART_SCHEMA` has them.

    Attributes:
        embeddings: of images and of texts, two (R, d) float16 of the R readable rows in order; R = 0 where they are
            not kept.
    """

    shard: str
    table: pa.Table
    damage: str | None
    embeddings: tuple[NDArray[np.float16], NDArray[np.float16]]


class Scorer:
    """The models of all folds; says which one scores a pair."""

    def __init__(
        self, models: Sequence[BankedEncoder], folds: FoldMap | None, fitted: Collection[str] | None = None
    ) -> None:
        """What scores, and what it was fitted to.

        Args:
            folds: maps captions to models; None: there is only one model, which trained on none of the pairs.
            fitted: names of the shards that were fitted; None: all are taken to be.
        """
        if folds is None and len(models) != 1:
            raise ValueError("several models need a fold map")
        self.models = list(models)
        self.folds = folds
        self._fitted = fitted

    def fold_of(self, captions: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) caption hashes → (N,) indices of models."""
        return np.zeros(len(captions), np.int64) if self.folds is None else self.folds.fold_of(captions)

    def is_in_sample(self, captions: NDArray[np.int64], shard: str) -> NDArray[np.bool_]:
        """(N,) caption hashes of pairs of a shard → (N,) whether the model that scores them has trained on them."""
        if self.folds is None or (self._fitted is not None and shard not in self._fitted):
            return np.zeros(len(captions), np.bool_)
        return self.folds.is_in_sample(captions)

    def mismatches(self) -> pa.Table:
        """The known mismatches of all banks, as :data:`noisyclean.manifest.nulls.NULLS_SCHEMA` has them."""
        parts = []
        for fold, model in enumerate(self.models):
            known = model.bank.mismatches()
            parts.append(known.add_column(0, "fold", pa.repeat(pa.scalar(fold, pa.int32()), known.num_rows)))
        return pa.concat_tables(parts)

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

    Pairs wait in the window of their model, whatever chunks and shards they come from (:mod:`~.window`).

    Attributes:
        samples: how many came in so far.
    """

    def __init__(self, scorer: Scorer, width: int, *, keep_embeddings: bool = False, rematch: bool = False) -> None:
        """``rematch``: whether the best partners of each pair are looked for, or else their columns are null."""
        self._scorer = scorer
        self._rematch = rematch
        self._queues = [_Queue(Window(model, width, rematch=rematch), keep_embeddings) for model in scorer.models]
        self._open: dict[str, _ShardRows] = {}
        self.samples = 0

    def add(self, chunk: Chunk) -> Iterator[ScoredShard]:
        """Take a chunk; yields the shards that it (or the passes it set off) completed."""
        shard = self._open.setdefault(chunk.shard, _ShardRows(chunk.shard))
        shard.read, shard.damage = chunk.last, chunk.damage
        readable = shard.append(chunk)
        self.samples += chunk.rows.num_rows
        pairs = self._pair_ids(chunk)
        folds = self._scorer.fold_of(chunk.caption_ids)
        shard.judges.append((readable, folds, self._scorer.is_in_sample(chunk.caption_ids, chunk.shard)))
        for fold, queue in enumerate(self._queues):
            (at,) = np.nonzero(folds == fold)
            queue.add(shard, readable, chunk, pairs, at)
        yield from self._complete()

    def _pair_ids(self, chunk: Chunk) -> NDArray[np.int64]:
        """Hashes of (shard, key) of the readable rows; zeros where nobody asks who is in the bank."""
        keys = chunk.rows["key"].filter(pa.array(chunk.readable))
        if not self._rematch:
            return np.zeros(len(keys), np.int64)
        return np.array([pair_id(chunk.shard, key) for key in keys.to_pylist()], np.int64)

    def finish(self) -> Iterator[ScoredShard]:
        """Score what still waits; yields the last shards."""
        for queue in self._queues:
            queue.flush()
        yield from self._complete()

    def _complete(self) -> Iterator[ScoredShard]:
        for name in [name for name, rows in self._open.items() if rows.complete]:
            yield self._open.pop(name).scored()


@dataclass
class _ShardRows:
    """The rows of one shard as they fill up."""

    shard: str
    rows: list[pa.Table] = field(default_factory=list)
    count: int = 0
    judges: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]] = field(default_factory=list)
    found: list[_Found] = field(default_factory=list)
    waiting: int = 0
    read: bool = False
    damage: str | None = None

    @property
    def complete(self) -> bool:
        return self.read and self.waiting == 0

    def append(self, chunk: Chunk) -> NDArray[np.int64]:
        """Append the rows of a chunk; returns the places of the readable ones."""
        readable = self.count + np.flatnonzero(chunk.readable)
        self.rows.append(chunk.rows)
        self.count += chunk.rows.num_rows
        self.waiting += len(readable)
        return readable

    def scored(self) -> ScoredShard:
        fold = np.zeros(self.count, np.int64)
        in_sample = np.zeros(self.count, np.bool_)
        for at, folds, trained_on in self.judges:
            fold[at], in_sample[at] = folds, trained_on
        scores = np.full((self.count, len(FOUND)), np.nan)
        for one in self.found:
            scores[one.at] = one.scores
        rows = pa.concat_tables(self.rows)
        # An overflow in half precision, or broken weights: of such a pair nothing is known.
        unknown = rows["fault"].is_null().to_numpy() & ~np.isfinite(scores[:, : len(STATISTICS)]).all(axis=1)
        scores[unknown] = np.nan
        columns = {name: rows[name] for name in ROWS.names}
        columns["fault"] = pc.if_else(pa.array(unknown), NOT_FINITE, rows["fault"].combine_chunks())
        unreadable = columns["fault"].is_valid().to_numpy(zero_copy_only=False)
        columns["shard"] = pa.repeat(self.shard, self.count)
        columns["fold"] = pa.array(fold, PART_SCHEMA.field("fold").type, mask=unreadable)
        columns["in_sample"] = pa.array(in_sample, mask=unreadable)
        for i, name in enumerate(FOUND):
            columns[name] = pa.array(scores[:, i], mask=np.isnan(scores[:, i])).cast(PART_SCHEMA.field(name).type)
        table = pa.table([columns[name] for name in PART_SCHEMA.names], schema=PART_SCHEMA)
        return ScoredShard(self.shard, table, self.damage, self._embeddings())

    def _embeddings(self) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Those that were kept, in the order of the rows."""
        order = np.argsort(np.concatenate([np.zeros(0, np.int64), *(one.at for one in self.found)]))
        none = np.zeros((0, 0), np.float16)
        kept = [one.embeddings for one in self.found if one.embeddings is not None]
        if not kept:
            return none, none
        image, text = (np.concatenate(side)[order] for side in zip(*kept, strict=True))
        return image, text


@dataclass(frozen=True)
class _Found:
    """What was found of some pairs of a shard: the columns ``FOUND``, and the embeddings where they are kept."""

    at: NDArray[np.int64]
    scores: NDArray[np.float64]
    embeddings: tuple[NDArray[np.float16], NDArray[np.float16]] | None


class _Queue:
    """The window of one model, and where in their shards its pairs belong."""

    def __init__(self, window: Window, keep_embeddings: bool) -> None:
        self._window = window
        self._keep_embeddings = keep_embeddings
        self._waiting: list[tuple[_ShardRows, NDArray[np.int64]]] = []

    def add(
        self, shard: _ShardRows, rows: NDArray[np.int64], chunk: Chunk, pairs: NDArray[np.int64], at: NDArray[np.int64]
    ) -> None:
        """Take the readable pairs ``at`` of a chunk; ``rows`` says where in the shard each readable one lies."""
        while len(at):
            now, at = np.split(at, [self._window.room])
            self._window.add(chunk, pairs, now)
            self._waiting.append((shard, rows[now]))
            if self._window.room == 0:
                self.flush()

    def flush(self) -> None:
        """Score what waits, and hand each shard its own."""
        if not self._waiting:
            return
        found = self._window.scores()
        # Converted once for the window: what waits may be of many shards.
        halves = (_half(found.image), _half(found.text)) if self._keep_embeddings else None
        first = 0
        for shard, at in self._waiting:
            here = slice(first, first + len(at))
            embeddings = None if halves is None else (halves[0][here], halves[1][here])
            shard.found.append(_Found(at, found.columns[here], embeddings))
            shard.waiting -= len(at)
            first = here.stop
        self._waiting = []


def _half(embeddings: Tensor) -> NDArray[np.float16]:
    found: NDArray[np.float16] = embeddings.half().cpu().numpy()
    return found
