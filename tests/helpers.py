"""Small shards and simulated scores, made on the fly."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from noisyclean.calibration import p_values
from noisyclean.corpus.identity import pair_id
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.shards import Sample, ShardReader
from noisyclean.files import write_json
from noisyclean.manifest.nulls import NEAR_MISS, RANDOM, write_nulls
from noisyclean.manifest.parts import PartInfo, write_part
from noisyclean.manifest.schema import MEASURED, PART_SCHEMA
from noisyclean.manifest.splitting import OUT_FILE
from noisyclean.progress import Silent, Task

Members = Mapping[str, bytes]


def encode_image(colour: int = 0, size: tuple[int, int] = (8, 6), image_format: str = "PNG") -> bytes:
    """A picture of one colour; each number under 2**24 is another one."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour >> 16, colour >> 8 & 255, colour & 255)).save(buffer, image_format)
    return buffer.getvalue()


def pair(number: int, caption: str | None = None, *, image: int | None = None, **metadata: Any) -> dict[str, bytes]:
    """The members of a sample as img2dataset writes them; the picture's colour is ``image``, or else ``number``."""
    text = f"caption number {number}" if caption is None else caption
    return {
        "png": encode_image(number if image is None else image),
        "json": json.dumps({"caption": text, **metadata}).encode(),
        "txt": text.encode(),
    }


def write_tar(path: Path, samples: Mapping[str, Members] | Iterable[tuple[str, Members]], mode: str = "w") -> Path:
    """Write key → (extension → bytes), or such pairs where a key comes twice; ``mode`` as for ``tarfile.open``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for key, members in samples.items() if isinstance(samples, Mapping) else samples:
            for extension, data in members.items():
                add_member(tar, f"{key}.{extension}", data)
    return path


class Listener(Silent):
    """Keeps what it is told, and presses Ctrl-C when a note begins with the given words."""

    def __init__(self, words: str = "never") -> None:
        self.words = words
        self.said: list[str] = []
        self.notes: list[str | None] = []

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Task]:
        yield self

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        self.notes.append(note)
        if note is not None and note.startswith(self.words):
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self.said.append(text)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one plain file."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def read_tar(path: Path) -> list[Sample]:
    """All samples of a shard, which must be whole."""
    reader = ShardReader(Shard(path.name.partition(".")[0], str(path)))
    samples = list(reader)
    assert reader.damage is None
    return samples


def encode_noise(seed: int, size: tuple[int, int] = (24, 20), image_format: str = "PNG") -> bytes:
    """A picture of random pixels, unlike that of any other seed."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def simulate_scores(
    pairs: int, noise: float, seed: int, *, separation: float = 4.0, null_pairs: int = 4000
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Pairs of which ``noise`` are mismatched: N(0, 1) scores for those, N(separation, 1) for the others.

    Returns:
        Whether each pair matches, its score, and its p-value under a null of ``null_pairs`` scores.
    """
    random = np.random.default_rng(seed)
    matched = random.random(pairs) >= noise
    score = random.normal(size=pairs) + separation * matched
    return matched, score, p_values(score, np.sort(random.normal(size=null_pairs)))


def write_scores(
    out: Path, parts: Mapping[str, Mapping[str, Sequence[Any] | NDArray[Any]]], *, null_pairs: int = 4000
) -> Path:
    """Make an OUT folder as ``score`` leaves it before the split.

    Args:
        parts: shard → columns; ``p_value`` is needed. A row with a ``fault`` has no scores. Other columns are made up.
    """
    for shard, columns in parts.items():
        write_part(out, shard, _scored_rows(shard, columns), PartInfo("scorer", "source"))
    write_json(out / OUT_FILE, {"shards": sorted(parts), "null_pairs": null_pairs, "scorer": "scorer", "model": "m"})
    write_nulls(out, simulate_nulls())
    return out


def simulate_nulls(near_misses: int = 1000) -> pa.Table:
    """Random mismatches more similar than any pair, so that similarities have no say, and near misses."""
    p = np.random.default_rng(0).random(near_misses)
    kind = 2 * [RANDOM] + near_misses * [NEAR_MISS]
    scores = np.concatenate([[1e9, 1e9], p])
    return pa.table(
        {
            "fold": pa.array(np.zeros(len(kind)), pa.int32()),
            "kind": kind,
            **{name: pa.array(scores, pa.float32()) for name in ("similarity", "match_score")},
            "p_value": pa.array(np.concatenate([[1.0, 1.0], p]), pa.float32()),
        }
    )


def _scored_rows(shard: str, columns: Mapping[str, Sequence[Any] | NDArray[Any]]) -> pa.Table:
    rows = len(columns["p_value"])
    faults = list(columns.get("fault", [None] * rows))
    random = np.random.default_rng(abs(pair_id(shard, "")))
    made_up: dict[str, Any] = {
        "key": [f"{i:05d}" for i in range(rows)],
        "shard": [shard] * rows,
        "index": range(rows),
        "caption": [f"caption {i}" for i in range(rows)],
        "width": [8] * rows,
        "fold": np.zeros(rows),
        "in_sample": np.zeros(rows, np.bool_),
        **{name: random.normal(size=rows) for name in MEASURED},
        "near_miss_p_value": random.random(rows),
        "match_score": -np.asarray(columns["p_value"], np.float64),
    }
    given = {**made_up, **columns, "fault": faults}
    unreadable = np.array([fault is not None for fault in faults], np.bool_)
    arrays = []
    for one in PART_SCHEMA:
        values = given.get(one.name, [None] * rows)
        measured = one.name in {*MEASURED, "fold", "in_sample"}
        arrays.append(
            pa.array(np.asarray(values), mask=unreadable).cast(one.type, safe=False)
            if measured
            else pa.array(list(values), one.type)
        )
    return pa.table(arrays, schema=PART_SCHEMA)
