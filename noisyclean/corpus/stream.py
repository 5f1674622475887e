"""The decoded stream: worker processes read shards and hand over chunks of pairs ready for the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.corpus.chunk import ROWS, Chunk
from noisyclean.corpus.decoding import Encoded, UndecodableError, decode_apart
from noisyclean.corpus.identity import caption_id, image_id
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.parallel import LIVES, LostError, map_in_threads, read_in_processes
from noisyclean.corpus.shards import Sample, ShardReader
from noisyclean.errors import NoisycleanError


class Preparer(Protocol):
    """What makes model input of a picture and of captions (:class:`noisyclean.encoders.Preprocessor`)."""

    def prepare(self, data: bytes) -> tuple[NDArray[np.uint8], tuple[int, int]] | Encoded: ...

    def finish(self, pixels: Tensor, jpegs: Mapping[int, Encoded]) -> tuple[Tensor, dict[int, str]]: ...

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
    """Decode ``shards`` in ``workers`` processes (0: in this one); in this one what the preparer is to ``finish``.

    Chunks of one shard come in order; those of different shards are interleaved. Nothing here depends on the number
    of workers but that interleaving. A worker that is killed or hangs is replaced; a picture that always ends its
    worker is all that is lost by it.

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
    reader = _ChunkReader(preparer, chunk_size, wanted)
    workers = min(workers, len(shards))
    # One chunk is finished in a thread while the caller has the one before it: a GPU then decodes beside the model.
    finished = partial(_finished, preparer=preparer)
    if not workers:
        yield from map_in_threads(finished, chain.from_iterable(map(reader.read, shards)), threads=1)
        return
    parts = read_in_processes(reader.read, shards, workers, in_order=in_order, prepare=partial(_give_way, niceness))
    try:
        yield from map_in_threads(finished, parts, threads=1)
    except LostError as error:
        raise NoisycleanError(
            f"{error.item}: the process that decodes it {error}, {LIVES} times in a row; "
            "if memory is short, repeat the command with fewer workers"
        ) from error


def _give_way(niceness: int) -> None:
    os.nice(niceness)
    torch.set_num_threads(1)  # there is a process for every core


class _Picture(NamedTuple):
    """A picture's hash, and what the model takes, (H, W, 3) uint8, or what that is still to be made of."""

    id: int
    content: NDArray[np.uint8] | Encoded


class _Part(NamedTuple):
    """A chunk for another process: what is in its tensors comes beside it, as torch would send it by shared memory.

    Attributes:
        pixels: (D, H, W, 3) uint8, of the pictures that are decoded.
        data: (n,) uint8, the JPEGs that are not, one behind the other: few large arrays are received sooner.
        jpegs: for each of these its place among the R, where it ends in ``data``, and its (width, height).
        text: (R, context) int64.
    """

    chunk: Chunk
    pixels: NDArray[np.uint8]
    data: NDArray[np.uint8]
    jpegs: list[tuple[int, int, tuple[int, int]]]
    text: NDArray[np.int64]


def _finished(part: _Part, preparer: Preparer) -> Chunk:
    """The chunk with its tensors."""
    each = np.split(part.data, [end for _, end, _ in part.jpegs])
    jpegs = {place: Encoded(data, size) for (place, _, size), data in zip(part.jpegs, each, strict=False)}
    image, faults = preparer.finish(torch.from_numpy(part.pixels), jpegs)
    return replace(part.chunk, image=image, text=torch.from_numpy(part.text)).with_faults(faults)


_NOTHING = torch.empty(0)


class _ChunkReader:
    """Reads shards, a chunk at a time."""

    def __init__(self, preparer: Preparer, chunk_size: int, wanted: Mapping[str, NDArray[np.bool_]] | None) -> None:
        self.preparer = preparer
        self.chunk_size = chunk_size
        self.wanted = wanted

    def read(self, shard: Shard, skip: int = 0, careful: bool = False) -> Iterator[_Part]:
        """The chunks of a shard but for the first ``skip``, of which nothing is decoded.

        Of the next, if ``careful``, each picture is decoded in a process of its own.
        """
        prepare = partial(decode_apart, self.preparer.prepare) if careful else self.preparer.prepare
        mask = None if self.wanted is None else self.wanted[shard.name]
        reader = ShardReader(shard)
        samples: list[Sample] = []
        pictures: list[_Picture] = []
        for sample in reader:
            if mask is not None and not (sample.index < len(mask) and mask[sample.index]):
                continue
            # Yielded before adding, so that the last chunk is never one too early.
            if len(samples) == self.chunk_size:
                if skip:
                    skip -= 1
                else:
                    yield self._part(shard, samples, pictures)
                    prepare = self.preparer.prepare
                samples, pictures = [], []
            if sample.fault is None and not skip:
                assert sample.image is not None
                try:
                    prepared = prepare(sample.image)
                    content, (width, height) = prepared
                    sample.width, sample.height = sample.width or width, sample.height or height
                    left = prepared if isinstance(prepared, Encoded) else content
                    pictures.append(_Picture(image_id(sample.image), left))
                except UndecodableError as error:
                    sample.fault = str(error)
            sample.image = None
            samples.append(sample)
        if not skip:
            yield self._part(shard, samples, pictures, last=True, damage=reader.damage)

    def _part(
        self,
        shard: Shard,
        samples: list[Sample],
        pictures: list[_Picture],
        *,
        last: bool = False,
        damage: str | None = None,
    ) -> _Part:
        rows = [pa.array([getattr(sample, one.name) for sample in samples], one.type) for one in ROWS]
        captions = [sample.caption or "" for sample in samples if sample.fault is None]
        chunk = Chunk(
            shard.name,
            pa.table(rows, schema=ROWS),
            np.array([caption_id(caption) for caption in captions], np.int64),
            np.array([picture.id for picture in pictures], np.int64),
            _NOTHING,
            _NOTHING,
            last,
            damage,
        )
        contents = [picture.content for picture in pictures]
        decoded = [one for one in contents if not isinstance(one, Encoded)]
        left = [(place, one) for place, one in enumerate(contents) if isinstance(one, Encoded)]
        ends = np.cumsum([len(one.data) for _, one in left]).tolist()
        return _Part(
            chunk,
            np.stack(decoded) if decoded else np.empty(0, np.uint8),
            np.concatenate([np.empty(0, np.uint8), *(one.data for _, one in left)]),
            [(place, end, one.size) for (place, one), end in zip(left, ends, strict=True)],
            self.preparer.tokens(captions).numpy() if captions else np.empty(0, np.int64),
        )
