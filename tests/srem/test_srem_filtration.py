import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from noisyclean.srem import agreement, match_score, pair_energies


def test_agreement_is_told_of_each_direction() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [4.0, 2.0, 1.0], [0.0, 0.0, 5.0]])
    image_to_text, text_to_image = agreement(logits)
    assert image_to_text.tolist() == [True, False, True]
    assert text_to_image.tolist() == [False, True, True]


def test_agreement_swaps_with_the_modalities_and_follows_a_permutation() -> None:
    logits = torch.randn(9, 9)
    order = torch.randperm(9)
    image_to_text, text_to_image = agreement(logits)
    assert [flags.tolist() for flags in agreement(logits.T)] == [text_to_image.tolist(), image_to_text.tolist()]
    permuted = agreement(logits[order][:, order])
    assert [flags.tolist() for flags in permuted] == [image_to_text[order].tolist(), text_to_image[order].tolist()]


def test_match_score_equals_the_reference() -> None:
    logits = 10 * torch.randn(6, 6, dtype=torch.float64)
    z = logits.numpy()
    expected = [log_softmax(z[i])[i] + log_softmax(z[:, i])[i] for i in range(6)]
    np.testing.assert_allclose(match_score(logits), expected, rtol=1e-12)
    torch.testing.assert_close(match_score(logits.T), match_score(logits))


@pytest.mark.parametrize("temperature", [0.01, 0.05])
def test_match_score_is_the_similarity_corrected_by_both_energies(temperature: float) -> None:
    similarity = torch.rand(7, 7, dtype=torch.float64)
    energy_image, energy_text = pair_energies(similarity / temperature, temperature)
    expected = (2 * similarity.diagonal() + energy_image + energy_text) / temperature
    torch.testing.assert_close(match_score(similarity / temperature), expected)


def test_match_score_is_never_positive() -> None:
    assert (match_score(100 * torch.eye(5)) <= 0).all()
