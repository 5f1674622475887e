"""What is in a corpus: counts, sizes, captions, repetitions and damage, found without any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noisyclean.corpus.decoding import UndecodableError, decode_image
from noisyclean.corpus.identity import caption_id, image_id, pair_id
from noisyclean.corpus.locate import Shard, ShardSpec, find_shards, is_address
from noisyclean.corpus.parallel import default_workers, map_in_processes
from noisyclean.corpus.shards import ShardReader
from noisyclean.progress import SILENT, Progress

MOST_REPEATED = 5


@dataclass(frozen=True, slots=True)
class Spread:
    """The smallest, the middle and the largest of some values; each is one of them."""

    min: int
    median: int
    max: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What :func:`inspect` found. A spread is None where no pair is readable."""

    shards: int
    tar_bytes: int  # of the shards whose store tells their size
    damaged_shards: dict[str, str]  # shard → what is wrong with it
    samples: int
    readable: int
    unreadable: dict[str, int]  # reason → samples, the commonest first
    with_uid: int
    with_url: int
    duplicate_uids: int  # samples whose uid an earlier one had
    image_formats: dict[str, int]  # Pillow's name for the format, whatever the extension → readable pairs
    image_bytes: Spread | None
    width: Spread | None
    height: Spread | None
    caption_characters: Spread | None
    caption_words: Spread | None
    distinct_captions: int
    repeated_captions: list[tuple[str, int]]  # (caption, times), at most ``MOST_REPEATED``, the commonest first
    repeated_caption_share: float  # of the readable pairs, those whose caption another pair has too
    repeated_image_share: float  # the same for images, byte for byte

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types that json takes."""
        return asdict(self)


def inspect(shards: ShardSpec, *, workers: int | None = None, progress: Progress = SILENT) -> Inspection:
    """Read every sample and decode every image, in ``workers`` processes (default: one a core).

    Exact, not sampled. It holds 72 bytes a pair (hashes and sizes), however long the captions are; the texts of the
    most repeated ones are read again once they are known. Captions that differ in case or spacing only are the same.

    Raises:
        UsageError: nothing matches ``shards``.
        NoisycleanError: a shard cannot be opened.
    """
    found = find_shards(shards)
    workers = workers or default_workers()
    contents: list[_Contents] = []
    with progress.task("inspecting shards", len(found), "shards") as task:
        for content in map_in_processes(_look_into, found, workers):
            contents.append(content)
            task.advance()
    return _sum_up(found, contents)


@dataclass(frozen=True, slots=True)
class _Contents:
    """What one shard holds."""

    samples: int
    tar_bytes: int
    damage: str | None
    unreadable: Counter[str]
    formats: Counter[str]
    with_url: int
    uids: NDArray[np.int64]  # hashes, of all samples that have one
    pairs: NDArray[np.int64]  # (readable, 8); columns as in ``_COLUMNS``


_COLUMNS = ("index", "caption", "image", "image_bytes", "width", "height", "characters", "words")


def _look_into(shard: Shard) -> _Contents:
    samples = with_url = 0
    unreadable: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    uids: list[int] = []
    pairs: list[tuple[int, ...]] = []
    reader = ShardReader(shard)
    for sample in reader:
        samples += 1
        with_url += sample.url is not None
        if sample.uid is not None:
            uids.append(pair_id("", sample.uid))
        image, caption = sample.image, sample.caption
        if sample.fault is not None or image is None or caption is None:
            unreadable[sample.fault or "no pair"] += 1
            continue
        try:
            width, height = decode_image(image).size
        except UndecodableError as error:
            unreadable[str(error)] += 1
            continue
        formats[_format(image)] += 1
        hashes = caption_id(caption), image_id(image)
        pairs.append((sample.index, *hashes, len(image), width, height, len(caption), len(caption.split())))
    return _Contents(
        samples=samples,
        tar_bytes=_tar_bytes(shard),
        damage=reader.damage,
        unreadable=unreadable,
        formats=formats,
        with_url=with_url,
        uids=np.array(uids, np.int64),
        pairs=np.array(pairs, np.int64).reshape(-1, len(_COLUMNS)),
    )


def _format(image: bytes) -> str:
    """The format of an image that is known to decode; reads its header only."""
    import io
    import warnings

    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a picture that the decoder has just accepted
        return Image.open(io.BytesIO(image)).format or "unknown"


def _tar_bytes(shard: Shard) -> int:
    if is_address(shard.path):
        from noisyclean.corpus.remote import look_up

        return look_up(shard.path).size
    try:
        return Path(shard.path).stat().st_size
    except OSError:
        return 0  # the reader says what is wrong with the shard


def _sum_up(shards: Sequence[Shard], contents: Sequence[_Contents]) -> Inspection:
    pairs = dict(zip(_COLUMNS, np.concatenate([one.pairs for one in contents]).T, strict=True))
    uids = np.concatenate([one.uids for one in contents])
    values, first, times = np.unique(pairs["caption"], return_index=True, return_counts=True)
    top = [at for at in np.lexsort((first, -times))[:MOST_REPEATED] if times[at] > 1]
    return Inspection(
        shards=len(shards),
        tar_bytes=sum(one.tar_bytes for one in contents),
        damaged_shards={
            shard.name: one.damage for shard, one in zip(shards, contents, strict=True) if one.damage is not None
        },
        samples=sum(one.samples for one in contents),
        readable=len(pairs["index"]),
        unreadable=_total(one.unreadable for one in contents),
        with_uid=len(uids),
        with_url=sum(one.with_url for one in contents),
        duplicate_uids=len(uids) - len(np.unique(uids)),
        image_formats=_total(one.formats for one in contents),
        image_bytes=_spread(pairs["image_bytes"]),
        width=_spread(pairs["width"]),
        height=_spread(pairs["height"]),
        caption_characters=_spread(pairs["characters"]),
        caption_words=_spread(pairs["words"]),
        distinct_captions=len(values),
        repeated_captions=[
            (caption, int(times[at]))
            for caption, at in zip(_captions_at(shards, contents, [int(first[at]) for at in top]), top, strict=True)
        ],
        repeated_caption_share=_repeated_share(times),
        repeated_image_share=_repeated_share(np.unique(pairs["image"], return_counts=True)[1]),
    )


def _captions_at(shards: Sequence[Shard], contents: Sequence[_Contents], pairs: Sequence[int]) -> list[str]:
    """Read the captions of a few readable pairs, numbered through the whole corpus, again."""
    ends = np.cumsum([len(one.pairs) for one in contents])
    captions = []
    for pair in pairs:
        at = int(np.searchsorted(ends, pair, side="right"))
        index = contents[at].pairs[pair - ends[at], 0]  # counted from the end of the shard's pairs
        captions.append(next((one.caption or "" for one in ShardReader(shards[at]) if one.index == index), ""))
    return captions


def _total(counts: Iterable[Counter[str]]) -> dict[str, int]:
    return dict(sum(counts, Counter[str]()).most_common())


def _spread(values: NDArray[np.int64]) -> Spread | None:
    if len(values) == 0:
        return None
    low, middle, high = np.quantile(values, [0, 0.5, 1], method="nearest").tolist()
    return Spread(int(low), int(middle), int(high))


def _repeated_share(times: NDArray[np.int64]) -> float:
    """The share of pairs that hold a value which occurs more than once, from how often each value occurs."""
    return float(times[times > 1].sum() / times.sum()) if len(times) else 0.0
