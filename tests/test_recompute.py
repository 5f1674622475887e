"""Every number of a manifest, computed a second time: from the formulas of docs/method.md, in float64, with NumPy.

Nothing of noisyclean is asked but for what it wrote. The way from the embeddings to the manifest is checked in stages:

* what is measured of a pair, from the embeddings and the bank, up to the rounding of float32;
* its p-values twice: from the score as written, exactly; and from the float64 score, up to as many null scores as lie
  within the rounding of it, which may fall on either side;
* all conclusions, from the p-values as written, exactly or up to the last digit of float32.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.special import logsumexp

import noisyclean as nc

Floats = NDArray[np.float64]

TEMPERATURE = 0.03
SIMILARITY_ROUNDING = 5e-7
"""Of the product of two unit vectors in float32; 1.5e-7 was the worst."""
SCORE_ROUNDING = 4e-5
"""Of a match score or an entropy: that of similarities, divided by the temperature; 9e-6 was the worst."""
LAST_DIGIT = 2e-7
"""Half of float32's last digit is 6e-8 of a number."""


@dataclass(frozen=True)
class Scored:
    """What ``nc.score`` was given and what it wrote.

    Attributes:
        image, text: (N, d) unit-norm float64 of the readable pairs, in the order of ``rows``.
        rows: their rows of the manifest, by shard and index.
        fdr: the rate that was asked for.
        out: the OUT folder.
    """

    image: Floats
    text: Floats
    rows: pd.DataFrame
    fdr: float
    out: Path

    @cached_property
    def bank(self) -> dict[str, Floats]:
        return {name: array.astype(np.float64) for name, array in load_file(self.out / "bank.safetensors").items()}

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.out / "summary.json").read_text())

    @cached_property
    def nulls(self) -> pd.DataFrame:
        return pd.read_parquet(self.out / "nulls.parquet")

    def null(self, kind: str) -> NDArray[np.float32]:
        return np.sort(self.nulls.loc[self.nulls["kind"] == kind, "match_score"].to_numpy())

    def column(self, name: str) -> Floats:
        return self.rows[name].to_numpy(np.float64)


def make_pairs(size: int, noise: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pairs in a dozen topics, the two sides apart as those of CLIP are, some captions used twice, ``noise`` wrong."""
    random = np.random.default_rng(seed)
    width = 24
    topic = random.normal(size=(12, width))[random.integers(0, 12, size)]
    meaning = topic + random.normal(size=(size, width))
    gap = 2 * random.normal(size=width)
    image = meaning + 0.4 * random.normal(size=(size, width)) + gap
    text = meaning + 0.4 * random.normal(size=(size, width)) - gap
    text[:6] = text[6:12]
    wrong = random.permutation(size)[: round(noise * size)]
    text[wrong] = text[np.roll(wrong, 1)]
    return (7 * image).astype(np.float32), (3 * text).astype(np.float32)


@pytest.fixture(scope="module", params=[(500, 0.3, 0.05), (400, 0.6, 0.1), (320, 0.0, 0.01)], ids=str)
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Two files, one pair in each that cannot be read."""
    size, noise, fdr = request.param
    home = tmp_path_factory.mktemp("recompute")
    image, text = make_pairs(size, noise, seed=size)
    image[17], text[size - 3, 2] = 0, np.nan
    (home / "pairs").mkdir()
    half = size // 2
    np.savez(home / "pairs" / "0.npz", img=image[:half], txt=text[:half])
    np.savez(home / "pairs" / "1.npz", img=image[half:], txt=text[half:])
    nc.score(embeddings=home / "pairs", temperature=TEMPERATURE, out=home / "out", fdr=fdr)

    rows = pd.read_parquet(home / "out" / "manifest")
    rows["split"] = rows["split"].astype(str)
    rows = rows.sort_values(["shard", "index"], ignore_index=True)
    assert rows["shard"].tolist() == ["0"] * half + ["1"] * (size - half)
    assert rows["index"].tolist() == [*range(half), *range(size - half)]
    readable = np.ones(size, np.bool_)
    readable[[17, size - 3]] = False
    lost = rows[~readable]
    assert lost["split"].tolist() == ["unreadable"] * 2
    assert lost["reason"].tolist() == ["image embedding is zero", "text embedding is missing or not finite"]
    assert lost[["similarity", "match_score", "p_value", "q_value", "match_probability", "rank"]].isna().all(axis=None)
    image, text = (_unit(side[readable].astype(np.float64)) for side in (image, text))
    return Scored(image, text, rows[readable].reset_index(drop=True), fdr, home / "out")


def _unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_bank_is_of_pairs_that_share_nothing_and_leaves_out_no_other(scored: Scored) -> None:
    same_image, same_text = (
        np.abs(side[:, None] - scored.bank[name]).max(axis=2) < SIMILARITY_ROUNDING
        for name, side in (("image", scored.image), ("text", scored.text))
    )
    assert (same_image & same_text).any(axis=0).all()  # each is a pair of the files
    assert (same_image.sum(axis=1) <= 1).all()
    assert (same_text.sum(axis=1) <= 1).all()
    assert (same_image | same_text).any(axis=1).all()
    assert len(scored.bank["ids"]) < len(scored.rows)  # some captions do come twice


def mismatch_scores(bank: dict[str, Floats]) -> Floats:
    """(M, M) match scores of bank images with bank texts, their own partners left out, as if from outside the bank."""
    logits = bank["image"] @ bank["text"].T / TEMPERATURE
    size = len(logits)
    others = np.where(np.eye(size, dtype=np.bool_), -np.inf, logits)
    score = 2 * logits - logsumexp(others, axis=1)[:, None] - logsumexp(others, axis=0)
    return score - 2 * np.log((size + 1) / (size - 1))


def test_the_random_null(scored: Scored) -> None:
    size = len(scored.bank["ids"])
    shifts = min(int(np.ceil(2**17 / size)), size - 1)
    image = np.arange(size)
    texts = [(image - (1 + (2 * k + 1) * (size - 1) // (2 * shifts))) % size for k in range(shifts)]
    tables = mismatch_scores(scored.bank), scored.bank["image"] @ scored.bank["text"].T
    score, similarity = (np.sort([table[image, text] for text in texts], axis=None) for table in tables)
    random = scored.nulls[scored.nulls["kind"] == "random"]
    np.testing.assert_allclose(np.sort(random["match_score"]), score, rtol=0, atol=SCORE_ROUNDING)
    np.testing.assert_allclose(np.sort(random["similarity"]), similarity, rtol=0, atol=SIMILARITY_ROUNDING)


def test_the_near_misses(scored: Scored) -> None:
    """Of the bank's pairs that look true, the images with the five texts that are most like their own."""
    logits = scored.bank["image"] @ scored.bank["text"].T / TEMPERATURE
    own = 2 * np.diag(logits) - logsumexp(logits, axis=1) - logsumexp(logits, axis=0)
    null = scored.null("random")
    p = (1 + (null >= own[:, None]).sum(axis=1)) / (1 + len(null))
    true = np.flatnonzero(q_values(p, min((p > 0.5).mean() / 0.5, 1)) <= 0.05)
    likeness = scored.bank["text"] @ scored.bank["text"].T
    np.fill_diagonal(likeness, -np.inf)
    near = np.argsort(-likeness[true], axis=1)[:, :5]
    expected = np.sort(mismatch_scores(scored.bank)[true[:, None], near], axis=None)
    np.testing.assert_allclose(scored.null("near miss"), expected, rtol=0, atol=SCORE_ROUNDING)


@pytest.fixture(scope="module")
def measured(scored: Scored) -> dict[str, Floats]:
    """What is known of each pair, from the embeddings and the bank."""
    own = np.abs(scored.text[:, None] - scored.bank["text"]).max(axis=2) < SIMILARITY_ROUNDING
    similarity = (scored.image * scored.text).sum(axis=1)

    def log_probabilities(side: Floats, others: Floats) -> tuple[Floats, Floats]:
        rivals = np.where(own, -np.inf, side @ others.T / TEMPERATURE)
        logits = np.column_stack([rivals, similarity / TEMPERATURE])
        total = logsumexp(logits, axis=1)
        return logits - total[:, None], -TEMPERATURE * total

    log_p, energy_image = log_probabilities(scored.image, scored.bank["text"])
    log_r, energy_text = log_probabilities(scored.text, scored.bank["image"])
    classes = [np.isfinite(row) for row in log_p]
    crossed = [
        -(np.exp(p[at]) @ r[at] + np.exp(r[at]) @ p[at]) / 2 for p, r, at in zip(log_p, log_r, classes, strict=True)
    ]
    return {
        "similarity": similarity,
        "energy_image": energy_image,
        "energy_text": energy_text,
        "energy": (energy_image + energy_text) / 2,
        "match_score": log_p[:, -1] + log_r[:, -1],
        "swapped_entropy": np.array(crossed),
    }


@pytest.mark.parametrize("name", ["similarity", "energy_image", "energy_text", "energy"])
def test_similarity_and_energies(scored: Scored, measured: dict[str, Floats], name: str) -> None:
    np.testing.assert_allclose(scored.column(name), measured[name], rtol=0, atol=SIMILARITY_ROUNDING)


@pytest.mark.parametrize("name", ["match_score", "swapped_entropy"])
def test_match_score_and_swapped_entropy(scored: Scored, measured: dict[str, Floats], name: str) -> None:
    np.testing.assert_allclose(scored.column(name), measured[name], rtol=0, atol=SCORE_ROUNDING)


@pytest.mark.parametrize(("name", "kind"), [("p_value", "random"), ("near_miss_p_value", "near miss")])
def test_p_values(scored: Scored, measured: dict[str, Floats], name: str, kind: str) -> None:
    null = scored.null(kind)
    assert len(null) > 400

    def p_values(score: NDArray[Any]) -> Floats:
        return (1 + (null >= score[:, None]).sum(axis=1)) / (1 + len(null))

    written = scored.rows[name].to_numpy(np.float32)
    np.testing.assert_array_equal(written, p_values(scored.rows["match_score"].to_numpy(np.float32)).astype(np.float32))
    least, most = (p_values(measured["match_score"] + rounding) for rounding in (SCORE_ROUNDING, -SCORE_ROUNDING))
    assert (written >= least * (1 - LAST_DIGIT)).all()
    assert (written <= most * (1 + LAST_DIGIT)).all()
    assert (most - least).max() < 2e-3  # or this would say little


def test_p_values_of_the_nulls(scored: Scored) -> None:
    null = scored.null("random")
    at_least = len(null) - np.searchsorted(null, scored.nulls["match_score"])
    expected = ((1 + at_least) / (1 + len(null))).astype(np.float32)
    np.testing.assert_array_equal(scored.nulls["p_value"], expected)


def noise_rate(low: int, pairs: int, null_pairs: int) -> tuple[float, tuple[float, float]]:
    """Storey's estimate at λ = ½ and its interval, where ``low`` pairs are below the median of the null."""
    share = low / pairs
    estimate = share / 0.5
    variance = share * (1 - share) / pairs / 0.25 + estimate**2 / null_pairs
    half = max(1.96 * variance**0.5, 3 / pairs)
    return min(estimate, 1.0), (min(max(estimate - half, 0), 1.0), min(estimate + half, 1.0))


def test_noise_estimates(scored: Scored) -> None:
    rows, nulls, pairs = scored.rows, scored.nulls, len(scored.rows)
    median = np.median(nulls.loc[nulls["kind"] == "random", "similarity"])
    low_scores, low_similarities = (rows["p_value"] > 0.5).sum(), (rows["similarity"] < median).sum()
    estimate, interval = noise_rate(min(low_scores, low_similarities), pairs, len(scored.bank["ids"]))
    assert scored.summary["estimated_noise"] == pytest.approx(estimate, abs=1e-12)
    assert scored.summary["noise_interval"] == pytest.approx(interval, abs=1e-12)


def test_close_noise(scored: Scored) -> None:
    """What the random mismatches leave of the pairs below the median near miss, twice."""
    random, summary, pairs = scored.null("random"), scored.summary, len(scored.rows)
    low = (scored.rows["near_miss_p_value"] > 0.5).mean()
    random_low = (random < np.median(scored.null("near miss"))).mean()
    assert summary["close_noise"] == pytest.approx(2 * (low - summary["estimated_noise"] * random_low), abs=1e-6)
    of_random = random_low * np.diff(summary["noise_interval"]).item() / 2
    half = 2 * (1.96**2 * low * (1 - low) / pairs + of_random**2) ** 0.5
    expected = (max(summary["close_noise"] - half, 0), summary["close_noise"] + half)
    assert summary["close_interval"] == pytest.approx(expected, abs=1e-6)


def q_values(p: Floats, noise: float) -> Floats:
    """The least rate of mismatches, at most 1, among all pairs up to some p-value that is no smaller."""
    rate = {one: noise * len(p) * one / (p <= one).sum() for one in set(p)}
    return np.array([min(1, *(rate[other] for other in rate if other >= one)) for one in p])


def isotonic_density(p: Floats) -> Floats:
    """The non-increasing density of p-values at each of them: that of bins, neighbours pooled while they increase."""
    edges = np.unique(np.concatenate([[0], np.geomspace(1e-6, 1, 400), np.linspace(0, 1, 401)]))
    edges[-1] = 1
    pools: list[tuple[float, float, float]] = []  # share of the pairs, width, right edge
    for left, right in pairwise(edges):
        share, width = float(((p > left) & (p <= right)).mean()), right - left
        while pools and share / width >= pools[-1][0] / pools[-1][1]:
            before = pools.pop()
            share, width = share + before[0], width + before[1]
        pools.append((share, width, right))
    density = np.array([share / width for share, width, _ in pools])
    return density[np.searchsorted([right for *_, right in pools], p)]


@pytest.fixture(scope="module")
def concluded(scored: Scored) -> dict[str, NDArray[np.float32]]:
    """q-values and match probabilities, from the p-values as they are written."""
    p, noise = scored.column("p_value"), scored.summary["estimated_noise"]
    # The local rate goes by the p-values' own estimate where that of the similarities is the lower one.
    probability = 1 - np.minimum(max(noise, min((p > 0.5).mean() / 0.5, 1)) / isotonic_density(p), 1)
    return {
        "q_value": q_values(p, noise).astype(np.float32),
        "match_probability": probability.astype(np.float32),
    }


@pytest.mark.parametrize("name", ["q_value", "match_probability"])
def test_q_values_and_match_probabilities(scored: Scored, concluded: dict[str, NDArray[np.float32]], name: str) -> None:
    np.testing.assert_allclose(scored.rows[name], concluded[name], rtol=LAST_DIGIT, atol=LAST_DIGIT)
    assert scored.rows[name].nunique() > 20


def test_ranks(scored: Scored, measured: dict[str, Floats]) -> None:
    score = scored.rows["match_score"].to_numpy()
    order = np.lexsort((-score, scored.rows["p_value"]))  # stable: ties stay in the order of the shards
    rank = np.empty(len(order), np.int64)
    rank[order] = 1 + np.arange(len(order))
    assert scored.rows["rank"].tolist() == rank.tolist()
    # By the float64 scores, too, nothing is out of order by more than their rounding.
    assert (np.diff(measured["match_score"][order]) < 2 * SCORE_ROUNDING).all()


def test_splits_and_reasons(scored: Scored, concluded: dict[str, NDArray[np.float32]]) -> None:
    alpha = scored.fdr
    entropy, p = scored.column("swapped_entropy"), scored.column("p_value")
    q, probability = concluded["q_value"], concluded["match_probability"]
    good = (q <= alpha) & (probability > alpha)
    limit = np.quantile(entropy[p <= p[good].max()], 0.98)
    for value, threshold in ((q, alpha), (probability, alpha), (entropy, limit)):
        assert np.abs(value - threshold).min() > LAST_DIGIT  # so that rounding has no say

    def conclusion(good: bool, entropy: float, probability: float) -> tuple[str, str]:
        if probability <= alpha:
            return "noisy", f"match probability ≤ {alpha:g}"
        if good and entropy > limit:
            return "uncertain", "swapped entropy in the top 2%"
        return ("clean", f"q ≤ {alpha:g}") if good else ("uncertain", "between the thresholds")

    expected = [conclusion(*one) for one in zip(good, entropy, probability, strict=True)]
    assert list(zip(scored.rows["split"], scored.rows["reason"], strict=True)) == expected

    splits, reasons = Counter(split for split, _ in expected), Counter(reason for _, reason in expected)
    assert splits["clean"] > 50
    assert (splits["noisy"] > 50) == (scored.summary["estimated_noise"] > 0.1)
    unreadable = {"image embedding is zero": 1, "text embedding is missing or not finite": 1}
    summary = scored.summary
    assert {name: summary[name] for name in ("pairs", "clean", "noisy", "uncertain", "unreadable")} == {
        "pairs": len(expected) + 2,
        **{name: splits[name] for name in ("clean", "noisy", "uncertain")},
        "unreadable": 2,
    }
    assert summary["reasons"] == {**reasons, **unreadable}
    clean = scored.rows["split"] == "clean"
    assert summary["expected_clean_noise"] == pytest.approx(1 - probability[clean].mean(dtype=np.float64), abs=1e-6)
    near_miss_p = scored.nulls.loc[scored.nulls["kind"] == "near miss", "p_value"]
    assert summary["near_miss_pass_rate"] == pytest.approx((near_miss_p <= p[good].max()).mean(), abs=1e-12)
