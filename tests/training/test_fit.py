from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import Listener, pair, read_tar, write_tar

import noisyclean as nc
from noisyclean.corpus.identity import caption_id
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.recipe import Recipe, load_recipe
from noisyclean.scoring.run import RunRecord, load_run
from noisyclean.training.fit import choose_recipe

TINY = [
    "encoder.image_size=32",
    "encoder.context_length=16",
    "optimiser.epochs=3",
    "optimiser.batch_size=32",
    "objective.warmup_epochs=1",
    "bank.size=64",
    "data.workers=0",
    "data.holdout=0.2",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("corpus")
    nc.generate_corpus(made, pairs=240, pairs_per_shard=100, image_size=32, seed=5)
    return made


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fit") / "run"
    nc.fit(shards, out=out, overrides=TINY)
    return out


def test_a_run_holds_what_it_promises(run: Path, shards: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["pairs"] == 240
    assert [Path(one).name for one in record["shards"]] == ["00000.tar", "00001.tar", "00002.tar"]
    assert load_recipe(run / "recipe.yaml") == load_recipe("cpu-small", TINY)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["fold"]) for row in rows] == [(e, k) for e in range(3) for k in range(2)]
    assert all(np.isfinite(row["loss"]) and row["holdout_loss"] > 0 for row in rows)
    assert all("estimated_noise" in row for row in rows if row["epoch"] < 2)
    assert list((run / "tensorboard").glob("events.*"))
    assert not (run / "checkpoint.pt").exists()


def test_open_clip_loads_each_encoder(run: Path) -> None:
    for fold in (0, 1):
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run}/fold-{fold}/encoder")
        assert model.visual.image_size in (32, (32, 32))


def test_each_bank_holds_only_pairs_its_model_never_saw(run: Path, shards: Path) -> None:
    found = load_run(run)
    captions = {caption_id(one.caption or "") for path in shards.glob("*.tar") for one in read_tar(path)}
    for fold, model in enumerate(found.models):
        assert 16 <= len(model.bank) <= 64
        assert set(model.bank.ids.tolist()) <= captions
        assert (found.folds.fold_of(model.bank.ids) == fold).all()


def test_the_same_seed_gives_the_same_models(run: Path, shards: Path, tmp_path: Path) -> None:
    again = nc.fit(shards, out=tmp_path / "again", overrides=TINY)
    other = nc.fit(shards, out=tmp_path / "other", overrides=[*TINY, "seed=1"])
    expected = json.loads((run / "run.json").read_text())["folds"]
    assert again.folds == expected
    assert not set(other.folds) & set(expected)


def test_an_interrupted_fit_goes_on_to_the_same_end(run: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        nc.fit(shards, out=out, overrides=TINY, progress=Listener("epoch 3/3, fold 1"))
    with pytest.raises(UsageError, match="unfinished run"):
        nc.score(shards, model=out, out=tmp_path / "out")
    listener = Listener("never")
    record = nc.fit(shards, out=out, overrides=TINY, progress=listener)
    assert "going on after epoch 2 of 3" in listener.said
    assert record.folds == json.loads((run / "run.json").read_text())["folds"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_finished_run_is_not_fitted_again(run: Path, shards: Path) -> None:
    before = (run / "run.json").stat().st_mtime_ns
    assert isinstance(nc.fit(shards, out=run, overrides=TINY), RunRecord)
    assert (run / "run.json").stat().st_mtime_ns == before


def test_a_run_of_something_else_is_refused(run: Path, shards: Path) -> None:
    with pytest.raises(UsageError, match="another recipe"):
        nc.fit(shards, out=run, overrides=[*TINY, "seed=1"])
    with pytest.raises(UsageError, match="other shards"):
        nc.fit(shards / "00000.tar", out=run, overrides=TINY)


def test_streaming_and_three_folds(shards: Path, tmp_path: Path) -> None:
    streamed = [*TINY, "data.cache=stream", "data.shuffle_buffer=64", "folds=3", "optimiser.shift=2"]
    record = nc.fit(shards, out=tmp_path / "run", overrides=streamed)
    assert len(record.folds) == 3
    summary = nc.score(model=tmp_path / "run", out=tmp_path / "out", workers=0)
    assert summary.pairs == 240
    assert set(nc.Manifest(tmp_path / "out").pairs()["fold"].dropna()) == {0, 1, 2}


def test_half_precision_runs_and_stays_finite(shards: Path, tmp_path: Path) -> None:
    halved = [*TINY, "optimiser.precision=bf16", "optimiser.epochs=2", "objective.entropy_weighting=swapped"]
    nc.fit(shards / "00000.tar", out=tmp_path / "run", overrides=halved)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(row["loss"])


def test_a_corpus_with_nothing_to_fit_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "few.tar", {f"{i}": pair(i) for i in range(10)})
    with pytest.raises(NoisycleanError, match="too few to fit"):
        nc.fit(tmp_path, out=tmp_path / "run", overrides=TINY)
    write_tar(tmp_path / "few.tar", {f"{i:03}": pair(i, "always the same") for i in range(100)})
    with pytest.raises(NoisycleanError, match="share one caption"):
        nc.fit(tmp_path, out=tmp_path / "run", overrides=TINY)


def test_a_recipe_object_is_taken_as_it_is(shards: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(load_recipe(None, [*TINY, "optimiser.epochs=2"]).model_dump())
    nc.fit(shards, out=tmp_path / "run", recipe=recipe)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("pairs", "device", "expected"),
    [(1_000, "cpu", "cpu-small"), (10**6, "cpu", "cpu"), (10_000, "cuda", "cpu"), (10**6, "cuda", "gpu")],
)
def test_the_recipe_suits_corpus_and_device(pairs: int, device: str, expected: str) -> None:
    name, why = choose_recipe(pairs, torch.device(device))
    assert name == expected
    assert load_recipe(name)
    assert why


def test_symlinked_shards_keep_their_names(shards: Path, tmp_path: Path) -> None:
    """As the caches of Hugging Face and DVC have them: a name that points to a blob."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "blob").write_bytes((shards / "00000.tar").read_bytes())
    (tmp_path / "shards" / "00007.tar").symlink_to(tmp_path / "blob")
    nc.fit(tmp_path / "shards", out=tmp_path / "run", overrides=[*TINY, "optimiser.epochs=2"])
    nc.score(model=tmp_path / "run", out=tmp_path / "out", workers=0)
    assert set(nc.Manifest(tmp_path / "out").pairs()["shard"]) == {"00007"}


def test_a_folder_with_a_recipe_of_the_users_is_left_alone(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 3\n")
    with pytest.raises(UsageError, match="no fit wrote"):
        nc.fit(shards, out=tmp_path, overrides=TINY)
    assert (tmp_path / "recipe.yaml").read_text() == "seed: 3\n"
