"""Cross-fitting with every objective: who trains on what, who judges whom, and what survives an interruption."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Listener
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

import noisyclean as nc
from noisyclean.corpus.index import CorpusIndex, index_corpus
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.source import Batch, MemorySource, PairSource, StreamSource
from noisyclean.errors import NoisycleanError
from noisyclean.recipe import OBJECTIVES, NcrObjective, Recipe, SremObjective, load_recipe
from noisyclean.scoring.reference import build_bank, embed
from noisyclean.scoring.run import load_run
from noisyclean.training import crossfit as module
from noisyclean.training import filtration
from noisyclean.training.crossfit import CrossFit, make_encoders
from noisyclean.training.filtration import Filtered, judge, ncr_filter, srem_filter

TINY = [
    "encoder.name=pico",
    "optimiser.epochs=2",
    "optimiser.batch_size=32",
    "objective.warmup_epochs=1",
    "bank.size=64",
    "data.workers=0",
    "data.holdout=0.1",
]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_tokenizer")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, [*TINY, *overrides])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("corpus")
    nc.generate_corpus(made, pairs=240, pairs_per_shard=240, image_size=32, seed=5)
    nc.corrupt(made, made.parent / "noisy", rate=0.3, workers=1)
    return made.parent / "noisy"


@pytest.fixture(scope="module")
def source(one_tokenizer: None, shards: Path) -> MemorySource:
    index = index_corpus(find_shards(shards), workers=1)
    (encoder, *_) = make_encoders(recipe(), CPU)
    return MemorySource(StreamSource(index, encoder.preprocessor, workers=0))


class Watched:
    """A source that remembers which pairs it gave out, a list of rows for each pass."""

    def __init__(self, source: PairSource) -> None:
        self.index = source.index
        self.source = source
        self.trained: list[list[int]] = []
        self.looked_at: list[list[int]] = []

    def batches(self, rows: NDArray[np.int64], batch_size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        given: list[int] = []
        (self.looked_at if shuffle is None else self.trained).append(given)
        for batch in self.source.batches(rows, batch_size, shuffle=shuffle):
            given += batch.rows.tolist()
            yield batch


SWITCHES = [
    ["soft_targets=0", "neighbours=0"],
    *([f"name={name}"] for name in OBJECTIVES if name != "srem"),
    ["name=ncr", "co_teaching=true", "mixture=beta"],
    ["judge=in-sample", "soft_targets=0.3"],
    ["threshold=q_value", "filter_fdr=0.3", "warmup=complementary"],
    ["threshold=mixture", "statistic=energy", "matching=triplet"],
    ["threshold=energy_bank"],
    ["threshold=none", "agreement=and", "soft_targets=0.3"],
]


@pytest.mark.parametrize("keys", SWITCHES, ids=" ".join)
def test_every_objective_trains_to_a_run_that_loads(keys: list[str], shards: Path, tmp_path: Path) -> None:
    overrides = [*TINY, *(f"objective.{key}" for key in keys)]
    nc.fit(shards, out=tmp_path / "run", recipe="cpu-small", overrides=overrides)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["fold"]) for row in rows] == [(e, k) for e in range(2) for k in range(2)]
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all()
        assert {"loss", "holdout_loss", "gradient_norm", "mean_weight"} <= set(row)
    chosen = load_recipe(tmp_path / "run" / "recipe.yaml").objective
    assert chosen == load_recipe("cpu-small", overrides).objective
    assert all(("estimated_noise" in row) == (chosen.name == "srem" and row["epoch"] == 0) for row in rows)
    taught = isinstance(chosen, SremObjective) and chosen.soft_targets > 0
    assert ["soft_target" in row for row in rows] == [False, False, taught, taught]
    models = load_run(tmp_path / "run").models
    for model in models:
        assert all(one.isfinite().all() for one in model.encoder.model.state_dict().values())
    first, second = (model.encoder.fingerprint() for model in models)
    assert first != second


@pytest.mark.parametrize("keys", [["soft_targets=0.3", "threshold=energy_bank"], ["name=crcl"]], ids=" ".join)
def test_an_interrupted_fit_forgets_nothing(keys: list[str], shards: Path, tmp_path: Path) -> None:
    """What the objective or the memory hold is in the checkpoint."""
    overrides = [*TINY, "optimiser.epochs=3", *(f"objective.{key}" for key in keys)]
    whole = nc.fit(shards, out=tmp_path / "whole", recipe="cpu-small", overrides=overrides)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        nc.fit(shards, out=out, recipe="cpu-small", overrides=overrides, progress=Listener("epoch 3/3, fold 1"))
    listener = Listener()
    resumed = nc.fit(shards, out=out, recipe="cpu-small", overrides=overrides, progress=listener)
    assert "going on after epoch 2 of 3" in listener.said
    assert resumed.folds == whole.folds


@pytest.mark.parametrize("name", ["srem", "ncr", "infonce"])
def test_no_model_trains_on_its_own_fold(name: str, source: MemorySource) -> None:
    watched = Watched(source)
    crossfit = CrossFit(recipe(f"objective.name={name}", "folds=3"), watched, CPU)
    usable = np.flatnonzero(source.index.usable)
    assert sorted(np.concatenate(crossfit.judged)) == usable.tolist()
    assert len(crossfit.held_out) > 10
    for epoch in range(2):
        watched.trained.clear()
        crossfit.train_epoch(epoch, Listener())
        for own, (rows, _), seen in zip(crossfit.judged, crossfit.weights, watched.trained, strict=False):
            assert not set(rows) & set(own)
            assert sorted(rows) == sorted(set(usable) - set(own) - set(crossfit.held_out))
            assert sorted(seen) == sorted(rows)


def test_only_what_may_be_trained_on_is(source: MemorySource) -> None:
    usable = np.flatnonzero(source.index.usable)
    watched = Watched(source)
    crossfit = CrossFit(recipe("objective.name=infonce"), watched, CPU, rows=usable[:200], trainable=usable[::2])
    crossfit.train_epoch(0, Listener())
    assert sorted(np.concatenate(crossfit.judged)) == usable[:200].tolist()
    seen = {row for rows in watched.trained for row in rows}
    assert seen == set(usable[:200:2]) - set(crossfit.held_out)


def test_held_out_figures_are_those_of_whole_batches(source: MemorySource) -> None:
    crossfit = CrossFit(recipe("optimiser.batch_size=10"), source, CPU)
    figures = crossfit.train_epoch(0, Listener())
    assert 20 <= len(crossfit.held_out) < 30
    for encoder, row in zip(crossfit.encoders, figures, strict=True):
        rows, image, text = embed(encoder, source, crossfit.held_out)
        assert rows.tolist() == sorted(crossfit.held_out)
        recall, loss = [], []
        for batch in (slice(0, 10), slice(10, 20)):
            cosines = (image[batch] @ text[batch].T).double().numpy()
            recall += [cosines[k].argmax() == k for k in range(10)] + [cosines[:, k].argmax() == k for k in range(10)]
            odds = np.exp(cosines / encoder.temperature.item())
            loss += [-np.log(odds[k, k] / total[k]) for total in (odds.sum(0), odds.sum(1)) for k in range(10)]
        assert 0 < row["holdout_recall_at_1"] == pytest.approx(np.mean(recall))
        assert row["holdout_loss"] == pytest.approx(np.mean(loss), rel=1e-5)
        assert row["holdout_candidates"] == 10


def test_out_of_fold_weights_are_what_the_judge_says(source: MemorySource) -> None:
    crossfit = CrossFit(recipe(), source, CPU)
    assert [weights for _, weights in crossfit.weights] == [None, None]
    crossfit.train_epoch(0, Listener())
    for encoder, own in zip(crossfit.encoders, crossfit.judged, strict=True):
        found = srem_filter(judge(encoder, source, own, 64, neighbours=10), SremObjective())
        assert 0 < found.weight.mean() < 1
        for _, weights in crossfit.weights:  # one set of weights for all
            assert weights is not None
            np.testing.assert_array_equal(weights[torch.from_numpy(found.rows)].numpy(), found.weight)


def test_in_sample_weights_are_each_models_own(source: MemorySource) -> None:
    crossfit = CrossFit(recipe("objective.judge=in-sample"), source, CPU)
    crossfit.train_epoch(0, Listener())
    for encoder, (rows, weights) in zip(crossfit.encoders, crossfit.weights, strict=True):
        found = srem_filter(judge(encoder, source, rows, 64, neighbours=10), SremObjective())
        assert sorted(found.rows) == sorted(rows)
        assert weights is not None
        np.testing.assert_array_equal(weights[torch.from_numpy(found.rows)].numpy(), found.weight)


@pytest.mark.parametrize("co_teaching", [False, True])
def test_co_taught_models_learn_what_their_peers_select(
    co_teaching: bool, source: MemorySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[Tensor, Filtered]] = []

    def overheard(encoder: Any, *given: Any, **named: Any) -> Filtered:
        found = ncr_filter(encoder, *given, **named)
        said.append((next(encoder.model.parameters()), found))
        return found

    monkeypatch.setattr(module, "ncr_filter", overheard)
    crossfit = CrossFit(recipe("objective.name=ncr", f"objective.co_teaching={co_teaching}"), source, CPU)
    crossfit.train_epoch(0, Listener())
    assert len(said) == (4 if co_teaching else 2)
    for k, (rows, weights) in enumerate(crossfit.weights):
        own, (selector, selected) = next(crossfit.encoders[k].model.parameters()), said[k + 2 * co_teaching]
        assert (selector is own) != co_teaching
        assert sorted(selected.rows) == sorted(rows)
        assert weights is not None
        np.testing.assert_array_equal(weights[torch.from_numpy(selected.rows)].numpy(), selected.weight)
    if co_teaching:
        assert not torch.equal(said[0][0], said[2][0])  # peers start apart
        assert any((mine[1].weight != other[1].weight).any() for mine, other in zip(said[:2], said[2:], strict=True))


def test_ncr_selects_all_or_nothing_of_a_pair(source: MemorySource) -> None:
    (encoder, *_) = make_encoders(recipe(), CPU)
    rows = np.flatnonzero(source.index.usable)[:100]
    counted: list[int] = []
    found = ncr_filter(encoder, source, rows, 32, NcrObjective(name="ncr"), seed=3, on_batch=counted.append)
    assert sorted(found.rows) == rows.tolist()
    assert set(found.weight.tolist()) == {0.0, 1.0}
    assert counted == [32, 32, 32, 4]
    assert found.noise is None


def test_judge_embeds_each_pair_once_and_scores_as_score_does(source: MemorySource) -> None:
    (encoder, *_) = make_encoders(recipe(), CPU)
    rows = np.flatnonzero(source.index.usable)[20:]
    watched = Watched(source)
    counted: list[int] = []
    judged = judge(encoder, watched, rows, 40, on_batch=counted.append)
    assert sorted(row for seen in watched.looked_at for row in seen) == rows.tolist()
    assert sum(counted) == len(rows)
    bank = build_bank(encoder, source, rows, 40)
    # In training the bank's pairs need no names.
    assert judged.bank.fingerprint() == replace(bank, pairs=np.zeros(0, np.int64)).fingerprint()
    at, image, text = embed(encoder, source, rows)
    expected = bank.score(image, text, source.index.caption[at])
    order = np.argsort(judged.rows)
    assert judged.rows[order].tolist() == at.tolist()
    for mine, theirs in zip(judged.scores, expected, strict=True):
        torch.testing.assert_close(mine[torch.from_numpy(order)], theirs)


class Given:
    """Embeddings of the rows of an index, as a source of pairs and the encoder that has made them."""

    temperature = torch.tensor(0.1)
    inference = staticmethod(torch.inference_mode)

    def __init__(self, index: CorpusIndex, image: Tensor, text: Tensor) -> None:
        self.index = index
        self.sides = normalize(image, dim=1), normalize(text, dim=1)

    def batches(self, rows: NDArray[np.int64], batch_size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        for part in torch.split(torch.from_numpy(np.sort(rows)), batch_size):
            yield Batch(part, *(side[part] for side in self.sides))

    def encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, tokens


def test_neighbours_are_asked_whatever_is_streamed(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who are asked are embedded first, and all others as they come; nobody is embedded twice."""
    generator = torch.Generator().manual_seed(0)
    given: Any = Given(source.index, *torch.randn(2, len(source.index), 8, generator=generator))
    rows = np.flatnonzero(source.index.usable)[20:]
    alone = judge(given, given, rows, 40)
    monkeypatch.setattr(filtration, "NEIGHBOUR_POOL", 60)
    monkeypatch.setattr(filtration, "more_telling", lambda opinions, **_: 1)
    found = []
    for batch in (7, 256):
        monkeypatch.setattr(filtration, "FILTER_BATCH", batch)
        watched = Watched(given)
        judged = judge(given, watched, rows, 40, neighbours=5)
        seen = np.concatenate([np.array(one) for one in watched.looked_at])
        assert [len(one) for one in watched.looked_at] == [60, len(rows) - 60]
        assert sorted(seen) == sorted(judged.rows) == rows.tolist()
        assert judged.bank.fingerprint() == alone.bank.fingerprint()
        found.append(judged.p[np.argsort(judged.rows)])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("kinds", [4, 1000], ids="of {} kinds".format)
def test_neighbours_are_believed_where_they_tell_more(kinds: int, source: MemorySource) -> None:
    """They do where many pairs are of a kind; where each is of its own, they know nothing of others."""
    generator = torch.Generator().manual_seed(0)
    count = len(source.index)
    kind = torch.randint(kinds, (count,), generator=generator)
    wrong = torch.rand(count, generator=generator) < 0.4
    seen, written = torch.randn(2, kinds, 16, generator=generator)
    noise = 0.7 * torch.randn(2, count, 16, generator=generator)
    shared = 0.4 if kinds < count else 2.0
    said = torch.where(wrong, kind.roll(1), kind)
    given: Any = Given(source.index, seen[kind] + noise[0], shared * seen[said] + written[said] + noise[1])
    rows = np.flatnonzero(source.index.usable)
    alone, asked = (judge(given, given, rows, 64, neighbours=many) for many in (0, 10))
    by_row = [one.p[np.argsort(one.rows)] for one in (alone, asked)]
    found = [roc_auc_score((kind != said)[rows], p) for p in by_row]
    if kinds > count:
        np.testing.assert_array_equal(*by_row)
    else:
        assert found[1] > found[0] + 0.05


def test_pairs_of_one_picture_do_not_vouch_for_one_another(source: MemorySource) -> None:
    """All captions of a picture may have gone wrong together."""
    generator = torch.Generator().manual_seed(0)
    index = copy.copy(source.index)
    count = len(index)
    picture = torch.arange(count) // 4
    wrong = (torch.rand(count, generator=generator) < 0.4)[picture]
    said = torch.where(wrong, (picture + 7) % (count // 4), picture)
    seen, written = torch.randn(2, count // 4 + 1, 16, generator=generator)
    noise = torch.randn(count, 16, generator=generator)
    index = replace(index, image=index.image[picture.numpy() * 4])
    given: Any = Given(index, seen[picture], 0.3 * seen[said] + 2 * written[said] + 0.3 * noise)
    rows = np.flatnonzero(index.usable)
    judged = judge(given, given, rows, 64, neighbours=10)
    alone = judge(given, given, rows, 64)
    mismatched = wrong.numpy()[judged.rows]
    assert (judged.p[mismatched] < 0.02).mean() < 0.06
    assert roc_auc_score(mismatched, judged.p) > roc_auc_score(wrong.numpy()[alone.rows], alone.p) - 0.03


def test_who_cannot_be_embedded_is_not_asked(source: MemorySource) -> None:
    generator = torch.Generator().manual_seed(0)
    given: Any = Given(source.index, *torch.randn(2, len(source.index), 8, generator=generator))
    rows = np.flatnonzero(source.index.usable)
    judged = judge(given, given, rows, 64)
    broken = np.setdiff1d(rows, np.flatnonzero(np.isin(source.index.caption, judged.bank.ids)))[:3]
    given.sides[0][torch.from_numpy(broken)] = torch.nan
    judged = judge(given, given, rows, 64, neighbours=10)
    others = ~np.isin(judged.rows, broken)
    assert np.isfinite(judged.scores.match_score.numpy()[others]).all()
    assert len(np.unique(judged.p[others])) > 50


@pytest.mark.parametrize("threshold", ["posterior", "q_value", "mixture", "energy_bank", "none"])
def test_srem_filters_hold_better_pairs_cleaner(threshold: str, source: MemorySource) -> None:
    crossfit = CrossFit(recipe(), source, CPU)
    judged = judge(crossfit.encoders[0], source, crossfit.judged[0], 64)
    objective = recipe(f"objective.threshold={threshold}", "objective.filter_fdr=0.9").objective
    assert isinstance(objective, SremObjective)
    found = srem_filter(judged, objective)
    by_score = found.weight[np.argsort(judged.scores.match_score.numpy(), kind="stable")]
    assert (np.diff(by_score) >= 0).all()
    assert found.weight.dtype == np.float32
    assert (found.weight == 1).all() == (threshold in {"energy_bank", "none"})
    if threshold == "q_value":
        assert set(found.weight.tolist()) <= {0.0, 1.0}
    assert found.noise is not None
    assert 0 <= found.noise.low <= found.noise.estimate <= found.noise.high <= 1


@pytest.mark.parametrize("threshold", ["posterior", "mixture"])
def test_selectivity_is_an_exponent(threshold: str, source: MemorySource) -> None:
    crossfit = CrossFit(recipe(), source, CPU)
    judged = judge(crossfit.encoders[0], source, crossfit.judged[0], 64)
    plain, cubed = (
        srem_filter(judged, SremObjective(threshold=threshold, selectivity=power, min_trained_share=0)).weight
        for power in (1.0, 3.0)
    )
    assert 0 < plain.mean() < 1
    np.testing.assert_allclose(cubed, plain**3, rtol=1e-5)


def test_the_checkpoint_has_embeddings_only_where_soft_targets_need_them(source: MemorySource) -> None:
    soft, hard = (CrossFit(recipe(f"objective.soft_targets={share}"), source, CPU) for share in (0.3, 0))
    for crossfit in (soft, hard):
        crossfit.train_epoch(0, Listener())
    assert [one["memory"] for one in hard.state_dict()["trainers"]] == [{}, {}]
    for trainer, (trained, _) in zip(soft.state_dict()["trainers"], soft.weights, strict=True):
        kept = trainer["memory"]
        assert len(kept["image"]) == len(kept["text"]) == len(trained)
        assert kept["image"].dtype == torch.float16


def test_pairs_that_cannot_be_divided(source: MemorySource) -> None:
    with pytest.raises(NoisycleanError, match="no two folds"):
        CrossFit(recipe(), source, CPU, rows=np.arange(20))
