"""Noise index files: the n-th pair has the picture that the n-th number names, and the truth says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmarks_on_disk import write_cc, write_karpathy
from helpers import pair, write_tar
from numpy.typing import NDArray

import noisyclean as nc
from noisyclean.cli import main
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.noise_index import Level, make_index, read_index, write_index
from noisyclean.corpus.shards import Sample, ShardReader
from noisyclean.errors import UsageError

SPLITS = ["train", "restval"]  # 6 images, 30 captions


def load(folder: Path) -> list[Sample]:
    return [sample for shard in find_shards(folder) for sample in ShardReader(shard)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six images, five captions each, in five shards."""
    annotations, images = write_karpathy(tmp_path, coco=True)
    nc.convert(annotations, images, tmp_path / "clean", layout="karpathy", splits=SPLITS, shard_size=7)
    return tmp_path / "clean"


def check(before: Path, truth_path: Path, index: NDArray[np.int64], own: NDArray[np.int64]) -> None:
    """The copy against the original, the index and the truth, where all images can be read."""
    old, new, truth = load(before), load(truth_path.parent), pd.read_parquet(truth_path)
    pictures = dict(zip(own.tolist(), (one.image for one in old), strict=True))
    by_name = {(one.shard, one.key): (one, image) for one, image in zip(old, own.tolist(), strict=True)}
    for was, now, row, chosen, its in zip(old, new, truth.itertuples(), index.tolist(), own.tolist(), strict=True):
        assert (now.shard, now.key, now.caption) == (was.shard, was.key, was.caption) == (*row[1:3], was.caption)
        assert now.image == pictures[chosen]
        assert now.fault is None
        assert row.matched == (chosen == its)
        assert row.kind == ("match" if row.matched else "random")
        if row.matched:
            assert pd.isna(row.donor_key)
        else:
            donor, image = by_name[row.donor_shard, row.donor_key]
            assert (donor.image, image) == (now.image, chosen)


@pytest.mark.parametrize("level", ["caption", "image"])
@pytest.mark.parametrize("rate", [0, 0.4, 1])
def test_truth_is_what_the_index_says(shards: Path, tmp_path: Path, level: Level, rate: float) -> None:
    index = make_index(5, 6, rate, level, seed=3)
    write_index(tmp_path / "index.npy", index)
    truth = nc.apply_index(shards, tmp_path / "noisy", tmp_path / "index.npy", workers=1)
    check(shards, truth, index, np.arange(30) // 5)


def test_an_index_by_image_is_for_all_its_captions(shards: Path, tmp_path: Path) -> None:
    by_image = np.array([1, 0, 2, 5, 3, 4])
    truth = nc.apply_index(shards, tmp_path / "noisy", by_image, workers=2)
    check(shards, truth, by_image.repeat(5), np.arange(30) // 5)


def test_shards_that_number_no_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", {str(i): pair(i) for i in range(5)})
    write_tar(tmp_path / "in" / "1.tar", {str(i): pair(5 + i) for i in range(3)})
    index = np.array([7, 1, 2, 3, 4, 5, 6, 0])
    check(tmp_path / "in", nc.apply_index(tmp_path / "in", tmp_path / "out", index), index, np.arange(8))


def test_images_that_could_not_be_had(tmp_path: Path) -> None:
    annotations, images = write_cc(tmp_path, "caption url")  # the image of row 4 is missing
    nc.convert(annotations, images, tmp_path / "clean", layout="cc")
    index = np.arange(12)
    index[[3, 4]] = index[[4, 3]]
    truth = pd.read_parquet(nc.apply_index(tmp_path / "clean", tmp_path / "noisy", index, workers=1))
    old, new = load(tmp_path / "clean"), load(tmp_path / "noisy")
    assert [one.fault for one in new] == [None] * 3 + ["no image"] + [None] * 8
    assert new[4].image == old[3].image
    assert truth["kind"].tolist() == ["match"] * 3 + ["unreadable", "random"] + ["match"] * 7
    assert truth["matched"].tolist() == [True] * 4 + [False] + [True] * 7
    assert truth["donor_key"].dropna().to_dict() == {4: old[3].key}


def test_by_caption_a_permutation_at_the_rate_asked() -> None:
    own = np.arange(1000) // 5
    index = make_index(5, 200, 0.4, seed=1)
    assert index.dtype == np.int64
    assert np.array_equal(np.sort(index), own)
    assert 0.38 <= (index != own).mean() <= 0.4
    assert np.array_equal(index, make_index(5, 200, 0.4, seed=1))
    assert not np.array_equal(index, make_index(5, 200, 0.4, seed=2))


def test_by_image_captions_stay_together() -> None:
    index = make_index(5, 200, 0.4, "image", seed=1)
    assert len(index) == 1000
    assert np.array_equal(index, index[::5].repeat(5))
    assert np.array_equal(np.sort(index[::5]), np.arange(200))
    assert 0.37 <= (index[::5] != np.arange(200)).mean() <= 0.4


def test_make_index_checks_its_arguments() -> None:
    with pytest.raises(UsageError, match="rate must be 0 to 1"):
        make_index(5, 10, 40)
    with pytest.raises(UsageError, match="no such level"):
        make_index(5, 10, 0.4, "word")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.arange(29), "has 29 entries, but the shards hold 30 pairs of 6 images"),
        (np.arange(30), "names images 0 to 29, but the shards hold 6"),
        (np.full(30, -1), "names images -1 to -1"),
    ],
)
def test_an_index_that_does_not_fit(shards: Path, tmp_path: Path, index: NDArray[np.int64], message: str) -> None:
    write_index(tmp_path / "index.npy", index)
    with pytest.raises(UsageError, match=rf"index\.npy: {message}"):
        nc.apply_index(shards, tmp_path / "noisy", tmp_path / "index.npy", workers=1)
    assert not (tmp_path / "noisy").exists()


def test_shards_that_do_not_fit(shards: Path, tmp_path: Path) -> None:
    index = make_index(5, 6, 1)
    noisy = nc.apply_index(shards, tmp_path / "noisy", index, workers=1).parent
    with pytest.raises(UsageError, match="noise was planted here already"):
        nc.apply_index(noisy, tmp_path / "twice", index, workers=1)
    with pytest.raises(UsageError, match=r"up to number 5, but only 4 of them; name all shards"):
        nc.apply_index(str(shards / "{00000,00003,00004}.tar"), tmp_path / "part", index, workers=1)
    write_tar(shards / "other.tar", {"stray": pair(1)})
    with pytest.raises(UsageError, match=r"other\.tar: stray has no image_index in its json"):
        nc.apply_index(shards, tmp_path / "mixed", index, workers=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such noise index file"),
        (b"", "not a .npy file of numbers"),
        (np.arange(4.0), "this is float64 of shape"),
        (np.zeros((2, 2), int), "this is int64 of shape"),
    ],
)
def test_no_index_file(tmp_path: Path, content: bytes | NDArray[np.int64] | None, message: str) -> None:
    path = tmp_path / "index.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UsageError, match=message):
        read_index(path)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """From a benchmark's own files to noisy shards, and what is refused."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["noisyclean", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        assert stop.value.code in ((0, None) if out else (2,)), err
        return out or err

    annotations, images = write_karpathy(tmp_path)
    convert = ["convert", annotations, images, "--format", "karpathy", "-o"]
    done = json.loads(run(*convert, tmp_path / "clean", "--split", "train,restval", "--shard-size", 10, "--json"))
    assert done == {"shards": 3, "samples": 30, "images": 6, "missing_images": 0}
    assert "30 samples of 6 images, 0 of them missing" in run(
        *convert, tmp_path / "again", "--split", "train", "--split", "restval"
    )
    assert json.loads(run("inspect", tmp_path / "clean", "--json"))["readable"] == 30

    index = make_index(5, 6, 0.4, seed=1)
    write_index(tmp_path / "i.npy", index)
    corrupt = ["corrupt", tmp_path / "clean", "-o", tmp_path / "noisy"]
    found = json.loads(run(*corrupt, "--index", tmp_path / "i.npy", "--json"))
    assert found["wrong"] == found["kinds"]["random"] == np.count_nonzero(index != np.arange(30) // 5)
    assert "give the one or the others" in run(*corrupt, "--index", tmp_path / "i.npy", "--seed", "0")
    assert "give --rate" in run(*corrupt)
    assert "--split is for --format karpathy" in run(
        "convert", annotations, images, "-o", "x", "--format", "cc", "--split", "train"
    )


def test_the_flickr30k_recipe_runs_on_such_shards(tmp_path: Path) -> None:
    """With an encoder that can be had here; the recipe's own is CLIP's."""
    annotations, images = write_karpathy(tmp_path, splits=["train"] * 40)
    nc.convert(annotations, images, tmp_path / "clean", layout="karpathy")
    noisy = nc.apply_index(tmp_path / "clean", tmp_path / "noisy", make_index(5, 40, 0.4), workers=1).parent
    overrides = [
        "encoder.name=noisyclean-tiny",
        "encoder.pretrained=null",
        "encoder.image_size=32",
        "encoder.context_length=16",
        "optimiser.epochs=2",
        "optimiser.batch_size=8",
        "bank.size=16",
        "data.workers=0",
    ]
    nc.fit(noisy, out=tmp_path / "run", recipe="flickr30k-noise", overrides=overrides)
    nc.score(noisy, model=tmp_path / "run", out=tmp_path / "scored", workers=0)
    assert len(nc.Manifest(tmp_path / "scored").pairs()) == 200
