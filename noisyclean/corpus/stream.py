"""The decoded stream: worker processes read shards and hand over chunks of pairs ready for the model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from noisyclean.corpus.chunk import ROWS, Chunk
from noisyclean.corpus.decoding import UndecodableError
from noisyclean.corpus.identity import caption_id, image_id
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.shards import Sample, ShardReader
from noisyclean.errors import NoisycleanError


class Preparer(Protocol):
    """What makes model input of a picture and of captions (:class:`noisyclean.encoders.Preprocessor`)."""

    def pixels(self, data: bytes) -> tuple[NDArray[np.uint8], tuple[int, int]]: ...

    def tokens(self, captions: Sequence[str]) -> Tensor: ...


def stream_chunks(
    shards: Sequence[Shard],
    preparer: Preparer,
    *,
    chunk_size: int,
    workers: int,
    wanted: Mapping[str, NDArray[np.bool_]] | None = None,
    in_order: bool = True,
    niceness: int = 0,
) -> Iterator[Chunk]:
    """Decode ``shards`` in ``workers`` processes (0: in this one).

    Chunks of one shard come in order; those of different shards are interleaved. Nothing here depends on the number
    of workers but that interleaving.

    Args:
        wanted: for each shard a mask over its samples; others are left out altogether, without being decoded.
            Shards it does not name are skipped.
        in_order: whether shards are interleaved the same way at every call, the workers taking turns; else whoever is
            ready hands over, and nobody waits for a slow one.
        niceness: by how much the workers give way to other processes: above 0 where the model computes on the same
            cores, which then decode while it waits.
    """
    if wanted is not None:
        shards = [shard for shard in shards if shard.name in wanted and wanted[shard.name].any()]
    workers = min(workers, len(shards))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # more workers than cores is the caller's choice: decoding may wait for a network
        loader: DataLoader[Chunk | NoisycleanError] = DataLoader(
            _ChunkDataset(shards, preparer, chunk_size, wanted),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            in_order=in_order,
            worker_init_fn=partial(_give_way, niceness) if workers else None,
        )
    for chunk in loader:
        if isinstance(chunk, NoisycleanError):
            raise chunk
        yield chunk


def _give_way(niceness: int, worker: int) -> None:
    os.nice(niceness)


class _Picture(NamedTuple):
    """A picture's hash, and what the model takes: (H, W, 3) uint8."""

    id: int
    pixels: NDArray[np.uint8]


class _ChunkDataset(IterableDataset["Chunk | NoisycleanError"]):
    def __init__(
        self,
        shards: Sequence[Shard],
        preparer: Preparer,
        chunk_size: int,
        wanted: Mapping[str, NDArray[np.bool_]] | None,
    ) -> None:
        self.shards = shards
        self.preparer = preparer
        self.chunk_size = chunk_size
        self.wanted = wanted

    def __iter__(self) -> Iterator[Chunk | NoisycleanError]:
        info = get_worker_info()
        mine = self.shards if info is None else self.shards[info.id :: info.num_workers]
        try:
            for shard in mine:
                yield from self._read(shard)
        except NoisycleanError as error:
            yield error  # raised in a worker it would arrive as a traceback in words

    def _read(self, shard: Shard) -> Iterator[Chunk]:
        mask = None if self.wanted is None else self.wanted[shard.name]
        reader = ShardReader(shard)
        samples: list[Sample] = []
        pictures: list[_Picture] = []
        for sample in reader:
            if mask is not None and not (sample.index < len(mask) and mask[sample.index]):
                continue
            # Yielded before adding, so that the last chunk is never one too early.
            if len(samples) == self.chunk_size:
                yield self._chunk(shard, samples, pictures)
                samples, pictures = [], []
            if sample.fault is None:
                assert sample.image is not None
                try:
                    pixels, (width, height) = self.preparer.pixels(sample.image)
                    sample.width, sample.height = sample.width or width, sample.height or height
                    pictures.append(_Picture(image_id(sample.image), pixels))
                except UndecodableError as error:
                    sample.fault = str(error)
            sample.image = None
            samples.append(sample)
        yield self._chunk(shard, samples, pictures, last=True, damage=reader.damage)

    def _chunk(
        self,
        shard: Shard,
        samples: list[Sample],
        pictures: list[_Picture],
        *,
        last: bool = False,
        damage: str | None = None,
    ) -> Chunk:
        rows = [pa.array([getattr(sample, one.name) for sample in samples], one.type) for one in ROWS]
        captions = [sample.caption or "" for sample in samples if sample.fault is None]
        return Chunk(
            shard.name,
            pa.table(rows, schema=ROWS),
            np.array([caption_id(caption) for caption in captions], np.int64),
            np.array([picture.id for picture in pictures], np.int64),
            torch.from_numpy(np.stack([picture.pixels for picture in pictures])) if captions else torch.empty(0),
            self.preparer.tokens(captions) if captions else torch.empty(0),
            last,
            damage,
        )
