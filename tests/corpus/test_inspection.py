"""What is in a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import encode_image, pair, write_tar

from noisyclean.corpus.inspection import Spread, inspect
from noisyclean.errors import UsageError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_tar(
        tmp_path / "00000.tar",
        {
            "a": pair(0, "a dog", uid="1", url="http://x/a"),
            "b": pair(1, "A  Dog", uid="2"),
            "c": pair(2, "a cat on a mat", uid="1", image=0),
            "d": {"jpg": encode_image(3, (20, 10), "WEBP"), "txt": b"cat"},
            "e": {"txt": b"no picture"},
        },
    )
    write_tar(
        tmp_path / "00001.tar",
        {
            "f": {"jpg": encode_image(4, (2, 3), "JPEG"), "txt": b"A DOG"},
            "g": {"png": encode_image(5)[:50], "txt": b"cut off"},
            "h": {"png": b"<html>", "txt": b"not found"},
            "i": {"png": b"<html>", "txt": b"not found"},
            "j": {"png": encode_image(6), "txt": b"cat"},
        },
    )
    cut = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(cut[:700])
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_everything_is_counted(corpus: Path, workers: int) -> None:
    found = inspect(corpus, workers=workers)
    assert found.shards == 3
    assert found.tar_bytes == sum(path.stat().st_size for path in corpus.iterdir())
    assert list(found.damaged_shards) == ["00002"]
    assert found.damaged_shards["00002"].startswith("damaged tar")
    assert (found.samples, found.readable) == (11, 6)
    assert found.samples == found.readable + sum(found.unreadable.values())
    assert list(found.unreadable) == ["not a picture", "no image", "truncated PNG", "cut off with its shard"]
    assert found.unreadable["not a picture"] == 2
    assert (found.with_uid, found.with_url, found.duplicate_uids) == (3, 1, 1)
    assert found.image_formats == {"PNG": 4, "WEBP": 1, "JPEG": 1}
    assert found.width == Spread(2, 8, 20)
    assert found.height == Spread(3, 6, 10)
    assert found.caption_characters == Spread(3, 5, 14)
    assert found.caption_words == Spread(1, 2, 5)
    assert found.distinct_captions == 3
    assert found.repeated_captions == [("a dog", 3), ("cat", 2)]
    assert found.repeated_caption_share == pytest.approx(5 / 6)
    assert found.repeated_image_share == pytest.approx(2 / 6)


def test_repeated_captions_are_found_in_whatever_shard_they_lie(tmp_path: Path) -> None:
    for shard in range(4):
        texts = {f"{shard}{i}": pair(shard * 10 + i, f"caption {min(shard, i)} {shard}") for i in range(4)}
        write_tar(tmp_path / f"{shard}.tar", texts)
    found = inspect(tmp_path, workers=1)
    assert found.repeated_captions == [("caption 0 0", 4), ("caption 1 1", 3), ("caption 2 2", 2)]


def test_result_is_json(corpus: Path) -> None:
    result = inspect(corpus, workers=1).to_dict()
    assert json.loads(json.dumps(result))["image_bytes"].keys() == {"min", "median", "max"}


def test_empty_corpus(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {})
    found = inspect(tmp_path)
    assert (found.samples, found.readable, found.width, found.repeated_captions) == (0, 0, None, [])
    assert found.repeated_caption_share == 0.0
    assert json.dumps(found.to_dict())


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        inspect(tmp_path)
