"""Which process of a training takes which pairs: none is lost, and none comes twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from noisyclean.corpus.source import Batch, MemorySource, StreamSource, in_batches
from noisyclean.progress import SILENT, Progress
from noisyclean.training.distributed import World


class SharedStream:
    """A stream of which each process reads a stretch of the pairs, in the order of the shards.

    Stretches are as long as a process's share of every batch, so that all end together: but for the pairs that cannot
    be decoded, of which all learn as they are come upon. Each process opens its own shards only, of which it shares no
    more than the first and the last with others.
    """

    def __init__(self, stream: StreamSource, world: World) -> None:
        self.index = stream.index
        self._stream = stream
        self._world = world
        self._readable = np.ones(len(self.index), bool)
        self._unread = np.empty(0, np.int64)  # what was come upon here since the others were told

    def batches(self, rows: NDArray[np.int64], batch_size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        for unread in self._world.everyone(self._unread):
            self._readable[unread] = False
        rows = np.sort(rows)
        # Where each readable row is; what is not goes with the one before it.
        at = np.append(np.flatnonzero(self._readable[rows]), len(rows))
        at[0] = 0
        whole, left = divmod(len(at) - 1, batch_size)
        share, rest = self._world.share(batch_size), self._world.share(left)
        own = rows[at[whole * share.start + rest.start] : at[whole * share.stop + rest.stop]]
        given = [np.empty(0, np.int64)]
        for batch in self._stream.batches(own, max(share.stop - share.start, 1), shuffle=shuffle):
            given.append(batch.rows.numpy())
            yield batch
        self._unread = np.setdiff1d(own, np.concatenate(given))


class SharedMemory:
    """Pairs that are each decoded and kept by one process, which embeds them wherever they come up.

    The batches are those of one process with all pairs in memory. Of each, a process has those that it keeps: the same
    number as the others on average.
    """

    def __init__(self, stream: StreamSource, world: World, *, progress: Progress = SILENT) -> None:
        self.index = stream.index
        usable = np.flatnonzero(self.index.usable)
        own = usable[world.share(len(usable))]
        self._kept = MemorySource(stream, rows=own, progress=progress)
        self._known = torch.zeros(len(self.index), dtype=torch.bool)
        for decoded in world.everyone(own[self._kept.holds(torch.from_numpy(own)).numpy()]):
            self._known[decoded] = True

    def batches(self, rows: NDArray[np.int64], batch_size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        wanted = torch.from_numpy(np.sort(rows))
        for part in in_batches(wanted[self._known[wanted]], batch_size, shuffle):
            yield self._kept.pairs(part[self._kept.holds(part)])
