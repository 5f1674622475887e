"""Folds: what could leak from one to the other is never parted, and nothing but the pairs' content decides."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisyclean.errors import UsageError
from noisyclean.scoring.folds import FoldMap, assign_folds, known_share, sketch_pairs
from noisyclean.scoring.reference import ReferenceModel
from noisyclean.scoring.run import FOLDS_FILE, RunRecord, load_run, write_folds, write_record

# Few of each, so that captions and pictures are shared in long chains.
pair_lists = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=1, max_size=60)


def random_ids(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, size)


@given(pair_lists, st.integers(2, 5))
def test_pairs_that_share_a_caption_or_a_picture_share_a_fold(pairs: list[tuple[int, int]], folds: int) -> None:
    caption, image = np.array(pairs, np.int64).T
    fold = assign_folds(caption, image, folds).fold_of(caption)
    assert np.all((fold >= 0) & (fold < folds))
    for shared in (caption, image):
        for one in np.unique(shared):
            assert len(set(fold[shared == one])) == 1


@given(pair_lists, st.randoms(use_true_random=False))
def test_order_of_the_pairs_does_not_matter(pairs: list[tuple[int, int]], random: Random) -> None:
    shuffled = random.sample(pairs, len(pairs))
    maps = [assign_folds(*np.array(one, np.int64).T, 3) for one in (pairs, shuffled)]
    np.testing.assert_array_equal(maps[0].captions, maps[1].captions)
    np.testing.assert_array_equal(maps[0].exceptions, maps[1].exceptions)


@pytest.mark.parametrize("folds", [2, 3, 8])
def test_balance(folds: int) -> None:
    """20,000 pairs, of which a third share a caption or a picture with another."""
    caption, image = random_ids(20_000, 1), random_ids(20_000, 2)
    caption[:3000], image[3000:6000] = caption[3000:6000], image[6000:9000]
    sizes = np.bincount(assign_folds(caption, image, folds).fold_of(caption), minlength=folds)
    expected = 20_000 / folds
    assert np.all(np.abs(sizes - expected) < 6 * expected**0.5)


def test_only_shared_pictures_need_to_be_remembered() -> None:
    """A fold is a function of the caption, so the map stays small, and new captions have folds too."""
    caption, image = random_ids(1000, 1), random_ids(1000, 2)
    image[:10] = image[10:20]
    folds = assign_folds(caption, image, 2)
    assert len(folds.captions) <= 10
    unseen = random_ids(1000, 3)
    np.testing.assert_array_equal(folds.fold_of(unseen), np.mod(unseen, 2))


def test_template_captions_do_not_tie_all_folds() -> None:
    """A caption on a tenth of all pairs would chain their pictures, and all that shares those, into one fold."""
    caption, image = random_ids(4000, 1), random_ids(4000, 2)
    image[2000:] = image[:2000]  # every picture twice, with another caption each time
    caption[:400] = 7  # "click to enlarge"
    fold = assign_folds(caption, image, 2).fold_of(caption)
    twins = fold[2400:]  # the second uses of the pictures that do not carry the template
    assert 0.4 < twins.mean() < 0.6
    assert 0.4 < fold[2000:2400].mean() < 0.6  # those of the pictures that do
    assert len(set(fold[:400])) == 1  # still one caption, one fold


def test_no_pairs() -> None:
    nothing = np.zeros(0, np.int64)
    folds = assign_folds(nothing, nothing, 2)
    assert folds.fold_of(nothing).shape == (0,)
    assert folds.fold_of(np.array([3])).tolist() == [1]


SKETCH = np.array([3, 5, 2**63 + 1], np.uint64)


def write_run(run: Path, models: list[ReferenceModel], folds: FoldMap) -> None:
    for fold, model in enumerate(models):
        model.save(run / f"fold-{fold}")
    write_folds(run, folds, SKETCH)
    fingerprints = [model.fingerprint() for model in models]
    write_record(run, RunRecord([], "corpus", "demo", 10, fingerprints, 1.0, "cpu", {}, {}))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, fold_models: list[ReferenceModel], fold_map: FoldMap) -> Path:
    run = tmp_path_factory.mktemp("whole")
    write_run(run, fold_models, fold_map)
    return run


@pytest.fixture
def run(tmp_path: Path, whole_run: Path) -> Path:
    """A run whose files may be replaced, but not written into: they are hard links."""
    return Path(shutil.copytree(whole_run, tmp_path / "run", copy_function=os.link))


def test_run_round_trip(tmp_path: Path, fold_models: list[ReferenceModel]) -> None:
    caption, image = random_ids(100, 1), np.arange(100) // 2
    folds = assign_folds(caption, image, 2, holdout=0.25)
    assert len(folds.captions) > 0
    write_run(tmp_path, fold_models, folds)
    loaded = load_run(tmp_path)
    np.testing.assert_array_equal(loaded.folds.fold_of(caption), folds.fold_of(caption))
    assert (loaded.folds.folds, loaded.folds.holdout) == (2, 0.25)
    assert [model.fingerprint() for model in loaded.models] == [model.fingerprint() for model in fold_models]
    np.testing.assert_array_equal(loaded.sketch, SKETCH)


def test_run_without_exceptions_round_trip(tmp_path: Path, fold_models: list[ReferenceModel]) -> None:
    nothing = np.zeros(0, np.int64)
    write_run(tmp_path, fold_models, FoldMap(2, nothing, nothing))
    assert load_run(tmp_path).folds.fold_of(np.array([4, 5])).tolist() == [0, 1]


class TestSketch:
    """Which pairs of a corpus were fitted, whatever became of the shards."""

    @given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 2**16))
    def test_small_corpora_are_known_exactly(self, fitted: int, others: int, seed: int) -> None:
        caption, image = random_ids(fitted + others, seed), random_ids(fitted + others, seed + 1)
        sketch = sketch_pairs(caption[:fitted], image[:fitted])
        order = np.random.default_rng(seed).permutation(fitted + others)
        assert known_share(sketch, caption[order], image[order]) == pytest.approx(fitted / (fitted + others))

    def test_another_caption_of_a_fitted_picture_is_another_pair(self) -> None:
        caption, image = random_ids(100, 0), random_ids(100, 1)
        assert known_share(sketch_pairs(caption, image), np.roll(caption, 1), image) == 0.0

    def test_large_corpora_are_known_by_their_smallest_hashes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("noisyclean.scoring.folds.SKETCH_SIZE", 4000)
        caption, image = random_ids(60_000, 0), random_ids(60_000, 1)
        sketch = sketch_pairs(caption[:40_000], image[:40_000])
        assert len(sketch) == 4000
        assert known_share(sketch, caption, image) == pytest.approx(2 / 3, abs=0.03)
        assert known_share(sketch, caption[40_000:], image[40_000:]) == 0.0

    def test_no_pairs(self) -> None:
        nothing = np.zeros(0, np.int64)
        assert known_share(sketch_pairs(nothing, nothing), nothing, nothing) == 0.0


@pytest.mark.parametrize("name", [FOLDS_FILE, "fold-1/bank.safetensors", "fold-0/encoder/open_clip_config.json"])
@pytest.mark.parametrize("content", [None, b"garbage"])
def test_broken_runs_are_refused(run: Path, name: str, content: bytes | None) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    with pytest.raises(UsageError, match=name.split("/")[0]):
        load_run(run)


def test_folds_that_changed_places_are_refused(run: Path) -> None:
    (run / "fold-0").rename(run / "aside")
    (run / "fold-1").rename(run / "fold-0")
    (run / "aside").rename(run / "fold-1")
    with pytest.raises(UsageError, match="not the model that was fitted here"):
        load_run(run)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such run"),
        ({}, "not a run"),
        ({"recipe.yaml": ""}, "unfinished"),
        ({"run.json": "{"}, "not a run record"),
        ({"run.json": "[]"}, "not a run record"),
        ({"run.json": '{"pairs": 3}'}, "not a run record"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    run = tmp_path / "run"
    if files is not None:
        run.mkdir()
        for name, text in files.items():
            (run / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        load_run(run)
