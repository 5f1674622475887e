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

from noisyclean.corpus.embeddings import EmbeddedChunk
from noisyclean.corpus.identity import caption_id, pair_id
from noisyclean.corpus.shards import Sample
from noisyclean.corpus.stream import Chunk
from noisyclean.manifest.schema import MEASURED, PART_SCHEMA, REMATCH, SAMPLE, STATISTICS
from noisyclean.scoring.folds import FoldMap
from noisyclean.scoring.reference import BankedEncoder

_FROM_SAMPLE = (*(name for name in SAMPLE if name != "shard"), "fault")
NOT_FINITE = "score is not finite"
_FOUND = (*MEASURED, *REMATCH)


@dataclass(frozen=True)
class NoEncoder:
    """Stands where an encoder would: the pairs come embedded. ``origin`` says by what, as far as that is known."""

    origin: str
    device: torch.device

    def inference(self) -> AbstractContextManager[None]:
        """No gradients."""
        return torch.inference_mode()

    def encode(self, image: Tensor, text: Tensor, /) -> tuple[Tensor, Tensor]:
        """Two (B, d) unit-norm float32 as they are, on the device."""
        return image.to(self.device), text.to(self.device)

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

    Pairs queue up for their model until there are ``width`` of them, whatever chunks and shards they come from. Every
    forward pass so has the same shape, and a pair's score does not depend on what it happened to come with: matrix
    products of other shapes are rounded otherwise.

    Attributes:
        samples: how many came in so far.
    """

    def __init__(self, scorer: Scorer, width: int, *, keep_embeddings: bool = False, rematch: bool = False) -> None:
        """``rematch``: whether the best partners of each pair are looked for, or else their columns are null."""
        self._scorer = scorer
        self._rematch = rematch
        self._queues = [
            _Queue(model, fold, width, keep_embeddings, rematch) for fold, model in enumerate(scorer.models)
        ]
        self._open: dict[str, _ShardRows] = {}
        self.samples = 0

    def add(self, chunk: Chunk | EmbeddedChunk) -> Iterator[ScoredShard]:
        """Take a chunk; yields the shards that it (or the passes it set off) completed."""
        shard = self._open.setdefault(chunk.shard, _ShardRows(chunk.shard))
        shard.read = chunk.last
        before = shard.count
        if isinstance(chunk, EmbeddedChunk):
            rows = chunk.rows
            ids, image, text = chunk.ids, torch.from_numpy(chunk.image), torch.from_numpy(chunk.text)
        else:
            rows = _sample_rows(chunk.samples)
            ids = np.array([caption_id(sample.caption or "") for sample in chunk.readable()], np.int64)
            image, text = chunk.pixels, chunk.tokens
            shard.damage = chunk.damage
        readable = shard.append(rows)
        pairs = self._pair_ids(chunk.shard, rows)
        self.samples += shard.count - before
        folds = self._scorer.fold_of(ids)
        shard.judges.append((readable, folds, self._scorer.is_in_sample(ids, chunk.shard)))
        for queue in self._queues:
            (at,) = np.nonzero(folds == queue.fold)
            if len(at):
                queue.add(_Waiting(shard, readable[at], ids[at], pairs[at], image[at], text[at]))
        yield from self._complete()

    def _pair_ids(self, shard: str, rows: pa.Table) -> NDArray[np.int64]:
        """Hashes of (shard, key) of the readable rows; zeros where nobody asks who is in the bank."""
        keys = rows["key"].filter(rows["fault"].is_null())
        if not self._rematch:
            return np.zeros(len(keys), np.int64)
        return np.array([pair_id(shard, key) for key in keys.to_pylist()], np.int64)

    def finish(self) -> Iterator[ScoredShard]:
        """Score what still waits; yields the last shards."""
        for queue in self._queues:
            queue.flush()
        yield from self._complete()

    def _complete(self) -> Iterator[ScoredShard]:
        for name in [name for name, rows in self._open.items() if rows.complete]:
            yield self._open.pop(name).scored()


def _sample_rows(samples: Sequence[Sample]) -> pa.Table:
    columns = {
        name: pa.array([getattr(sample, name) for sample in samples], PART_SCHEMA.field(name).type)
        for name in _FROM_SAMPLE
    }
    return pa.table(columns)


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

    def append(self, rows: pa.Table) -> NDArray[np.int64]:
        """Append the rows of a chunk; returns the places of the readable ones."""
        readable = self.count + np.flatnonzero(rows["fault"].is_null().to_numpy())
        self.rows.append(rows)
        self.count += rows.num_rows
        self.waiting += len(readable)
        return readable

    def scored(self) -> ScoredShard:
        fold = np.zeros(self.count, np.int64)
        in_sample = np.zeros(self.count, np.bool_)
        for at, folds, trained_on in self.judges:
            fold[at], in_sample[at] = folds, trained_on
        scores = np.full((self.count, len(_FOUND)), np.nan)
        for one in self.found:
            scores[one.at] = one.scores
        rows = pa.concat_tables(self.rows)
        # An overflow in half precision, or broken weights: of such a pair nothing is known.
        unknown = rows["fault"].is_null().to_numpy() & ~np.isfinite(scores[:, : len(STATISTICS)]).all(axis=1)
        scores[unknown] = np.nan
        columns = {name: rows[name] for name in _FROM_SAMPLE}
        columns["fault"] = pc.if_else(pa.array(unknown), NOT_FINITE, rows["fault"].combine_chunks())
        unreadable = columns["fault"].is_valid().to_numpy(zero_copy_only=False)
        columns["shard"] = pa.repeat(self.shard, self.count)
        columns["fold"] = pa.array(fold, PART_SCHEMA.field("fold").type, mask=unreadable)
        columns["in_sample"] = pa.array(in_sample, mask=unreadable)
        for i, name in enumerate(_FOUND):
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
    """What was found of some pairs of a shard; ``scores`` are the columns ``_FOUND``, NaN where there is nothing."""

    at: NDArray[np.int64]
    scores: NDArray[np.float64]  # which holds both float32 and places exactly
    embeddings: tuple[NDArray[np.float16], NDArray[np.float16]] | None


@dataclass(frozen=True)
class _Waiting:
    """Pairs of one shard that wait for one model.

    ``ids`` are hashes of captions, ``pairs`` of (shard, key); ``image`` and ``text`` are what the encoder takes.
    """

    shard: _ShardRows
    at: NDArray[np.int64]
    ids: NDArray[np.int64]
    pairs: NDArray[np.int64]
    image: Tensor
    text: Tensor

    def part(self, where: slice) -> _Waiting:
        at, ids, pairs = self.at[where], self.ids[where], self.pairs[where]
        return _Waiting(self.shard, at, ids, pairs, self.image[where], self.text[where])


@dataclass
class _Queue:
    model: BankedEncoder
    fold: int
    width: int
    keep_embeddings: bool
    rematch: bool
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
        image, text, scores = self._forward(
            torch.cat([one.image for one in self.waiting]),
            torch.cat([one.text for one in self.waiting]),
            np.concatenate([one.ids for one in self.waiting]),
            np.concatenate([one.pairs for one in self.waiting]),
        )
        # Converted once for the pass: what waits may be of many shards.
        halves = (_half(image), _half(text)) if self.keep_embeddings else None
        first = 0
        for one in self.waiting:
            here = slice(first, first + len(one.at))
            embeddings = None if halves is None else (halves[0][here], halves[1][here])
            one.shard.found.append(_Found(one.at, scores[here], embeddings))
            one.shard.waiting -= len(one.at)
            first = here.stop
        self.waiting, self.count = [], 0

    def _forward(
        self, image: Tensor, text: Tensor, ids: NDArray[np.int64], pairs: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
        """The embeddings and scores of a pass, padded to ``width`` with its last pair."""
        missing = self.width - len(ids)
        encoder, bank = self.model.encoder, self.model.bank
        rematched = np.full((len(ids), len(REMATCH)), np.nan)
        with encoder.inference():
            image, text = encoder.encode(_padded(image, missing), _padded(text, missing))
            padded = image, text, np.concatenate([ids, np.repeat(ids[-1:], missing)])
            if self.rematch:
                found, partners = bank.score_and_rematch(*padded)
                place = bank.places_of(ids, pairs)
                rematched[:, 0] = np.where(place >= 0, place, np.nan)
                rematched[:, 1:] = np.column_stack([one[: len(ids)].cpu().numpy() for one in partners])
            else:
                found = bank.score(*padded)
            columns = torch.stack([getattr(found, name) for name in STATISTICS], dim=1)[: len(ids)].cpu().numpy()
        score = columns[:, STATISTICS.index("match_score")]
        p = np.column_stack([bank.p_values(score), bank.near_miss_p_values(score)])
        return image, text, np.column_stack([columns, p, rematched])


def _padded(batch: Tensor, missing: int) -> Tensor:
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch


def _half(embeddings: Tensor) -> NDArray[np.float16]:
    found: NDArray[np.float16] = embeddings.half().cpu().numpy()
    return found
