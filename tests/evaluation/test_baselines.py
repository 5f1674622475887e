"""Every training-free score equals its formula, written out pair by pair in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp
from torch import Tensor
from torch.nn.functional import normalize

from noisyclean.evaluation import baselines
from noisyclean.evaluation.baselines import (
    bank_match_score,
    claimed_match_score,
    clip_score,
    deep_knn,
    lemon_fix,
    neg_clip_loss,
)
from noisyclean.srem import match_score, pair_logits

WIDTH = 6
SCORES: list[Callable[..., Tensor]] = [
    clip_score,
    neg_clip_loss,
    lemon_fix,
    deep_knn,
    bank_match_score,
    claimed_match_score,
]
temperatures = st.sampled_from([0.01, 0.05, 1.0])
seeds = st.integers(0, 2**16)
chunks = st.integers(1, 9)


def embeddings(size: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and texts that resemble each other somewhat, so that no prediction is trivial."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, size, WIDTH, generator=generator, dtype=torch.float64)
    return normalize(image, dim=1).to(dtype), normalize(image + noise, dim=1).to(dtype)


@pytest.mark.parametrize("score", SCORES)
def test_true_pairs_score_higher_than_wrong_ones(score: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    topic = torch.randn(12, 16, generator=generator)[torch.arange(240) % 12]  # k-NN needs captions that are alike
    image, text = (normalize(topic + 0.6 * torch.randn(240, 16, generator=generator), dim=1) for _ in range(2))
    text[:40] = text[:40].roll(1, dims=0)
    scores = score(image, text, 0.05)
    assert scores.shape == (240,)
    assert scores.dtype == torch.float32
    assert scores[40:].mean() > scores[:40].mean()


@pytest.mark.parametrize("score", SCORES)
def test_scores_follow_the_pairs_and_are_finite_for_one_pair(score: Callable[..., Tensor]) -> None:
    image, text = embeddings(30, seed=1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    if score is not deep_knn:  # k-means starts from rows by their position
        torch.testing.assert_close(score(image[order], text[order], 0.05), score(image, text, 0.05)[order])
    torch.testing.assert_close(score(image, text, 0.05), score(image, text, 0.05), rtol=0, atol=0)
    assert score(image[:1], text[:1], 0.05).isfinite().all()
    with pytest.raises(ValueError, match="one shape"):
        score(image, text[:3], 0.05)


def test_the_clip_score_is_the_similarity() -> None:
    image, text = embeddings(9, seed=0)
    torch.testing.assert_close(clip_score(image, text, 0.01), (image @ text.T).diagonal())


@given(size=st.integers(1, 9), seed=seeds, temperature=temperatures, chunk=chunks)
@settings(max_examples=30)
def test_neg_clip_loss_over_one_batch_is_its_formula(size: int, seed: int, temperature: float, chunk: int) -> None:
    image, text = embeddings(size, seed)
    scores = neg_clip_loss(image, text, temperature, chunk=chunk)
    s = (image @ text.T).numpy()
    expected = [
        s[i, i] - temperature / 2 * (logsumexp(s[i] / temperature) + logsumexp(s[:, i] / temperature))
        for i in range(size)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)
    # Then it is the match score of the whole corpus on another scale.
    np.testing.assert_allclose(
        scores, temperature / 2 * bank_match_score(image, text, temperature), rtol=1e-9, atol=1e-9
    )


@given(size=st.integers(2, 9), batch_size=st.integers(1, 8), batches=st.integers(1, 3), seed=seeds)
@settings(max_examples=30)
def test_neg_clip_loss_averages_full_batches_that_hold_the_pair(
    size: int, batch_size: int, batches: int, seed: int
) -> None:
    if batch_size >= size:
        return
    image, text = embeddings(size, seed)
    scores = neg_clip_loss(image, text, 0.1, batch_size=batch_size, batches=batches, seed=seed, chunk=2)
    generator = torch.Generator().manual_seed(seed)
    s = (image @ text.T).numpy()
    expected = s.diagonal().copy()
    for _ in range(batches):
        order = torch.randperm(size, generator=generator).tolist()
        for place, i in enumerate(order):
            start = min(place // batch_size * batch_size, size - batch_size)
            batch = order[start : start + batch_size]
            assert i in batch
            expected[i] -= 0.1 / (2 * batches) * (logsumexp(s[i, batch] / 0.1) + logsumexp(s[batch, i] / 0.1))
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)


def test_neg_clip_loss_depends_on_its_seed_only_where_it_draws() -> None:
    image, text = embeddings(20, seed=0)
    first, second = (neg_clip_loss(image, text, 0.05, batch_size=8, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    whole = neg_clip_loss(image, text, 0.05, seed=0)
    torch.testing.assert_close(neg_clip_loss(image, text, 0.05, batch_size=20, seed=1), whole)


@given(size=st.integers(2, 12), neighbours=st.integers(1, 14), seed=seeds, chunk=chunks)
@settings(max_examples=30)
def test_lemon_is_its_formula(size: int, neighbours: int, seed: int, chunk: int) -> None:
    image, text = embeddings(size, seed)
    scores = lemon_fix(image, text, 0.01, neighbours=neighbours, chunk=chunk)
    x, y = image.numpy(), text.numpy()
    k = min(neighbours, size - 1)

    def nearest(points: np.ndarray, i: int) -> list[int]:
        return sorted((j for j in range(size) if j != i), key=lambda j: -float(points[j] @ points[i]))[:k]

    expected = []
    for i in range(size):
        s_n = s_m = 0.0
        for n in nearest(x, i):
            s_n += (1 - y[i] @ y[n]) * math.exp(-0.1 * (1 - x[i] @ x[n])) * math.exp(-5 * (1 - x[n] @ y[n])) / k
        for m in nearest(y, i):
            s_m += (1 - x[i] @ x[m]) * math.exp(-0.1 * (1 - y[i] @ y[m])) * math.exp(-5 * (1 - x[m] @ y[m])) / k
        expected.append(-((1 - x[i] @ y[i]) + 5 * s_n + 5 * s_m))
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)


def test_deep_knn_is_the_share_of_near_images_with_such_a_caption() -> None:
    # Two groups of five images; captions of two kinds. Pair 0 has the caption of the other group.
    generator = torch.Generator().manual_seed(0)
    kinds = torch.eye(WIDTH)[[0] * 5 + [1] * 5]
    jitter = 0.01 * torch.randn(10, WIDTH, generator=generator)
    image, text = normalize(kinds + jitter, dim=1), normalize(kinds - jitter, dim=1)
    text[0] = text[9]
    scores = deep_knn(image, text, 0.01, neighbours=4, clusters=2, chunk=3)
    assert scores.tolist() == [0.0, *[0.75] * 4, *[1.0] * 5]
    assert deep_knn(image, text, 0.01, neighbours=100, clusters=1).tolist() == [1.0] * 10


@given(size=st.integers(1, 9), seed=seeds, temperature=temperatures, chunk=chunks)
@settings(max_examples=20)
def test_the_match_score_against_all_pairs_is_that_of_one_batch(
    size: int, seed: int, temperature: float, chunk: int
) -> None:
    image, text = embeddings(size, seed)
    scores = bank_match_score(image, text, temperature, chunk=chunk)
    torch.testing.assert_close(scores, match_score(pair_logits(image, text, temperature)))


def reference_claimed_score(image: np.ndarray, text: np.ndarray, bank: list[int], tau: float, i: int) -> float:
    """Pair ``i`` among the bank's pairs and itself."""
    pairs = [i, *(j for j in bank if j != i)]
    z = image[pairs] @ text[pairs].T / tau
    p, r = log_softmax(z, axis=1), log_softmax(z, axis=0)
    return float(2 * p[0, 0] + 2 * r[0, 0] - logsumexp(r[0]) - logsumexp(p[:, 0]))


@given(
    size=st.integers(1, 9),
    seed=seeds,
    temperature=temperatures,
    chunk=chunks,
    data=st.data(),
)
@settings(max_examples=30)
def test_the_claimed_match_score_is_its_formula(
    size: int, seed: int, temperature: float, chunk: int, data: st.DataObject
) -> None:
    image, text = embeddings(size, seed)
    bank = data.draw(st.none() | st.lists(st.integers(0, size - 1), min_size=1, unique=True))
    scores = claimed_match_score(
        image, text, temperature, bank=None if bank is None else torch.tensor(bank), chunk=chunk
    )
    members = list(range(size)) if bank is None else bank
    expected = [reference_claimed_score(image.numpy(), text.numpy(), members, temperature, i) for i in range(size)]
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)


def test_a_rival_that_is_clearly_anothers_counts_for_less() -> None:
    angle = torch.tensor([0.0, 0.5])
    texts = torch.stack([angle.cos(), angle.sin()], dim=1)
    free = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # text 1's own image is far away, so it wants image 0
    settled = torch.stack([free[0], texts[1]])  # text 1 has its image
    gain = [
        (claimed_match_score(images, texts, 0.1) - bank_match_score(images, texts, 0.1))[0].item()
        for images in (free, settled)
    ]
    assert gain[1] > gain[0]


def test_the_surest_pairs_are_told_apart_in_float32() -> None:
    def score(cosine: float) -> float:
        image = torch.tensor([[1.0, 0.0, 0.0], [cosine, math.sqrt(1 - cosine**2), 0.0]])
        return claimed_match_score(image, image, 0.01)[0].item()

    assert 0 > score(0.80) > score(0.82)


@pytest.mark.parametrize("score", [bank_match_score, claimed_match_score])
def test_a_bank_in_another_order_scores_the_same(score: Callable[..., Tensor]) -> None:
    image, text = embeddings(20, seed=3)
    bank = torch.tensor([3, 17, 5, 0])
    torch.testing.assert_close(score(image, text, 0.05, bank=bank), score(image, text, 0.05, bank=bank.flip(0)))


def test_options_that_make_no_sense_are_refused() -> None:
    image, text = embeddings(5, seed=0)
    for options in ({"batch_size": 0}, {"batches": 0}):
        with pytest.raises(ValueError, match="batch"):
            neg_clip_loss(image, text, 0.01, **options)
    for score in (lemon_fix, deep_knn):
        with pytest.raises(ValueError, match="neighbour"):
            score(image, text, 0.01, neighbours=0)
    with pytest.raises(ValueError, match="cluster"):
        deep_knn(image, text, 0.01, clusters=0)


def test_lemon_has_its_published_parameters() -> None:
    assert (baselines.LEMON_BETA, baselines.LEMON_GAMMA, baselines.LEMON_TAU_1, baselines.LEMON_TAU_2) == (5, 5, 0.1, 5)
