"""The pairs written to disk the way img2dataset writes a webdataset."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from noisyclean.corpus.parallel import default_workers, map_in_processes
from noisyclean.corpus.shards import add_member
from noisyclean.corpus.synthetic.drawing import draw
from noisyclean.corpus.synthetic.pairs import Pair, PairSampler
from noisyclean.corpus.truth import TRUTH_NAME, TRUTH_SCHEMA
from noisyclean.errors import UsageError
from noisyclean.progress import SILENT, Progress

_META_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
    ]
)

# Both are what the names have digits for.
_MAX_PAIRS_PER_SHARD = 10_000
_MAX_SHARDS = 100_000

_MIN_IMAGE_SIZE = 16
_JPEG_QUALITY = 90

_Row = dict[str, Any]


class _Address(NamedTuple):
    shard: str
    key: str


class _Sample(NamedTuple):
    jpeg: bytes
    meta: _Row


def generate_corpus(
    directory: Path | str,
    *,
    pairs: int,
    seed: int = 0,
    image_size: int = 64,
    pairs_per_shard: int = 1000,
    near_duplicates: float = 0.03,
    wrong_attribute: float = 0.02,
    uninformative: float = 0.02,
    progress: Progress = SILENT,
) -> Path:
    """Write a corpus of drawn pictures and their captions, and the truth about them.

    Each shard is ``NNNNN.tar`` of ``key.jpg``, ``key.json`` and ``key.txt``, with ``NNNNN.parquet`` (the rows of the
    jsons) and ``NNNNN_stats.json`` beside it, as img2dataset writes them. The same arguments give the same bytes, and
    a pair depends only on the seed, the shares of the kinds and its index: a larger corpus begins with the smaller.

    Args:
        directory: made where it does not exist; must hold no shards yet.
        pairs: how many to write; the last shard takes what is left over.
        seed: 0 or more.
        image_size: the pictures' shorter side in pixels, 16 or more; the longer is up to 1.25 times that.
        pairs_per_shard: 1 to 10,000.
        near_duplicates: the share of pairs that show an earlier pair's scene again, true to their captions.
        wrong_attribute: the share of pairs whose captions name one wrong colour or shape.
        uninformative: the share of pairs whose captions say nothing (``IMG_2034.JPG``).
        progress: told of the pairs written, shard by shard.

    Returns:
        The path of the truth, a parquet of one row a pair in the order of the corpus: ``shard`` (the tar's name
        without its suffix), ``key``, ``matched``, ``kind`` (a :class:`~noisyclean.corpus.synthetic.pairs.Kind`), and
        ``donor_shard`` and ``donor_key``, the pair that a near-duplicate repeats, null for the others.

    Raises:
        UsageError: for a number out of its range, or a directory that holds shards already.
    """
    sampler = PairSampler(seed, near_duplicates, wrong_attribute, uninformative)
    directory = Path(directory)
    _check_numbers(pairs, image_size, pairs_per_shard)
    _check_directory(directory)
    spans = [range(start, min(start + pairs_per_shard, pairs)) for start in range(0, pairs, pairs_per_shard)]
    draw_shard = partial(
        _draw_shard, sampler=sampler, directory=directory, pairs_per_shard=pairs_per_shard, image_size=image_size
    )
    truth: list[_Row] = []
    with progress.task("drawing pairs", total=pairs, unit="pairs") as task:
        for rows in map_in_processes(draw_shard, spans, default_workers()):
            truth.extend(rows)
            task.advance(len(rows))
    path = directory / TRUTH_NAME
    _write_table(path, truth, TRUTH_SCHEMA)
    return path


def _draw_shard(
    span: range, sampler: PairSampler, directory: Path, pairs_per_shard: int, image_size: int
) -> list[_Row]:
    """Draw and write the pairs of one shard; returns their rows of the truth."""
    pairs = [sampler.pair(index) for index in span]
    samples = [
        _sample(pair, sampler.seed, index, _address(index, pairs_per_shard).key, image_size)
        for index, pair in zip(span, pairs, strict=True)
    ]
    _write_shard(directory, _address(span.start, pairs_per_shard).shard, samples)
    return [_truth_row(pair, index, pairs_per_shard) for index, pair in zip(span, pairs, strict=True)]


def _check_numbers(pairs: int, image_size: int, pairs_per_shard: int) -> None:
    if not 1 <= pairs_per_shard <= _MAX_PAIRS_PER_SHARD:
        raise UsageError(f"pairs_per_shard must be 1 to {_MAX_PAIRS_PER_SHARD}, not {pairs_per_shard}")
    if not 1 <= pairs <= _MAX_SHARDS * pairs_per_shard:
        raise UsageError(f"pairs must be 1 to {_MAX_SHARDS * pairs_per_shard} (in {_MAX_SHARDS} shards), not {pairs}")
    if image_size < _MIN_IMAGE_SIZE:
        raise UsageError(f"image_size must be {_MIN_IMAGE_SIZE} or more, not {image_size}")


def _check_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory")
    # Shards of another corpus would stay behind unknown to the truth.
    if any(directory.glob("*.tar")):
        raise UsageError(f"{directory} holds shards already; name another directory or remove them")
    directory.mkdir(parents=True, exist_ok=True)


def _address(index: int, pairs_per_shard: int) -> _Address:
    shard, offset = divmod(index, pairs_per_shard)
    return _Address(f"{shard:05d}", f"{shard:05d}{offset:04d}")


def _truth_row(pair: Pair, index: int, pairs_per_shard: int) -> _Row:
    shard, key = _address(index, pairs_per_shard)
    donor_shard, donor_key = (None, None) if pair.repeats is None else _address(pair.repeats, pairs_per_shard)
    return {
        "shard": shard,
        "key": key,
        "matched": pair.kind.matched,
        "kind": pair.kind.value,
        "donor_shard": donor_shard,
        "donor_key": donor_key,
    }


def _sample(pair: Pair, seed: int, index: int, key: str, image_size: int) -> _Sample:
    # A stream of its own: the pair's stream is spent on what the picture shows.
    rng = np.random.default_rng([seed, index, 1])
    image = draw(pair.scene, image_size, rng)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    jpeg = buffer.getvalue()
    uid = hashlib.md5(f"{seed}/{key}".encode(), usedforsecurity=False).hexdigest()
    shrunk = int(rng.integers(4, 17))
    meta = {
        "uid": uid,
        "url": f"https://example.org/{uid[:2]}/{uid}.jpg",
        "caption": pair.caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": image.width,
        "height": image.height,
        "original_width": image.width * shrunk,
        "original_height": image.height * shrunk,
        "exif": "{}",
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }
    return _Sample(jpeg, meta)


def _write_shard(directory: Path, shard: str, samples: list[_Sample]) -> None:
    metas = [sample.meta for sample in samples]
    _write_table(directory / f"{shard}.parquet", metas, _META_SCHEMA)
    stats = {
        "count": len(samples),
        "successes": len(samples),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        # Nothing was downloaded; a clock here would make two runs differ.
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": len(samples)},
    }
    _replace(directory / f"{shard}_stats.json", lambda path: path.write_text(json.dumps(stats, indent=4)))
    _replace(directory / f"{shard}.tar", lambda path: _write_tar(path, samples))


def _write_tar(path: Path, samples: list[_Sample]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for jpeg, meta in samples:
            for name, content in _members(jpeg, meta):
                add_member(tar, name, content)


def _members(jpeg: bytes, meta: _Row) -> Iterator[tuple[str, bytes]]:
    yield f"{meta['key']}.jpg", jpeg
    yield f"{meta['key']}.json", json.dumps(meta, indent=4).encode()
    yield f"{meta['key']}.txt", str(meta["caption"]).encode()


def _write_table(path: Path, rows: list[_Row], schema: pa.Schema) -> None:
    _replace(path, lambda temporary: pq.write_table(pa.Table.from_pylist(rows, schema), temporary))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that no reader ever sees a part of it under its own."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)
