"""Match scores in which neighbours have a say, against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from noisyclean.srem import (
    bank_statistics,
    expanded_match_scores,
    expanded_null_scores,
    expanded_queries,
    null_scores,
)
from noisyclean.srem.bank import rival_sums

WIDTH = 5
TEMPERATURES = st.sampled_from([0.01, 0.05, 1.0])


def pairs(size: int, seed: int) -> tuple[Tensor, Tensor]:
    image, noise = torch.randn(2, size, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(image, dim=1), normalize(image + noise, dim=1)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 7),
    pool_size=st.integers(2, 12),
    seed=st.integers(0, 2**16),
    temperature=TEMPERATURES,
    neighbours=st.integers(1, 14),
    data=st.data(),
)
def test_queries_are_expanded_by_the_mean_of_the_nearest(
    size: int, pool_size: int, seed: int, temperature: float, neighbours: int, data: st.DataObject
) -> None:
    (side, _), (pool_side, pool_other) = pairs(size, seed), pairs(pool_size, seed + 1)
    log_weight = torch.rand(pool_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()
    places = st.integers(-1, pool_size - 1 if pool_size > 2 else 0)  # somebody is left to be asked
    own = data.draw(st.lists(st.tuples(places, places), min_size=size, max_size=size))
    found = expanded_queries(
        side, pool_side, pool_other, log_weight, torch.tensor(own), temperature, neighbours, chunk=3
    )
    for i in range(size):
        others = sorted((j for j in range(pool_size) if j not in own[i]), key=lambda j: -float(side[i] @ pool_side[j]))
        asked = others[:neighbours]
        share = softmax([float(side[i] @ pool_side[j]) / temperature + float(log_weight[j]) for j in asked])
        mean = sum(weight * pool_other[j].numpy() for weight, j in zip(share, asked, strict=True))
        np.testing.assert_allclose(found[i].numpy(), side[i].numpy() + mean / np.linalg.norm(mean), atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 7),
    bank_size=st.integers(2, 12),
    seed=st.integers(0, 2**16),
    temperature=TEMPERATURES,
    data=st.data(),
)
def test_scores_are_those_of_the_queries_over_the_bank(
    size: int, bank_size: int, seed: int, temperature: float, data: st.DataObject
) -> None:
    (image, text), (q, r), (f, g) = pairs(size, seed), pairs(size, seed + 1), pairs(bank_size, seed + 2)
    own = data.draw(st.lists(st.integers(-1, bank_size - 1), min_size=size, max_size=size))
    found = expanded_match_scores(image, text, 2 * q, 2 * r, f, g, temperature, torch.tensor(own), chunk=3)
    for i in range(size):
        rivals = [j for j in range(bank_size) if j != own[i]]
        score = 0.0
        for query, answer, bank in ((2 * q[i], text[i], g), (2 * r[i], image[i], f)):
            logit = float(query @ answer) / temperature
            score += logit - logsumexp([*(float(query @ bank[j]) / temperature for j in rivals), logit])
        assert float(found[i]) == pytest.approx(score, abs=1e-9)


@given(size=st.integers(2, 12), seed=st.integers(0, 2**16), temperature=TEMPERATURES, shifts=st.integers(1, 14))
@settings(deadline=None, max_examples=40)
def test_unexpanded_queries_score_as_the_bank_does(size: int, seed: int, temperature: float, shifts: int) -> None:
    image, text = pairs(size, seed)
    own = torch.arange(size)
    expected = bank_statistics(image, text, image, text, temperature, own).match_score
    torch.testing.assert_close(
        expanded_match_scores(image, text, image, text, image, text, temperature, own, chunk=5), expected
    )
    null = null_scores(image, text, temperature, rival_sums(image, text, temperature), shifts).match_score
    torch.testing.assert_close(expanded_null_scores(image, text, image, text, temperature, shifts, chunk=5), null)


def test_known_mismatches_are_scored_without_either_pair() -> None:
    (f, g), (q, r), tau = pairs(9, 3), pairs(9, 4), 0.05
    found = expanded_null_scores(f, g, q, r, tau, 8).reshape(8, 9)
    for shift in range(1, 9):
        for i in range(9):
            j = (i + shift) % 9
            score = -2 * math.log(10 / 8)
            for query, answer, bank in ((q[i], g[j], g), (r[j], f[i], f)):
                logit = float(query @ answer) / tau
                score += logit - logsumexp(
                    [*(float(query @ bank[k]) / tau for k in range(9) if k not in (i, j)), logit]
                )
            assert float(found[shift - 1, i]) == pytest.approx(score)


def test_who_is_not_trusted_is_not_heard() -> None:
    (side, _), (pool_side, pool_other) = pairs(30, 1), pairs(40, 2)
    trusted = torch.zeros(40, dtype=torch.float64)
    trusted[20:] = -torch.inf
    stranger = torch.full((30, 1), -1)
    everyone = expanded_queries(side, pool_side, pool_other, trusted, stranger, 0.05, 40)
    half = expanded_queries(side, pool_side[:20], pool_other[:20], trusted[:20], stranger, 0.05, 40)
    torch.testing.assert_close(everyone, half)


def test_neighbours_tell_mismatches_that_the_pair_alone_does_not() -> None:
    """Pictures of a few kinds, by an encoder that sees much of a picture and little of what its caption says."""
    generator = torch.Generator().manual_seed(0)
    kinds, size = 20, 1000
    kind = torch.randint(kinds, (size,), generator=generator)
    wrong = torch.rand(size, generator=generator) < 0.4
    said = torch.where(wrong, torch.randint(kinds, (size,), generator=generator), kind)
    seen, written = torch.randn(2, kinds, 32, generator=generator)
    noise = torch.randn(2, size, 32, generator=generator)
    image = normalize(seen[kind] + noise[0], dim=1)
    text = normalize(0.2 * seen[said] + written[said] + noise[1], dim=1)
    flat, own = torch.zeros(size), torch.arange(size)
    queries = (
        expanded_queries(image, image, text, flat, own[:, None], 0.1, 10),
        expanded_queries(text, text, image, flat, own[:, None], 0.1, 10),
    )
    right = kind == said
    alone = roc_auc_score(right, bank_statistics(image, text, image, text, 0.1, own).match_score)
    asked = roc_auc_score(right, expanded_match_scores(image, text, *queries, image, text, 0.1, own))
    assert asked > alone + 0.1
