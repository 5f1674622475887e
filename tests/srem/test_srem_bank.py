import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp
from torch import Tensor
from torch.nn.functional import normalize

from noisyclean.srem import (
    NullScores,
    PairStatistics,
    bank,
    bank_statistics,
    match_score,
    near_miss_scores,
    null_scores,
    pair_logits,
)
from noisyclean.srem.bank import bank_match_scores, rival_sums

WIDTH = 6


def embeddings(size: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and texts that resemble each other somewhat, so that no prediction is trivial."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, size, WIDTH, generator=generator, dtype=torch.float64)
    return normalize(image, dim=1).to(dtype), normalize(image + noise, dim=1).to(dtype)


def reference_statistics(
    image: np.ndarray, text: np.ndarray, bank_image: np.ndarray, bank_text: np.ndarray, temperature: float, own: int
) -> list[float]:
    rivals = [j for j in range(len(bank_image)) if j != own]
    similarity = float(image @ text)
    image_logits = np.array([image @ bank_text[j] for j in rivals] + [similarity]) / temperature
    text_logits = np.array([text @ bank_image[j] for j in rivals] + [similarity]) / temperature
    log_p, log_r = log_softmax(image_logits), log_softmax(text_logits)
    energy_image, energy_text = -temperature * logsumexp(image_logits), -temperature * logsumexp(text_logits)
    swapped_entropy = -(np.exp(log_p) @ log_r + np.exp(log_r) @ log_p) / 2
    return [
        similarity,
        energy_image,
        energy_text,
        (energy_image + energy_text) / 2,
        log_p[-1] + log_r[-1],
        swapped_entropy,
    ]


def reference_null_score(image: np.ndarray, text: np.ndarray, temperature: float, i: int, j: int) -> float:
    size = len(image)
    bank = [k for k in range(size) if k not in (i, j)]
    own_logit = image[i] @ text[j] / temperature
    correction = math.log((size + 1) / (size - 1))
    image_lse = logsumexp([image[i] @ text[k] / temperature for k in bank] + [own_logit]) + correction
    text_lse = logsumexp([text[j] @ image[k] / temperature for k in bank] + [own_logit]) + correction
    return float(2 * own_logit - image_lse - text_lse)


def random_mismatches(image: Tensor, text: Tensor, temperature: float, shifts: int) -> NullScores:
    return null_scores(image, text, temperature, rival_sums(image, text, temperature), shifts)


def stack(statistics: PairStatistics) -> Tensor:
    return torch.stack(list(statistics), dim=1)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(0, 6),
    bank_size=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([0.01, 0.05, 1.0]),
    data=st.data(),
)
def test_statistics_equal_the_reference(
    size: int, bank_size: int, seed: int, temperature: float, data: st.DataObject
) -> None:
    image, text = embeddings(size, seed)
    bank_image, bank_text = embeddings(bank_size, seed + 1)
    own = data.draw(st.lists(st.integers(-1, bank_size - 1), min_size=size, max_size=size))
    for i, index in enumerate(own):
        if index >= 0:
            image[i], text[i] = bank_image[index], bank_text[index]
    chunk = data.draw(st.integers(1, 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "CPU_TILE", data.draw(st.integers(1, 20)))  # a bank of several tiles
        statistics = bank_statistics(
            image, text, bank_image, bank_text, temperature, torch.tensor(own, dtype=torch.int64), chunk=chunk
        )
    expected = [
        reference_statistics(i.numpy(), t.numpy(), bank_image.numpy(), bank_text.numpy(), temperature, index)
        for i, t, index in zip(image, text, own, strict=True)
    ]
    np.testing.assert_allclose(stack(statistics), np.reshape(expected, (size, 6)), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(0, 6),
    bank_size=st.integers(2, 9),
    seed=st.integers(0, 2**16),
    chunk=st.integers(1, 7),
    data=st.data(),
)
def test_partners_equal_the_reference(size: int, bank_size: int, seed: int, chunk: int, data: st.DataObject) -> None:
    image, text = embeddings(size, seed)
    bank_image, bank_text = embeddings(bank_size, seed + 1)
    own = data.draw(st.lists(st.integers(-1, bank_size - 1), min_size=size, max_size=size))
    pairs = image, text, bank_image, bank_text, 0.05, torch.tensor(own, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "CPU_TILE", data.draw(st.integers(1, 20)))
        statistics, partners = bank_statistics(*pairs, partners=True, chunk=chunk)
    torch.testing.assert_close(stack(statistics), stack(bank_statistics(*pairs)), rtol=1e-12, atol=1e-12)
    for i, index in enumerate(own):
        rivals = [j for j in range(bank_size) if j != index]
        best_text = max(rivals, key=lambda j: float(image[i] @ bank_text[j]))
        best_image = max(rivals, key=lambda j: float(text[i] @ bank_image[j]))
        assert (partners.text[i], partners.image[i]) == (best_text, best_image)
        assert partners.text_similarity[i].item() == pytest.approx(float(image[i] @ bank_text[best_text]), rel=1e-12)
        assert partners.image_similarity[i].item() == pytest.approx(float(text[i] @ bank_image[best_image]), rel=1e-12)


def test_a_pair_alone_in_the_bank_has_no_partner() -> None:
    image, text = embeddings(1, seed=0)
    _, partners = bank_statistics(image, text, image, text, 0.05, torch.tensor([0]), partners=True)
    assert partners.text_similarity.item() == partners.image_similarity.item() == -math.inf


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_pair_scores_the_same_alone_in_company_and_against_a_shuffled_bank(
    dtype: torch.dtype, tolerance: float
) -> None:
    image, text = embeddings(40, seed=0, dtype=dtype)
    bank_image, bank_text = embeddings(64, seed=1, dtype=dtype)
    own = torch.full((40,), -1)
    own[:5] = torch.tensor([3, 60, 0, 63, 17])
    image[:5], text[:5] = bank_image[own[:5]], bank_text[own[:5]]

    together = bank_statistics(image, text, bank_image, bank_text, 0.05, own)
    assert all(values.dtype == dtype for values in together)
    alone = torch.cat(
        [
            stack(bank_statistics(image[i, None], text[i, None], bank_image, bank_text, 0.05, own[i, None]))
            for i in range(40)
        ]
    )
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    moved = torch.where(own >= 0, order.argsort()[own], -1)
    shuffled = bank_statistics(image, text, bank_image[order], bank_text[order], 0.05, moved)
    # Logits reach 1/0.05 = 20, so that is the scale that rounding errors are relative to.
    torch.testing.assert_close(alone, stack(together), rtol=tolerance, atol=20 * tolerance)
    torch.testing.assert_close(stack(shuffled), stack(together), rtol=tolerance, atol=20 * tolerance)


def test_statistics_follow_a_permutation_and_a_swap_of_the_modalities() -> None:
    image, text = embeddings(9, seed=0)
    bank_image, bank_text = embeddings(12, seed=1)
    own = torch.full((9,), -1)
    statistics = bank_statistics(image, text, bank_image, bank_text, 0.05, own)
    order = torch.randperm(9)
    permuted = bank_statistics(image[order], text[order], bank_image, bank_text, 0.05, own)
    torch.testing.assert_close(stack(permuted), stack(statistics)[order])
    swapped = bank_statistics(text, image, bank_text, bank_image, 0.05, own)
    expected = statistics._replace(energy_image=statistics.energy_text, energy_text=statistics.energy_image)
    torch.testing.assert_close(stack(swapped), stack(expected))


def test_bank_pairs_score_against_the_bank_as_in_a_batch() -> None:
    bank_image, bank_text = embeddings(10, seed=0)
    statistics = bank_statistics(bank_image, bank_text, bank_image, bank_text, 0.05, torch.arange(10))
    torch.testing.assert_close(statistics.match_score, match_score(pair_logits(bank_image, bank_text, 0.05)))


def test_a_pair_alone_in_the_bank_is_certain() -> None:
    image, text = embeddings(1, seed=0)
    statistics = bank_statistics(image, text, image, text, 0.05, torch.tensor([0]))
    assert statistics.match_score.item() == 0.0
    assert statistics.swapped_entropy.item() == 0.0
    torch.testing.assert_close(statistics.energy, -statistics.similarity)


def test_the_surest_pairs_are_told_apart_in_float32() -> None:
    # 1 − p is about e⁻¹⁴ and e⁻¹³, less than half of what float32 resolves beside a logit of 100.
    image = text = torch.eye(3)[:1]
    far, near = (
        bank_statistics(image, text, rival, rival, 0.01, torch.tensor([-1])).match_score.item()
        for rival in (torch.tensor([[cosine, math.sqrt(1 - cosine**2), 0.0]]) for cosine in (0.86, 0.87))
    )
    assert 0 > far > near


def test_a_pair_far_below_its_rivals_keeps_its_score_in_float32() -> None:
    """exp(−200) is 0 in float32; its logarithm is not wanted of that."""
    image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    statistics = bank_statistics(image, text, image, image, 0.01, torch.tensor([-1]))
    expected = reference_statistics(image[0].numpy(), text[0].numpy(), image.numpy(), image.numpy(), 0.01, -1)
    np.testing.assert_allclose(stack(statistics)[0], expected, rtol=1e-6, atol=1e-6)
    assert statistics.match_score.item() == pytest.approx(-200 - math.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.07])
@pytest.mark.parametrize("noise", [0.2, 5.0])
def test_in_float32_nothing_is_rounded_more_than_by_plain_softmaxes(temperature: float, noise: float) -> None:
    """Of pairs that are certain, and of such as chance would make."""
    generator = torch.Generator().manual_seed(0)
    image, other = torch.randn(2, 3000, 64, generator=generator)
    image, text = normalize(image, dim=1), normalize(image + noise * other, dim=1)
    pairs = image[:300], text[:300], image[300:], text[300:]
    exact = stack(bank_statistics(*(side.double() for side in pairs), temperature, torch.full((300,), -1)))
    found, plain = stack(bank_statistics(*pairs, temperature, torch.full((300,), -1))), plainly(*pairs, temperature)
    error, allowed = ((one.double() - exact).abs().mean(dim=0) for one in (found, plain))
    assert (error < 1.25 * allowed + 1e-9).all()


def plainly(image: Tensor, text: Tensor, bank_image: Tensor, bank_text: Tensor, temperature: float) -> Tensor:
    """The six statistics of pairs outside the bank, without a thought for memory."""
    similarity = (image * text).sum(dim=1)
    own = similarity[:, None] / temperature
    image_logits = torch.cat([image @ bank_text.T / temperature, own], dim=1)
    text_logits = torch.cat([text @ bank_image.T / temperature, own], dim=1)
    log_p, log_r = image_logits.log_softmax(dim=1), text_logits.log_softmax(dim=1)
    energies = [temperature * log_prob[:, -1] - similarity for log_prob in (log_p, log_r)]
    entropy = -(log_p.exp() * log_r + log_r.exp() * log_p).sum(dim=1) / 2
    return torch.stack([similarity, *energies, sum(energies) / 2, log_p[:, -1] + log_r[:, -1], entropy], dim=1)


def test_equal_chunks_give_equal_scores_to_the_bit() -> None:
    image, text = embeddings(48, seed=0, dtype=torch.float32)
    sides = embeddings(500, seed=1, dtype=torch.float32)
    own = torch.full((48,), -1)
    whole = stack(bank_statistics(image, text, *sides, 0.01, own, chunk=16))
    for start in (0, 16, 32):
        here = slice(start, start + 16)
        assert torch.equal(stack(bank_statistics(image[here], text[here], *sides, 0.01, own[here])), whole[here])


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_the_banks_own_pairs_score_as_any_others(temperature: float) -> None:
    image, text = embeddings(30, seed=0)
    expected = bank_statistics(image, text, image, text, temperature, torch.arange(30)).match_score
    found = bank_match_scores(image, text, temperature, rival_sums(image, text, temperature))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_no_gradient_is_kept() -> None:
    image, text = (side.requires_grad_() for side in embeddings(4, seed=0))
    statistics = bank_statistics(image, text, image, text, 0.05, torch.arange(4))
    assert not any(values.requires_grad for values in statistics)
    assert not random_mismatches(image, text, 0.05, 2).match_score.requires_grad


def test_inputs_that_do_not_fit_are_refused() -> None:
    image, text = embeddings(4, seed=0)
    own = torch.full((4,), -1)
    with pytest.raises(ValueError, match="4, 3, 4"):
        bank_statistics(image, text[:3], image, text, 0.05, own)
    with pytest.raises(ValueError, match="4, 4, 2"):
        bank_statistics(image, text, image, text, 0.05, own[:2])
    with pytest.raises(ValueError, match="4 and 3"):
        bank_statistics(image, text, image, text[:3], 0.05, own)
    with pytest.raises(IndexError):
        bank_statistics(image, text, image, text, 0.05, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="4 and 3"):
        rival_sums(image, text[:3], 0.05)
    with pytest.raises(ValueError, match="holds 1"):
        rival_sums(image[:1], text[:1], 0.05)
    rivals = rival_sums(image, text, 0.05)
    with pytest.raises(ValueError, match="shift"):
        null_scores(image, text, 0.05, rivals, 0)
    with pytest.raises(ValueError, match="neighbour"):
        near_miss_scores(image, text, 0.05, rivals, torch.arange(4), 0)


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(2, 8),
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([0.01, 0.05, 1.0]),
)
def test_all_null_scores_equal_the_reference(size: int, seed: int, temperature: float) -> None:
    image, text = embeddings(size, seed)
    scores = random_mismatches(image, text, temperature, shifts=100).match_score
    expected = [
        reference_null_score(image.numpy(), text.numpy(), temperature, i, (i + shift) % size)
        for shift in range(1, size)
        for i in range(size)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 8), seed=st.integers(0, 2**16), neighbours=st.integers(1, 9))
def test_near_misses_equal_the_reference(size: int, seed: int, neighbours: int) -> None:
    sides = embeddings(size, seed)
    image, text = (side.numpy() for side in sides)
    chosen = torch.arange(0, size, 2)
    found = near_miss_scores(*sides, 0.05, rival_sums(*sides, 0.05), chosen, neighbours)
    pairs = []
    for i in chosen.tolist():
        others = sorted((j for j in range(size) if j != i), key=lambda j, i=i: -float(text[i] @ text[j]))  # type: ignore[misc]
        pairs += [(i, j) for j in others[:neighbours]]
    np.testing.assert_allclose(
        found.match_score, [reference_null_score(image, text, 0.05, i, j) for i, j in pairs], rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(found.similarity, [image[i] @ text[j] for i, j in pairs], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shifts", [1, 2, 5, 10])
def test_few_shifts_are_different_mismatches_spread_over_the_bank(shifts: int) -> None:
    size = 11
    image, text = embeddings(size, seed=0)
    by_shift = random_mismatches(image, text, 0.05, shifts=size - 1).match_score.reshape(size - 1, size)
    scores = random_mismatches(image, text, 0.05, shifts=shifts).match_score.reshape(shifts, size)
    taken = [
        next(s for s, row in enumerate(by_shift, start=1) if torch.allclose(row, scores[k])) for k in range(shifts)
    ]
    assert taken == sorted(set(taken))
    assert max(np.diff([0, *taken, size])) <= math.ceil(size / shifts) + 1


def test_null_scores_keep_the_dtype_and_nearly_the_value_in_float32() -> None:
    image, text = embeddings(200, seed=0, dtype=torch.float32)
    scores = random_mismatches(image, text, 0.05, shifts=3).match_score
    assert scores.dtype == torch.float32
    expected = random_mismatches(image.double(), text.double(), 0.05, shifts=3).match_score
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_null_scores_are_distributed_as_those_of_mismatches_outside_the_bank() -> None:
    # A small bank, where without the correction for the number of candidates the two would differ by 2·log(9/7) = 0.5.
    null, outside = [], []
    for seed in range(600):
        image, text = embeddings(10, seed)
        bank_image, bank_text = image[:8], text[:8]
        null.append(random_mismatches(bank_image, bank_text, 1.0, shifts=7).match_score.mean())
        pair = bank_statistics(image[8:9], text[9:], bank_image, bank_text, 1.0, torch.tensor([-1]))
        outside.append(pair.match_score[0])
    assert torch.stack(null).mean().item() == pytest.approx(torch.stack(outside).mean().item(), abs=0.12)
