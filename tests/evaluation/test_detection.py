"""Figures against a truth: the same as sklearn's, or as counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import simulate_scores, write_scores
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from noisyclean.errors import UsageError
from noisyclean.evaluation.detection import evaluate
from noisyclean.manifest.reading import Manifest
from noisyclean.manifest.splitting import split

Scored = tuple[Path, Path]


@pytest.fixture
def by_hand(tmp_path: Path) -> Callable[..., Scored]:
    """OUT and truth of one shard whose pairs are in order of rank, the first ``keep`` of them clean."""

    def make(matched: list[bool], keep: int, faults: dict[int, str] | None = None, **truth: Any) -> Scored:
        rows = len(matched)
        fault = [(faults or {}).get(i) for i in range(rows)]
        p = np.arange(1, rows + 1) / (rows + 1)
        write_scores(tmp_path / "out", {"s": {"p_value": p, "fault": fault}})
        readable = fault.count(None)
        split(tmp_path / "out", keep=keep / readable if readable else 0.0)
        keys = [f"{i:05d}" for i in range(rows)]
        pd.DataFrame({"shard": "s", "key": keys, "matched": matched, **truth}).to_parquet(tmp_path / "truth.parquet")
        return tmp_path / "out", tmp_path / "truth.parquet"

    return make


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """3,000 pairs in two shards at 40 % noise, of which some cannot be read; the truth in another order."""
    root = tmp_path_factory.mktemp("evaluated")
    parts, truths = {}, []
    for seed, shard in enumerate(("a", "b")):
        matched, score, p = simulate_scores(1500, 0.4, seed, separation=2.5)
        fault = [None if i % 100 else "truncated PNG" for i in range(1500)]
        parts[shard] = {"p_value": p, "match_score": score, "fault": fault}
        keys = [f"{i:05d}" for i in range(1500)]
        truths.append(pd.DataFrame({"key": keys, "matched": matched, "shard": shard, "donor": ""}))
    out = write_scores(root / "out", parts)
    split(out, fdr=0.1)
    truth = pd.concat(truths).sample(frac=1, random_state=0)
    truth.to_parquet(root / "truth.parquet")
    return out, root / "truth.parquet"


def test_figures_are_sklearns(simulated: Scored) -> None:
    out, truth = simulated
    found = evaluate(out, truth=truth)
    rows = Manifest(out).pairs("clean", "noisy", "uncertain").merge(pd.read_parquet(truth), on=["shard", "key"])
    wrong = ~rows["matched"]
    clean, noisy = rows["split"] == "clean", rows["split"] == "noisy"
    assert found.auroc == pytest.approx(roc_auc_score(wrong, rows["rank"]))
    assert found.average_precision == pytest.approx(average_precision_score(wrong, rows["rank"]))
    assert found.f1 == pytest.approx(f1_score(rows["matched"], clean))
    assert found.planted_noise == pytest.approx(wrong.mean())
    assert found.clean.size == clean.sum()
    assert found.clean.realised_noise == pytest.approx(1 - precision_score(rows["matched"], clean))
    assert found.clean.recall == pytest.approx(recall_score(rows["matched"], clean))
    assert found.noisy.size == noisy.sum()
    assert found.noisy.precision == pytest.approx(precision_score(wrong, noisy))
    assert found.noisy.recall == pytest.approx(recall_score(wrong, noisy))
    assert found.uncertain.size == (rows["split"] == "uncertain").sum() > 0
    assert (found.unreadable, found.headline_pairs) == (30, 2970)
    assert found.kinds == {}
    assert [point.asked for point in found.calibration] == sorted(point.asked for point in found.calibration)
    for point in found.calibration:
        kept = rows["q_value"] <= point.asked
        assert point.size == kept.sum()
        assert point.realised_noise == pytest.approx(wrong[kept].mean())
        assert point.recall == pytest.approx(kept[rows["matched"]].mean())
        assert point.realised_noise <= point.asked + 0.02


def test_summary_is_passed_on(simulated: Scored) -> None:
    out, truth = simulated
    found, summary = evaluate(out, truth=truth), Manifest(out).summary
    assert found.estimated_noise == summary.estimated_noise
    assert found.noise_interval == summary.noise_interval
    assert found.target_fdr == 0.1


def test_json(simulated: Scored) -> None:
    out, truth = simulated
    found = json.loads(json.dumps(evaluate(out, truth=truth).to_dict()))
    assert {
        "auroc", "average_precision", "f1", "planted_noise", "estimated_noise", "noise_interval", "target_fdr",
        "clean", "noisy", "uncertain", "unreadable",
    } <= found.keys()  # fmt: skip
    assert found["clean"].keys() == {"size", "realised_noise", "recall"}
    assert found["noisy"].keys() == {"size", "precision", "recall"}
    assert found["uncertain"].keys() == {"size"}


def test_counted_by_hand(by_hand: Callable[..., Scored]) -> None:
    # rank        1     2     3      4     5      (6: unreadable)
    matched = [True, True, False, True, False, False]
    out, truth = by_hand(matched, keep=3, faults={5: "no image"})
    found = evaluate(out, truth=truth)
    assert found.auroc == pytest.approx(5 / 6)  # of 6 (true, wrong) couples one is in the wrong order
    assert found.average_precision == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert found.planted_noise == pytest.approx(2 / 5)
    assert (found.clean.size, found.unreadable, found.headline_pairs) == (3, 1, 5)
    assert found.clean.realised_noise == pytest.approx(1 / 3)
    assert found.clean.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.target_fdr is None


def test_harder_kinds_are_not_in_the_headline(by_hand: Callable[..., Scored]) -> None:
    kinds = ["match", "near_duplicate", "hard", "random", "match", "random", "uninformative"]
    matched = [True, True, False, False, True, False, False]
    out, truth = by_hand(matched, keep=3, kind=kinds)
    found = evaluate(out, truth=truth)
    assert found.headline_pairs == 5
    assert found.auroc == pytest.approx(5 / 6)
    assert found.planted_noise == pytest.approx(2 / 5)
    assert (found.clean.size, found.clean.realised_noise) == (3, 0.0)  # the size counts all, the rates the headline
    assert found.clean.recall == pytest.approx(2 / 3)
    assert {kind: figures.pairs for kind, figures in found.kinds.items()} == {
        "match": 2, "near_duplicate": 1, "hard": 1, "random": 2, "uninformative": 1,
    }  # fmt: skip
    assert found.kinds["hard"].auroc == pytest.approx(2 / 3)  # ranked below two of the three true pairs
    assert found.kinds["uninformative"].auroc == 1.0
    assert found.kinds["match"].auroc is None
    assert (found.kinds["hard"].clean, found.kinds["random"].clean) == (1, 0)


def test_without_random_mismatches_all_kinds_count(by_hand: Callable[..., Scored]) -> None:
    out, truth = by_hand([True, False, True, False], keep=2, kind=["match", "hard", "match", "uninformative"])
    found = evaluate(out, truth=truth)
    assert (found.headline_pairs, found.planted_noise) == (4, 0.5)
    assert found.auroc == pytest.approx(3 / 4)


@pytest.mark.parametrize("all_match", [True, False])
def test_one_class_only(by_hand: Callable[..., Scored], all_match: bool) -> None:
    out, truth = by_hand([all_match] * 4, keep=2)
    found = evaluate(out, truth=truth)
    assert found.auroc is found.average_precision is None
    assert found.clean.realised_noise == (0.0 if all_match else 1.0)
    assert found.clean.recall == (0.5 if all_match else None)
    assert found.f1 == (pytest.approx(2 / 3) if all_match else 0.0)


def test_nothing_kept_and_nothing_readable(by_hand: Callable[..., Scored]) -> None:
    out, truth = by_hand([True, False], keep=0)
    found = evaluate(out, truth=truth)
    assert (found.clean.realised_noise, found.clean.recall, found.f1) == (None, 0.0, 0.0)
    out, truth = by_hand([True, False], keep=0, faults={0: "no image", 1: "no image"})
    found = evaluate(out, truth=truth)
    assert (found.headline_pairs, found.unreadable, found.auroc, found.planted_noise, found.f1) == (0, 2, *[None] * 3)
    assert json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda truth: truth.drop(columns="matched"), "no column matched"),
        (lambda truth: truth.drop(columns="key"), "no column key"),
        (lambda truth: truth[truth["key"] != "00001"], "knows nothing of 1 pairs of .*, the first being s/00001"),
        (lambda truth: truth.assign(shard="t"), "knows nothing of 3 pairs"),
        (lambda truth: truth.assign(matched=["yes", "no", "no"]), "matched"),
    ],
)
def test_truth_of_something_else_is_refused(
    by_hand: Callable[..., Scored], spoil: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    out, truth = by_hand([True, False, True], keep=2)
    spoil(pd.read_parquet(truth)).to_parquet(truth)
    with pytest.raises(UsageError, match=message) as caught:
        evaluate(out, truth=truth)
    assert str(truth) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_of_the_truth_are_not_read_as_columns(by_hand: Callable[..., Scored]) -> None:
    out, truth = by_hand([True, False, True], keep=1)
    expected = evaluate(out, truth=truth)
    moved = truth.parent / "matched=1" / "kind=random" / truth.name
    moved.parent.mkdir(parents=True)
    assert evaluate(out, truth=truth.rename(moved)) == expected


def test_unreadable_pairs_need_no_truth(by_hand: Callable[..., Scored]) -> None:
    out, truth = by_hand([True, False, True], keep=1, faults={2: "no image"})
    pd.read_parquet(truth)[:2].to_parquet(truth)
    assert evaluate(out, truth=truth).headline_pairs == 2


@pytest.mark.parametrize("content", [None, b"shard,key,matched\n"])
def test_truth_that_cannot_be_read(by_hand: Callable[..., Scored], content: bytes | None) -> None:
    out, truth = by_hand([True, False], keep=1)
    truth.unlink()
    if content is not None:
        truth.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read the truth"):
        evaluate(out, truth=truth)
