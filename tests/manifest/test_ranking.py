"""Ranks and limits out of core: what sorting all pairs in memory would give."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisyclean.calibration import NoiseRate
from noisyclean.manifest import ranking
from noisyclean.manifest.ranking import PairTable, judge_pairs
from noisyclean.manifest.rules import SplitRule
from noisyclean.manifest.schema import CLEAN, MEASURED, NOISY, UNCERTAIN

NOISE = NoiseRate(0.4, 0.3, 0.5)
few = st.integers(1, 4)  # so that ties are common
rows = st.lists(st.tuples(few, few, few, few), min_size=1, max_size=40)


def columns(values: list[tuple[int, ...]]) -> dict[str, Any]:
    p, score, entropy, similarity = np.array(values, np.float32).T
    others = dict.fromkeys(MEASURED, np.zeros(len(p), np.float32))
    return {**others, "p_value": p / 4, "match_score": score, "swapped_entropy": entropy, "similarity": similarity}


def ranks(table: PairTable) -> tuple[list[int], list[bool]]:
    found = list(table.ranks())
    return [int(one) for rank, _ in found for one in rank], [bool(one) for _, kept in found for one in kept]


@settings(max_examples=40)
@given(rows, st.lists(st.integers(0, 40), max_size=3), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_ranks_and_who_is_kept(values: list[tuple[int, ...]], cuts: list[int], keep: float) -> None:
    """Added in any number of pieces; by rank, and by a column where low and one where high is clean."""
    given_columns = columns(values)
    expected = sorted(range(len(values)), key=lambda i: (values[i][0], -values[i][1], i))
    for by, key in ((None, None), ("similarity", lambda i: -values[i][3]), ("swapped_entropy", lambda i: values[i][2])):
        with PairTable(SplitRule(keep=keep, by=by)) as table:
            edges = sorted({0, len(values), *(min(cut, len(values)) for cut in cuts)})
            for start, stop in pairwise(edges):
                table.add({name: column[start:stop] for name, column in given_columns.items()})
            rank, kept = ranks(table)
        assert [rank[i] for i in expected] == list(range(1, len(values) + 1))
        best = expected if key is None else sorted(expected, key=key)
        assert {i for i, one in enumerate(kept) if one} == set(best[: round(keep * len(values))])


@settings(max_examples=40)
@given(rows)
def test_counts(values: list[tuple[int, ...]]) -> None:
    with PairTable(SplitRule(fdr=0.05)) as table:
        table.add(columns(values))
        p, counts = table.counts()
    expected = np.unique(np.array(values, np.float32)[:, 0] / 4, return_counts=True)
    np.testing.assert_array_equal(p, expected[0])
    np.testing.assert_array_equal(counts, expected[1])


def test_the_entropy_limit_is_that_of_the_clean(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    p = np.concatenate([np.full(600, 0.001), random.random(400)]).astype(np.float32)
    entropy = random.random(1000).astype(np.float32)
    entropy[600:] += 10  # of no interest: these are not clean
    with PairTable(SplitRule(fdr=0.05), scratch=tmp_path) as table:
        table.add({"p_value": p, "match_score": -p, "swapped_entropy": entropy})
        decision = table.decide(NOISE)
    clean = decision.clean_places[decision.calibration.places(p)]
    assert clean.sum() >= 600
    assert decision.entropy_limit == pytest.approx(np.quantile(entropy[clean], 0.98))
    assert not list(tmp_path.iterdir())  # nothing of the sorting is left


def test_no_clean_pair_no_limit() -> None:
    with PairTable(SplitRule(fdr=0.05)) as table:
        table.add(columns([(4, 1, 1, 1)] * 5))
        assert math.isinf(table.decide(NOISE).entropy_limit)


def test_no_pairs() -> None:
    with PairTable(SplitRule(fdr=0.05)) as table:
        decision = table.decide(NOISE)
        assert ranks(table) == ([], [])
    assert decision.calibration.pairs == 0


def test_more_than_fits_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With hardly any memory to sort in, DuckDB goes to the disk, and the ranks are the same."""
    monkeypatch.setattr(ranking, "MEMORY_LIMIT", "48MB")
    random = np.random.default_rng(0)
    p = random.integers(1, 1000, 800_000).astype(np.float32) / 1000
    score = random.normal(size=800_000).astype(np.float32)
    with PairTable(SplitRule(fdr=0.05), scratch=tmp_path) as table:
        table.add({"p_value": p, "match_score": score, "swapped_entropy": score})
        rank = np.concatenate([one for one, _ in table.ranks()])
    expected = np.empty(800_000, np.int64)
    expected[np.lexsort((-score, p))] = np.arange(1, 800_001)
    np.testing.assert_array_equal(rank, expected)


def test_judging_what_is_in_memory() -> None:
    verdict = judge_pairs(
        columns([(1, 4, 1, 4), (1, 3, 1, 4), (4, 2, 1, 1), (4, 1, 1, 1)]), NOISE, SplitRule(keep=0.25)
    )
    assert verdict.rank.tolist() == [1, 2, 3, 4]
    assert verdict.is_in(CLEAN).tolist() == [True, False, False, False]
    assert (verdict.is_in(NOISY) | verdict.is_in(UNCERTAIN)).tolist() == [False, True, True, True]


@pytest.mark.parametrize("rule", [SplitRule(fdr=0.05), SplitRule(keep=0.5), SplitRule(min_score=0.5, by="match_score")])
def test_judging_no_pairs(rule: SplitRule) -> None:
    none = {name: np.zeros(0, np.float32) for name in ("p_value", "match_score", "swapped_entropy")}
    assert len(judge_pairs(none, NOISE, rule).rank) == 0
