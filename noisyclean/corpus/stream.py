"""The decoded stream: worker processes read shards and hand over chunks of pairs ready for the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from noisyclean.corpus.decoding import UndecodableError, decode_image
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.shards import Sample, ShardReader
from noisyclean.errors import NoisycleanError

if TYPE_CHECKING:
    from PIL.Image import Image


class Preparer(Protocol):
    """What makes model input of a picture and of captions (:class:`noisyclean.encoders.Preprocessor`)."""

    def pixels(self, image: Image) -> NDArray[np.uint8]: ...

    def tokens(self, captions: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive samples of one shard.

    Attributes:
        shard: the shard's name.
        samples: without their image bytes; a sample with a ``fault`` has no pixels.
        pixels: (R, H, W, 3) uint8, of the R readable samples in order.
        tokens: (R, context) int64.
        last: whether the shard ends with this chunk. Every shard ends with exactly one such chunk, maybe empty.
        damage: on the last chunk: what is wrong with the tar, if anything.
    """

    shard: str
    samples: list[Sample]
    pixels: Tensor
    tokens: Tensor
    last: bool
    damage: str | None = None

    def readable(self) -> list[Sample]:
        """The samples that ``pixels`` and ``tokens`` stand for."""
        return [sample for sample in self.samples if sample.fault is None]


def stream_chunks(
    shards: Sequence[Shard],
    preparer: Preparer,
    *,
    chunk_size: int,
    workers: int,
    wanted: Mapping[str, NDArray[np.bool_]] | None = None,
    pin_memory: bool = False,
) -> Iterator[Chunk]:
    """Decode ``shards`` in ``workers`` processes (0: in this one).

    Chunks of one shard come in order; those of different shards are interleaved. Nothing here depends on the number
    of workers but that interleaving.

    Args:
        wanted: for each shard a mask over its samples; others are left out altogether, without being decoded.
            Shards it does not name are skipped.
        pin_memory: whether tensors are put into page-locked memory, for faster copies to a GPU.
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
        )
    for chunk in loader:
        if isinstance(chunk, NoisycleanError):
            raise chunk
        yield (_pinned(chunk) if pin_memory else chunk)


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
        pixels: list[NDArray[np.uint8]] = []
        for sample in reader:
            if mask is not None and not (sample.index < len(mask) and mask[sample.index]):
                continue
            # Yielded before adding, so that the last chunk is never one too early.
            if len(samples) == self.chunk_size:
                yield self._chunk(shard, samples, pixels, last=False, damage=None)
                samples, pixels = [], []
            if sample.fault is None:
                assert sample.image is not None
                try:
                    picture = decode_image(sample.image)
                    sample.width, sample.height = sample.width or picture.width, sample.height or picture.height
                    pixels.append(self.preparer.pixels(picture))
                except UndecodableError as error:
                    sample.fault = str(error)
            sample.image = None
            samples.append(sample)
        yield self._chunk(shard, samples, pixels, last=True, damage=reader.damage)

    def _chunk(
        self, shard: Shard, samples: list[Sample], pixels: list[NDArray[np.uint8]], *, last: bool, damage: str | None
    ) -> Chunk:
        captions = [sample.caption or "" for sample in samples if sample.fault is None]
        if not captions:
            return Chunk(shard.name, samples, torch.empty(0, dtype=torch.uint8), torch.empty(0), last, damage)
        return Chunk(
            shard.name, samples, torch.from_numpy(np.stack(pixels)), self.preparer.tokens(captions), last, damage
        )


def _pinned(chunk: Chunk) -> Chunk:
    return Chunk(
        chunk.shard, chunk.samples, chunk.pixels.pin_memory(), chunk.tokens.pin_memory(), chunk.last, chunk.damage
    )
