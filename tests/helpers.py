"""Small shards made on the fly."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from noisyclean.corpus.locate import Shard
from noisyclean.corpus.shards import Sample, ShardReader

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
