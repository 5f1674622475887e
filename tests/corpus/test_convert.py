"""Benchmarks in their own layouts: every caption becomes a row, in order, with its image's own bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks_on_disk import SPLITS, caption, write_cc, write_karpathy
from helpers import encode_noise

import noisyclean as nc
from noisyclean.corpus.convert import Conversion
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.shards import Sample, SampleMembers, ShardReader, to_sample
from noisyclean.errors import UsageError
from noisyclean.progress import Silent


def load(folder: Path) -> list[tuple[Sample, SampleMembers, dict[str, Any]]]:
    """Each sample, its members, and its metadata."""
    raws = [(shard.name, raw) for shard in find_shards(folder) for raw in ShardReader(shard).members()]
    return [(to_sample(name, raw), raw, json.loads(raw.members["json"])) for name, raw in raws]


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("coco", [False, True])
@pytest.mark.parametrize("splits", [["train"], ["train", "restval"], ["test"]])
def test_karpathy(tmp_path: Path, coco: bool, splits: list[str]) -> None:
    annotations, images = write_karpathy(tmp_path, coco=coco)
    done = nc.convert(annotations, images, tmp_path / "out", layout="karpathy", splits=splits, shard_size=7)
    expected = [image for split in splits for image, its in enumerate(SPLITS) if its == split]
    rows = load(tmp_path / "out")
    assert done == Conversion(-(-5 * len(expected) // 7), 5 * len(expected), len(expected), 0)
    assert len(rows) == 5 * len(expected)
    for row, (sample, raw, metadata) in enumerate(rows):
        image, number = expected[row // 5], row % 5
        assert sample.fault is None
        assert (sample.key, list(raw.members)) == (f"{row // 7:05}{row % 7:04}", ["jpg", "txt", "json"])
        assert sample.image == encode_noise(image, image_format="JPEG")
        assert raw.members["txt"].decode() == sample.caption == caption(image, number)
        assert metadata == {
            "caption": caption(image, number),
            "split": SPLITS[image],
            "sentid": image * 10 + number,
            "image": f"{1000 + image}.jpg",
            "image_index": row // 5,
        }


def test_all_captions_if_asked(tmp_path: Path) -> None:
    done = nc.convert(*write_karpathy(tmp_path), tmp_path / "out", layout="karpathy", captions=9)
    assert done.samples == 21


@pytest.mark.parametrize("columns", ["caption url", "id caption", "id caption url"])
def test_conceptual_captions(tmp_path: Path, columns: str) -> None:
    listener = Listener()
    annotations, images = write_cc(tmp_path, columns)
    done = nc.convert(annotations, images, tmp_path / "out", layout="cc", progress=listener)
    assert done == Conversion(1, 12, 12, 1)
    assert listener.said == ["1 of 12 images could not be read; their pairs have none"]
    lines = [line.split("\t") for line in annotations.read_text().splitlines()]
    for row, ((sample, _, metadata), line) in enumerate(zip(load(tmp_path / "out"), lines, strict=True)):
        assert sample.caption == f"caption {row}"
        assert sample.fault == ("no image" if row == 4 else None)
        assert metadata["image_index"] == row
        assert (sample.url in line) is ("url" in columns)
        if row != 4:
            files = {path.name: path for path in images.rglob("*")}
            name = metadata["image"] if metadata["image"] in files else f"{metadata['image']}.jpg"
            assert files[name].read_bytes() == sample.image


def test_what_cannot_be_read_keeps_its_row(tmp_path: Path) -> None:
    annotations, images = write_karpathy(tmp_path)
    (images / "1001.jpg").unlink()
    (images / "1003.jpg").write_bytes(b"")
    (images / "1005.jpg").write_bytes(b"no picture")
    done = nc.convert(annotations, images, tmp_path / "out", layout="karpathy")
    assert done == Conversion(1, 20, 4, 2)
    rows = load(tmp_path / "out")
    assert [sample.fault for sample, *_ in rows] == ["no image"] * 10 + [None] * 10
    assert rows[10][0].image == b"no picture"
    assert nc.inspect(tmp_path / "out", workers=1).unreadable["no image"] == 10


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, images = write_karpathy(tmp_path)

    def convert() -> Conversion:
        return nc.convert(annotations, images, tmp_path / "out", layout="karpathy", shard_size=5)

    with monkeypatch.context() as patch:
        read = Path.read_bytes
        patch.setattr(Path, "read_bytes", lambda path: _interrupt() if path.stem == "1005" else read(path))
        with pytest.raises(KeyboardInterrupt):
            convert()
    assert not list((tmp_path / "out").iterdir())
    assert convert().samples == 20
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"0000{i}.tar" for i in range(4)]
    with pytest.raises(UsageError, match="holds shards already"):
        convert()


def _interrupt() -> bytes:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"annotations: not JSON .*; give Karpathy's"),
        ("[]", "annotations: no list of images under the key images"),
        ('{"images": [{"id": 1}], "annotations": []}', "annotations: the key annotations is COCO's own layout"),
        ('{"images": [{"filename": "a.jpg", "split": "train"}]}', r"images\[0\]: no list under the key sentences"),
        (
            '{"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"tokens": []}]}]}',
            r"images\[0\]\.sentences\[0\]: no str under the key raw",
        ),
        (
            '{"images": [{"filename": "a.jpg", "split": "val", "sentences": []}]}',
            r"no image has the split train; there are val \(1 images\)",
        ),
        (
            '{"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a"}]}]}',
            "holds none of the 1 images",
        ),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "annotations").write_text(content)
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match=message):
        nc.convert(tmp_path / "annotations", tmp_path / "images", tmp_path / "out", layout="karpathy")
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 has the columns text; a Conceptual Captions file has caption, url"),
        ("a,http://b\n", "line 1 has the columns url"),
        ("http://b\ta\n", "line 1 has the columns url, text"),
        ("a\thttp://b\nc\n", "line 2 has 1 columns, line 1 has 2"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "annotations").write_text(content)
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match=message):
        nc.convert(tmp_path / "annotations", tmp_path / "images", tmp_path / "out", layout="cc")


def test_two_images_of_one_name(tmp_path: Path) -> None:
    annotations, images = write_cc(tmp_path, "caption url")
    (images / "0001.jpg").write_bytes(b"another")
    with pytest.raises(UsageError, match="has the same name as"):
        nc.convert(annotations, images, tmp_path / "out", layout="cc")


def test_paths_are_checked(tmp_path: Path) -> None:
    annotations, images = write_karpathy(tmp_path)
    for wrong, message in (
        ((tmp_path / "none.json", images), r"none\.json: no such annotation file"),
        ((annotations, annotations), "no such folder of images"),
    ):
        with pytest.raises(UsageError, match=message):
            nc.convert(*wrong, tmp_path / "out", layout="karpathy")
