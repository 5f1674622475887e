import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from noisyclean.srem import pair_logits


def test_each_entry_is_a_similarity_over_the_temperature() -> None:
    image, text = torch.randn(2, 5, 3, dtype=torch.float64)
    logits = pair_logits(image, text, 0.05)
    for i in range(5):
        for j in range(5):
            assert logits[i, j].item() == pytest.approx(np.dot(image[i].numpy(), text[j].numpy()) / 0.05)


def test_the_temperature_may_be_learned() -> None:
    image, text = normalize(torch.randn(2, 4, 8), dim=-1)
    temperature = torch.tensor(0.05, requires_grad=True)
    pair_logits(image, text, temperature).sum().backward()
    assert temperature.grad is not None
    assert temperature.grad.isfinite()


def test_unpaired_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape.*\[3, 8\] and \[4, 8\]"):
        pair_logits(torch.randn(3, 8), torch.randn(4, 8), 0.05)
