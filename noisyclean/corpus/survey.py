"""What a corpus holds, as far as planting noise needs to know: one pass over all shards, nothing decoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from noisyclean.corpus.identity import caption_id, image_id
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.parallel import map_in_processes
from noisyclean.corpus.shards import IMAGE_FAULTS, METADATA_EXTENSION, ShardReader, read_metadata, to_sample
from noisyclean.progress import Progress

IMAGE_INDEX = "image_index"
"""The metadata field with the number of a pair's image in the files of a benchmark; ``convert`` writes it."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """All N samples in the order of the shards."""

    shards: list[Shard]
    starts: NDArray[np.int64]  # (len(shards) + 1,); the samples of shard s are starts[s] to starts[s + 1]
    keys: list[str]
    captioned: NDArray[np.bool_]  # (N,) whether nothing is wrong, save perhaps with the image
    pictured: NDArray[np.bool_]  # (N,) whether there is an image
    captions: NDArray[np.int64]  # (N,) hashes
    images: NDArray[np.int64]  # (N,) hashes
    image_index: NDArray[np.int64]  # (N,) the number of the image where ``IMAGE_INDEX`` states it, else -1
    texts: list[str]  # the captions of all N, or none at all

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(N,) whether a sample is a pair."""
        return self.captioned & self.pictured

    def places(self) -> Iterable[Place]:
        for number, (start, stop) in enumerate(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)):
            yield Place(number, start, stop)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a shard stands in the corpus: its number, and its samples' rows."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _ShardSurvey:
    keys: list[str]
    facts: NDArray[np.int64]  # (n, 5): captioned, pictured, caption, image, image index
    texts: list[str]


def survey(shards: list[Shard], *, with_text: bool, workers: int, progress: Progress) -> Corpus:
    """Read all shards; ``with_text`` keeps the captions themselves.

    Raises:
        NoisycleanError: a shard cannot be opened.
    """
    parts: list[_ShardSurvey] = []
    with progress.task("reading shards", len(shards), "shards") as task:
        for part in map_in_processes(partial(_survey_shard, with_text=with_text), shards, workers):
            parts.append(part)
            task.advance()
    captioned, pictured, captions, images, image_index = np.concatenate([part.facts for part in parts]).T
    return Corpus(
        shards=shards,
        starts=np.cumsum([0, *(len(part.keys) for part in parts)], dtype=np.int64),
        keys=[key for part in parts for key in part.keys],
        captioned=captioned.astype(np.bool_),
        pictured=pictured.astype(np.bool_),
        captions=captions,
        images=images,
        image_index=image_index,
        texts=[text for part in parts for text in part.texts],
    )


def _survey_shard(shard: Shard, with_text: bool) -> _ShardSurvey:
    keys: list[str] = []
    facts: list[tuple[int, ...]] = []
    texts: list[str] = []
    for raw in ShardReader(shard).members():
        sample = to_sample(shard.name, raw)
        caption, image = sample.caption or "", sample.image or b""
        captioned = bool(caption) and (sample.fault is None or sample.fault in IMAGE_FAULTS)
        number = read_metadata(raw.members.get(METADATA_EXTENSION)).get(IMAGE_INDEX)
        number = number if isinstance(number, int) and 0 <= number < 2**62 else -1
        keys.append(sample.key)
        facts.append((captioned, bool(image), caption_id(caption), image_id(image), number))
        if with_text:
            texts.append(caption)
    return _ShardSurvey(keys, np.array(facts, np.int64).reshape(-1, 5), texts)
