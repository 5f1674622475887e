"""Batches of decoded pairs for training and for inference passes: streamed from the shards, or held in memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.stream import Preparer, stream_chunks
from noisyclean.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class Batch:
    """B decoded pairs.

    Attributes:
        rows: (B,) int64 rows of the corpus index.
        pixels: (B, H, W, 3) uint8.
        tokens: (B, context) int.
    """

    rows: Tensor
    pixels: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: Tensor | slice) -> Batch:
        """The pairs at these positions."""
        return Batch(self.rows[at], self.pixels[at], self.tokens[at])


class PairSource(Protocol):
    """Where decoded pairs come from. A pair that cannot be decoded is in no batch.

    Of several processes that share the pairs, each has a source of its own, which gives its part of every batch: maybe
    nothing, and maybe fewer batches than another's.
    """

    index: CorpusIndex

    def batches(self, rows: NDArray[np.int64], batch_size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        """The pairs of ``rows`` once each, in batches of ``batch_size``, the last one maybe smaller.

        Args:
            rows: rows of the index, without repetition.
            batch_size: pairs in a batch.
            shuffle: a seed; None: any fixed order.
        """


def in_batches(rows: Tensor, batch_size: int, shuffle: int | None) -> Iterator[Tensor]:
    """(R,) rows, in batches of ``batch_size``, the last one maybe smaller; ``shuffle`` is the seed of their order."""
    if shuffle is not None:
        generator = torch.Generator().manual_seed(shuffle)
        rows = rows[torch.randperm(len(rows), generator=generator)]
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


class StreamSource:
    """Decodes in worker processes on every pass; memory does not grow with the corpus."""

    def __init__(self, index: CorpusIndex, preparer: Preparer, *, workers: int, shuffle_buffer: int = 8192) -> None:
        self.index = index
        self._preparer = preparer
        self._workers = workers
        self._buffer = shuffle_buffer

    def batches(self, rows: NDArray[np.int64], batch_size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        if shuffle is None:
            yield from _rebatch(self._decoded(rows, order=None), batch_size)
        else:
            generator = torch.Generator().manual_seed(shuffle)
            order = torch.randperm(len(self.index.shards), generator=generator).numpy()
            yield from _rebatch(_shuffled(self._decoded(rows, order), self._buffer, generator), batch_size)

    def _decoded(self, rows: NDArray[np.int64], order: NDArray[np.int64] | None) -> Iterator[Batch]:
        index = self.index
        mask = np.zeros(len(index), np.bool_)
        mask[rows] = True
        first = {shard.name: int(index.offsets[i]) for i, shard in enumerate(index.shards)}
        wanted = {shard.name: mask[index.rows_at(i)] for i, shard in enumerate(index.shards)}
        shards = index.shards if order is None else [index.shards[i] for i in order]
        for chunk in stream_chunks(shards, self._preparer, chunk_size=256, workers=self._workers, wanted=wanted):
            index = chunk.rows["index"].to_numpy()[chunk.readable]
            if len(index):
                # Thousands of pairs are kept to be shuffled, or all: too many for a GPU that has decoded them.
                yield Batch(torch.from_numpy(first[chunk.shard] + index), chunk.image.cpu(), chunk.text)


class MemorySource:
    """Decodes once and keeps the pixels (uint8) and tokens of pairs."""

    def __init__(
        self, stream: StreamSource, *, rows: NDArray[np.int64] | None = None, progress: Progress = SILENT
    ) -> None:
        """``rows``: those to keep; None: all that are usable."""
        self.index = stream.index
        usable = np.flatnonzero(self.index.usable) if rows is None else rows
        self._pixels = self._tokens = torch.empty(0)
        # Where each row's picture and tokens are held; −1: nowhere, the pair could not be decoded.
        self._picture_at = torch.full((len(self.index),), -1, dtype=torch.int64)
        count = 0
        with progress.task("decoding the pairs", len(usable), "pairs") as task:
            for part in stream.batches(usable, 1024):
                if count == 0:
                    # Once and for all: joining the parts at the end would take the memory twice.
                    self._pixels = part.pixels.new_empty((len(usable), *part.pixels.shape[1:]))
                    self._tokens = part.tokens.new_empty((len(usable), *part.tokens.shape[1:]), dtype=torch.int32)
                here = slice(count, count + len(part))
                self._pixels[here], self._tokens[here] = part.pixels, part.tokens
                self._picture_at[part.rows] = torch.arange(here.start, here.stop)
                count += len(part)
                task.advance(len(part))
        self._tokens_at = self._picture_at

    def batches(self, rows: NDArray[np.int64], batch_size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        wanted = torch.from_numpy(np.sort(rows))
        for part in in_batches(wanted[self.holds(wanted)], batch_size, shuffle):
            yield self.pairs(part)

    def holds(self, rows: Tensor) -> Tensor:
        """(R,) rows → (R,) bool, whether each was to be kept and could be decoded."""
        return (self._picture_at[rows] >= 0) & (self._tokens_at[rows] >= 0)

    def pairs(self, rows: Tensor) -> Batch:
        """The pairs of (B,) rows that it holds."""
        return Batch(rows, self._pixels[self._picture_at[rows]], self._tokens[self._tokens_at[rows]])

    def with_pictures_of(self, rows: NDArray[np.int64], donors: NDArray[np.int64]) -> MemorySource:
        """This source, but row ``rows[i]`` shows the picture of row ``donors[i]``; the decoded pixels are shared."""
        changed = self._copy()
        changed.index.image[rows] = self.index.image[donors]
        changed._picture_at[rows] = self._picture_at[donors]
        return changed

    def with_captions_of(self, rows: NDArray[np.int64], donors: NDArray[np.int64]) -> MemorySource:
        """This source, but row ``rows[i]`` has the caption of row ``donors[i]``."""
        changed = self._copy()
        changed.index.caption[rows] = self.index.caption[donors]
        changed._tokens_at[rows] = self._tokens_at[donors]
        return changed

    def with_captions(self, rows: NDArray[np.int64], ids: NDArray[np.int64], tokens: Tensor) -> MemorySource:
        """This source, but row ``rows[i]`` has a caption of hash ``ids[i]`` and ``tokens[i]``, (R, context) int."""
        changed = self._copy()
        changed.index.caption[rows] = ids
        changed._tokens_at[rows] = torch.arange(len(self._tokens), len(self._tokens) + len(rows))
        changed._tokens = torch.cat([self._tokens, tokens.to(self._tokens.dtype)])
        return changed

    def _copy(self) -> MemorySource:
        other = copy.copy(self)
        other.index = replace(self.index, caption=self.index.caption.copy(), image=self.index.image.copy())
        other._picture_at, other._tokens_at = self._picture_at.clone(), self._tokens_at.clone()
        return other


def fits_in_memory(index: CorpusIndex, image_size: tuple[int, int], context_length: int, *, share: float = 1.0) -> bool:
    """Whether ``share`` of the decoded corpus takes less than a quarter of this machine's memory."""
    pair_bytes = 3 * image_size[0] * image_size[1] + 4 * context_length
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(index.usable.sum()) * pair_bytes * share < total / 4


def _concatenate(parts: list[Batch]) -> Batch:
    return Batch(
        torch.cat([part.rows for part in parts]),
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.tokens for part in parts]),
    )


def _rebatch(parts: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    pending: list[Batch] = []
    count = 0
    for part in parts:
        pending.append(part)
        count += len(part)
        if count >= batch_size:
            merged = _concatenate(pending)
            whole = count - count % batch_size
            for start in range(0, whole, batch_size):
                yield merged.take(slice(start, start + batch_size))
            pending, count = [merged.take(slice(whole, None))], count - whole
    if count:
        yield _concatenate(pending)


def _shuffled(parts: Iterator[Batch], buffer: int, generator: torch.Generator) -> Iterator[Batch]:
    pending: list[Batch] = []
    count = 0
    for part in parts:
        pending.append(part)
        count += len(part)
        if count >= buffer:
            merged = _permuted(_concatenate(pending), generator)
            # Half is kept, so that pairs of neighbouring shards keep mixing.
            yield merged.take(slice(buffer // 2, None))
            pending, count = [merged.take(slice(0, buffer // 2))], buffer // 2
    if count:
        yield _permuted(_concatenate(pending), generator)


def _permuted(batch: Batch, generator: torch.Generator) -> Batch:
    return batch.take(torch.randperm(len(batch), generator=generator))
