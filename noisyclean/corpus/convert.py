"""Benchmarks in their own layouts made into shards, as img2dataset would have written them."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import get_args

from noisyclean.corpus.exchange import check_target
from noisyclean.corpus.layouts import Layout, Pair, read_cc, read_karpathy
from noisyclean.corpus.shards import IMAGE_EXTENSIONS, add_member
from noisyclean.corpus.survey import IMAGE_INDEX
from noisyclean.errors import UsageError
from noisyclean.files import local_place
from noisyclean.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written."""

    shards: int
    samples: int
    images: int
    missing: int
    """How many of the images could not be read."""


def convert(
    annotations: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    layout: Layout,
    splits: Sequence[str] = ("train",),
    captions: int = 5,
    shard_size: int = 10_000,
    progress: Progress = SILENT,
) -> Conversion:
    """Write the benchmark of ``annotations`` and the folder ``images`` to ``out`` as shards of ``shard_size`` samples.

    One sample a caption, in the order of :mod:`noisyclean.corpus.layouts`: the file of the image as it is, the caption
    as ``txt``, and a ``json`` with the ``caption``, ``image`` (its name), ``image_index`` (its number, as noise index
    files have it), and ``split`` and ``sentid``, or ``url``. An image that is missing, empty or cannot be read leaves
    its samples without one, so that every later command counts them, as unreadable; one that merely cannot be decoded
    is copied.

    Args:
        layout: ``karpathy`` or ``cc``; ``splits`` and ``captions`` (of each image) are for the former only.

    Raises:
        UsageError: no such file or folder, another layout, a split that is not there, no image that is there, or an
            ``out`` that holds shards.
    """
    annotations, images, out = Path(annotations), Path(images), local_place(out)
    if layout not in get_args(Layout):
        raise UsageError(f"{layout}: no such layout; there are {', '.join(get_args(Layout))}")
    if not annotations.is_file():
        raise UsageError(f"{annotations}: no such annotation file")
    if not images.is_dir():
        raise UsageError(f"{images}: no such folder of images")
    check_target([], out)
    pairs = (
        read_karpathy(annotations, images, splits, captions) if layout == "karpathy" else read_cc(annotations, images)
    )

    out.mkdir(parents=True, exist_ok=True)
    # Everything is made in a folder inside ``out`` and moved at the end: an interrupted run leaves no shards behind.
    with tempfile.TemporaryDirectory(dir=out, prefix=".convert-") as name:
        folder = Path(name)
        done = _write(_with_images(pairs), folder, shard_size, progress)
        if done.images == done.missing:
            raise UsageError(
                f"{images}: holds none of the {done.images:,} images that {annotations} names; give their folder"
            )
        for path in sorted(folder.iterdir()):
            path.replace(out / f"{path.stem}.tar")
    if done.missing:
        progress.say(f"{done.missing:,} of {done.images:,} images could not be read; their pairs have none")
    return done


@dataclass(slots=True)
class _Sample:
    pair: Pair
    image: bytes | None
    is_first: bool
    """Whether no earlier sample has the same image."""


def _with_images(pairs: Iterable[Pair]) -> Iterator[_Sample]:
    for _, captions in groupby(pairs, key=lambda pair: pair.image_index):
        image, is_first = None, True
        for pair in captions:
            if is_first:
                image = _read(pair.image)
            yield _Sample(pair, image, is_first)
            is_first = False


def _read(path: Path | None) -> bytes | None:
    try:
        return (path.read_bytes() if path else None) or None
    except OSError:
        return None


def _write(samples: Iterator[_Sample], folder: Path, shard_size: int, progress: Progress) -> Conversion:
    """Write the shards as ``NNNNN.part``; the keys are img2dataset's, shard and place in it."""
    shards = pairs = images = missing = 0
    digits = max(4, len(str(shard_size - 1)))
    with progress.task("writing pairs", None, "pairs") as task:
        while first := next(samples, None):
            with tarfile.open(folder / f"{shards:05}.part", "w") as tar:
                for place, sample in enumerate(chain([first], islice(samples, shard_size - 1))):
                    _add(tar, f"{shards:05}{place:0{digits}}", sample)
                    pairs += 1
                    images += sample.is_first
                    missing += sample.is_first and sample.image is None
                    task.advance()
            shards += 1
    return Conversion(shards, pairs, images, missing)


def _add(tar: tarfile.TarFile, key: str, sample: _Sample) -> None:
    pair, caption = sample.pair, sample.pair.caption.strip()
    members = {
        "txt": caption.encode(errors="replace"),
        "json": json.dumps({"caption": caption, **pair.metadata, IMAGE_INDEX: pair.image_index}).encode(),
    }
    if pair.image is not None and sample.image is not None:
        extension = pair.image.suffix[1:].lower()
        members = {extension if extension in IMAGE_EXTENSIONS else "jpg": sample.image, **members}
    for extension, data in members.items():
        add_member(tar, f"{key}.{extension}", data)
