"""What is measured on: pairs made up, or taken from somebody's shards, in tars of our own."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from noisyclean.corpus.locate import ShardSpec, find_shards
from noisyclean.corpus.parallel import default_workers, map_in_processes
from noisyclean.corpus.shards import ShardReader, add_member
from noisyclean.corpus.synthetic.pairs import PairSampler

PHOTO = (640, 480)
THUMBNAIL = (96, 72)
BREAK_EVERY = 100
DIFFERENT = 64
"""So many pictures are drawn; in files that differ by a number in a comment they are decoded again and again."""
_QUALITY = 85
_GRAIN = 10.0

RawPair = tuple[bytes, str]
"""The bytes of a picture, and its caption."""


def make_pairs(pairs: int, size: tuple[int, int]) -> Iterator[RawPair]:
    """JPEGs of ``size`` (width, height), to a decoder much like photographs, with captions that are of other pictures.

    No two files are equal. A photo of 640 × 480 takes about 80 KB.
    """
    draw = partial(_draw, size=size)
    pictures = list(map_in_processes(draw, range(min(pairs, DIFFERENT)), default_workers()))
    captions = PairSampler(near_duplicates=0)
    for number in range(pairs):
        yield _stamped(pictures[number % len(pictures)], number), captions.pair(number).caption


def take_pairs(shards: ShardSpec, most: int) -> Iterator[RawPair]:
    """The first ``most`` pairs of somebody's shards that have a picture and a caption."""
    samples = (sample for shard in find_shards(shards) for sample in ShardReader(shard))
    whole = ((sample.image, sample.caption) for sample in samples if sample.fault is None)
    for image, caption in islice(whole, most):
        assert image is not None
        assert caption is not None
        yield image, caption


def break_some(pairs: Iterable[RawPair]) -> Iterator[RawPair]:
    """The same, but every hundredth picture is cut off, empty or no picture at all, in turn."""
    for number, (image, caption) in enumerate(pairs):
        kind, rest = divmod(number, BREAK_EVERY)
        yield (image if rest else (image[: len(image) // 2], b"", b"<html>404</html>")[kind % 3]), caption


def write_tars(directory: Path, pairs: Iterable[RawPair], pairs_per_tar: int) -> list[Path]:
    """Write ``00000.tar``, ``00001.tar`` … of ``key.jpg`` and ``key.txt``."""
    directory.mkdir(parents=True)
    left = iter(pairs)
    written: list[Path] = []
    while part := list(islice(left, pairs_per_tar)):
        shard = f"{len(written):05d}"
        written.append(directory / f"{shard}.tar")
        with tarfile.open(written[-1], "w") as tar:
            for index, (image, caption) in enumerate(part):
                add_member(tar, f"{shard}{index:04d}.jpg", image)
                add_member(tar, f"{shard}{index:04d}.txt", caption.encode())
    return written


def link_tars(directory: Path, tars: Iterable[Path], copies: int) -> Path:
    """A folder in which each tar lies under so many names, one after another, and takes no space."""
    directory.mkdir(parents=True)
    for tar in tars:
        for copy in range(copies):
            (directory / f"{tar.stem}-{copy:03d}.tar").hardlink_to(tar)
    return directory


def _draw(seed: int, size: tuple[int, int]) -> bytes:
    """Coloured noise, the coarser the stronger, as in photographs, and a little grain."""
    random = np.random.default_rng(seed)
    width, height = size
    canvas = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 8):
        cells = 2**octave
        coarse = random.normal(size=(3, cells, cells)).astype(np.float32)
        layers = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in coarse]
        canvas += 60 * 0.65**octave * np.stack(layers, axis=2)
    canvas += random.normal(size=canvas.shape, scale=_GRAIN) + 128
    buffer = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _stamped(jpeg: bytes, number: int) -> bytes:
    """The JPEG with a comment segment of eight bytes behind its first marker."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8) + jpeg[2:]
