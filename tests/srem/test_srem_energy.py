import math

import pytest
import torch
from scipy.special import logsumexp

from noisyclean.srem import energy, pair_energies


def test_energies_equal_the_reference() -> None:
    logits = 20 * torch.randn(6, 6, dtype=torch.float64)
    energy_image, energy_text = pair_energies(logits, 0.07)
    for i in range(6):
        assert energy_image[i].item() == pytest.approx(-0.07 * logsumexp(logits[i].numpy()))
        assert energy_text[i].item() == pytest.approx(-0.07 * logsumexp(logits[:, i].numpy()))


@pytest.mark.parametrize(("similarity", "temperature", "size"), [(0.3, 0.01, 7), (-0.2, 0.05, 1), (0.0, 1.0, 128)])
def test_uniform_logits_have_the_energy_of_one_lowered_by_their_number(
    similarity: float, temperature: float, size: int
) -> None:
    logits = torch.full((3, size), similarity / temperature, dtype=torch.float64)
    expected = -similarity - temperature * math.log(size)
    torch.testing.assert_close(energy(logits, temperature), torch.full((3,), expected, dtype=torch.float64))


def test_a_masked_candidate_does_not_count() -> None:
    logits = torch.randn(4, 5)
    masked = torch.cat([logits, torch.full((4, 2), -torch.inf)], dim=1)
    torch.testing.assert_close(energy(masked, 0.05), energy(logits, 0.05))


def test_swapping_the_modalities_swaps_the_energies() -> None:
    logits = torch.randn(5, 5)
    torch.testing.assert_close(pair_energies(logits.T, 0.05), pair_energies(logits, 0.05)[::-1])
