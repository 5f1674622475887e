"""A first look at a corpus: which pairs there are, known by their hashes. No picture is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from noisyclean.corpus.identity import caption_id, image_id, pair_id
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.parallel import map_in_processes
from noisyclean.corpus.shards import ShardReader
from noisyclean.progress import SILENT, Progress

Int64: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class CorpusIndex:
    """All samples of a corpus, in order of shard name and position; row r of each array is one sample.

    Attributes:
        shards: the shards, in order.
        offsets: (len(shards) + 1,) int64; sample i of shard s is row ``offsets[s] + i``.
        pair: (N,) int64 hashes of (shard, key).
        caption, image: (N,) int64 hashes; 0 where the sample has none.
        usable: (N,) bool, whether the sample has an image and a caption (which may still fail to decode).
        damaged: shard name → what is wrong with its tar.
    """

    shards: list[Shard]
    offsets: Int64
    pair: Int64
    caption: Int64
    image: Int64
    usable: NDArray[np.bool_]
    damaged: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pair)

    def rows_at(self, position: int) -> slice:
        """The rows of the shard at ``position``."""
        return slice(int(self.offsets[position]), int(self.offsets[position + 1]))

    def fingerprint(self) -> str:
        """A digest of what the pairs are: equal for the same samples in the same shards."""
        digest = hashlib.blake2b(digest_size=16)
        for column in (self.pair, self.caption, self.image):
            digest.update(column.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _ShardIndex:
    hashes: Int64  # (n, 3): pair, caption, image
    usable: NDArray[np.bool_]
    damage: str | None


def index_corpus(shards: Sequence[Shard], *, workers: int, progress: Progress = SILENT) -> CorpusIndex:
    """Read every shard once, in worker processes; about 33 bytes of memory a sample.

    Raises:
        NoisycleanError: a shard cannot be opened.
    """
    parts = []
    with progress.task("reading the shards", len(shards), "shards") as task:
        for part in map_in_processes(_index_shard, shards, workers):
            parts.append(part)
            task.advance()
    hashes = np.concatenate([part.hashes for part in parts]) if parts else np.zeros((0, 3), np.int64)
    return CorpusIndex(
        shards=list(shards),
        offsets=np.cumsum([0, *(len(part.usable) for part in parts)], dtype=np.int64),
        pair=hashes[:, 0].copy(),
        caption=hashes[:, 1].copy(),
        image=hashes[:, 2].copy(),
        usable=np.concatenate([part.usable for part in parts]) if parts else np.zeros(0, np.bool_),
        damaged={shard.name: part.damage for shard, part in zip(shards, parts, strict=True) if part.damage is not None},
    )


def _index_shard(shard: Shard) -> _ShardIndex:
    reader = ShardReader(shard)
    hashes = []
    usable = []
    for sample in reader:
        hashes.append(
            (
                pair_id(sample.shard, sample.key),
                caption_id(sample.caption) if sample.caption else 0,
                image_id(sample.image) if sample.image else 0,
            )
        )
        usable.append(sample.fault is None)
    return _ShardIndex(np.array(hashes, np.int64).reshape(-1, 3), np.array(usable, np.bool_), reader.damage)
