"""Whose model scores a pair: the one that never saw it, all together, or, with a single fold, the only one there is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Listener
from torch import Tensor

import noisyclean as nc
from noisyclean.encoders import DualEncoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.scoring.run import load_run

TINY = [
    "encoder.name=pico",
    "optimiser.batch_size=32",
    "objective.warmup_epochs=1",
    "bank.size=64",
    "data.workers=0",
    "data.holdout=0.2",
]


def rows(out: Path) -> pd.DataFrame:
    found = pd.read_parquet(out / "manifest")
    return found[found["split"] != "unreadable"].set_index("key").sort_index()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``fitted/`` and ``other/``, shards of the same kind; ``run``, fitted to the first, and its scores."""
    home = tmp_path_factory.mktemp("home")
    nc.generate_corpus(home / "fitted", pairs=240, pairs_per_shard=80, image_size=32, seed=5)
    nc.generate_corpus(home / "other", pairs=120, pairs_per_shard=60, image_size=32, seed=6)
    nc.fit(home / "fitted", out=home / "run", overrides=[*TINY, "optimiser.epochs=2"])
    nc.score(model=home / "run", out=home / "scored", workers=0)
    return home


class TestFittedPairs:
    def test_shards_packed_anew_are_recognised(self, home: Path, tmp_path: Path) -> None:
        """By their pairs: an export of the clean part, rescored, has the very scores it had."""
        nc.split(home / "scored", keep=0.5)
        nc.export(home / "scored", to=tmp_path / "clean", format="shards", shard_size=50)
        said = Listener()
        nc.score(tmp_path / "clean", model=home / "run", out=tmp_path / "again", workers=0, progress=said)
        assert any("100% of a sample of these pairs were fitted" in one for one in said.said)
        before, after = rows(home / "scored"), rows(tmp_path / "again")
        assert len(after) == round(0.5 * len(before))
        before = before.loc[after.index]
        for column in ("fold", "similarity", "match_score", "swapped_entropy", "p_value"):
            np.testing.assert_allclose(after[column], before[column], atol=1e-5)
        assert after["fold"].nunique() == 2

    def test_a_few_new_pairs_among_them_change_nothing(self, home: Path, tmp_path: Path) -> None:
        for shard in (*(home / "fitted").glob("*.tar"), *(home / "other").glob("*.tar")):
            shutil.copy(shard, tmp_path / f"{shard.parent.name}-{shard.name}")
        nc.score(tmp_path, model=home / "run", out=tmp_path / "out", workers=0)
        both, before = rows(tmp_path / "out"), rows(home / "scored")
        fitted = both[both["shard"].str.startswith("fitted")]
        np.testing.assert_allclose(fitted.loc[before.index, "match_score"], before["match_score"], atol=1e-5)
        assert not both["in_sample"].any()

    def test_one_fitted_shard_among_many_is_enough(self, home: Path, tmp_path: Path) -> None:
        """Told by where it lies: a sample of the pairs may miss it."""
        spec = [*sorted((home / "fitted").glob("*.tar"))[:1], *sorted((home / "other").glob("*1.tar"))]
        nc.score(spec, model=home / "run", out=tmp_path / "out", workers=0)
        found, before = rows(tmp_path / "out"), rows(home / "scored")
        fitted = found[found["shard"] == "00000"]
        np.testing.assert_allclose(fitted["match_score"], before.loc[fitted.index, "match_score"], atol=1e-5)


class TestNewPairs:
    def test_are_scored_by_all_models_together(self, home: Path, tmp_path: Path) -> None:
        said = Listener()
        nc.score(home / "other", model=home / "run", out=tmp_path / "both", workers=0, progress=said)
        assert any("no pair of a sample was fitted" in one for one in said.said)
        together = rows(tmp_path / "both")
        assert set(together["fold"]) == {0}
        assert not together["in_sample"].any()
        # The mean of the logits: similarities of each model alone, over its temperature.
        logits, reciprocals = [], []
        for fold, model in enumerate(load_run(home / "run").models):
            out = tmp_path / f"alone-{fold}"
            nc.score(home / "other", model=home / "run" / f"fold-{fold}" / "encoder", out=out, workers=0)
            reciprocals.append(1 / model.encoder.temperature.item())
            logits.append(rows(out)["similarity"] * reciprocals[-1])
        expected = sum(logits) / 2 / np.mean(reciprocals)
        np.testing.assert_allclose(together["similarity"], expected, atol=1e-5)
        assert together["similarity"].std() > 1e-3

    def test_resume(self, home: Path, tmp_path: Path) -> None:
        nc.score(home / "other", model=home / "run", out=tmp_path, workers=0)
        before = rows(tmp_path)
        next((tmp_path / "scores").glob("*.parquet")).unlink()
        nc.score(home / "other", model=home / "run", out=tmp_path, workers=0)
        pd.testing.assert_frame_equal(rows(tmp_path), before)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards half of whose captions are permuted."""
    made = tmp_path_factory.mktemp("noisy")
    nc.generate_corpus(made / "clean", pairs=360, pairs_per_shard=180, image_size=32, seed=7)
    nc.corrupt(made / "clean", out=made / "noisy", rate=0.5, protocol="caption", seed=0)
    return made / "noisy"


class TestOneFold:
    def learn_by_heart(self, noisy: Path, home: Path, folds: int) -> nc.Manifest:
        learning = ["objective.name=infonce", "optimiser.epochs=20", "optimiser.learning_rate=0.003"]
        tiny = [one for one in TINY if not one.startswith("objective")]
        nc.fit(noisy, out=home / "run", overrides=[*tiny, *learning, f"folds={folds}"])
        nc.score(model=home / "run", out=home / "out", workers=0)
        return nc.Manifest(home / "out")

    def test_in_sample_scoring_fails_and_says_so(self, noisy: Path, tmp_path: Path) -> None:
        manifest = self.learn_by_heart(noisy, tmp_path, folds=1)
        realised = nc.evaluate(tmp_path / "out", truth=noisy / "truth.parquet").clean.realised_noise
        assert realised is not None
        assert realised > 0.2  # where 5 % were asked for
        summary = manifest.summary
        held_out = manifest.table(columns=["in_sample"]).to_pandas()["in_sample"].eq(False).sum()
        assert 0 < held_out < 0.3 * summary.pairs
        assert summary.in_sample == summary.pairs - held_out - summary.unreadable
        assert summary.in_sample_noise is not None
        assert summary.in_sample_interval is not None
        assert summary.in_sample_interval[1] < summary.noise_interval[0]
        assert summary.estimated_noise > 0.45

    def test_cross_fitted_the_rate_holds(self, noisy: Path, tmp_path: Path) -> None:
        summary = self.learn_by_heart(noisy, tmp_path, folds=2).summary
        found = nc.evaluate(tmp_path / "out", truth=noisy / "truth.parquet")
        assert summary.in_sample == 0
        assert summary.in_sample_noise is None
        assert summary.estimated_noise > 0.45
        # An encoder that has learned next to nothing finds next to nobody clean.
        assert found.clean.size < 0.1 * summary.pairs

    def test_its_reference_is_the_hold_out(self, noisy: Path, tmp_path: Path) -> None:
        with pytest.raises(NoisycleanError, match=r"0 pairs are held out, .* raise data.holdout"):
            nc.fit(noisy, out=tmp_path / "run", overrides=[*TINY, "folds=1", "optimiser.epochs=2", "data.holdout=0"])

    def test_pairs_of_shards_that_were_not_fitted_are_not_in_sample(self, noisy: Path, tmp_path: Path) -> None:
        first, second = sorted(noisy.glob("*.tar"))
        tiny = [*TINY, "folds=1", "optimiser.epochs=2", "data.holdout=0.45"]
        nc.fit(first, out=tmp_path / "run", overrides=tiny)
        nc.score([first, second], model=tmp_path / "run", out=tmp_path / "out", workers=0)
        found = rows(tmp_path / "out").groupby("shard")["in_sample"].mean()
        assert 0.3 < found["00000"] < 0.8
        assert found["00001"] == 0


def test_a_score_that_is_not_finite_is_no_score(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an overflow in half precision: such a pair is not the best of all."""
    encode = DualEncoder.encode_image

    def overflowing(self: DualEncoder, pixels: Tensor) -> Tensor:
        image = encode(self, pixels)
        image[::5] = torch.nan
        return image

    monkeypatch.setattr(DualEncoder, "encode_image", overflowing)
    summary = nc.score(model=home / "run", out=tmp_path, workers=0)
    assert 0.15 * summary.pairs < summary.reasons["score is not finite"] == summary.unreadable
    assert rows(tmp_path)["match_score"].notna().all()


def test_a_run_is_scored_as_it_was_fitted(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run: fitted with encoder\.decode fast; leave --decode out"):
        nc.score(model=home / "run", out=tmp_path, decode="exact", workers=0)
    assert not any(tmp_path.iterdir())
