from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from noisyclean.training.memory import EmbeddingMemory


def embeddings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    image, text = normalize(torch.randn(2, count, 5, generator=torch.Generator().manual_seed(seed)), dim=2)
    return image, text


def similarity(memory: EmbeddingMemory, *rows: int) -> Tensor | None:
    """Of a process that is alone with the pairs."""
    found = memory.similarity(torch.tensor(rows), slice(0, len(rows)), lambda own: own)
    assert found is None or found.images is found.texts
    return None if found is None else found.whole


def test_it_tells_what_it_was_told_last() -> None:
    memory = EmbeddingMemory(np.array([30, 7, 12, 9]))
    assert similarity(memory, 7, 12) is None
    memory.remember(torch.tensor([12, 7, 30]), *embeddings(3, seed=1))
    image, text = embeddings(3, seed=2)
    memory.remember(torch.tensor([30, 12, 7]), image, text)
    asked = similarity(memory, 7, 30, 12)
    order = torch.tensor([2, 0, 1])
    assert asked is not None
    torch.testing.assert_close(asked, image[order] @ text[order].T, atol=2e-3, rtol=0)  # half precision


def test_an_unknown_pair_is_compared_with_none() -> None:
    memory = EmbeddingMemory(np.arange(4))
    image, text = embeddings(2, seed=1)
    memory.remember(torch.tensor([3, 1]), image, text)
    asked = similarity(memory, 1, 0, 3)
    assert asked is not None
    assert asked[1].tolist() == asked[:, 1].tolist() == [-torch.inf, 0.0, -torch.inf]
    torch.testing.assert_close(asked[0, 2], image[1] @ text[0], atol=2e-3, rtol=0)


def test_another_goes_on_from_its_state() -> None:
    memory, other = (EmbeddingMemory(np.arange(4)) for _ in range(2))
    memory.remember(torch.tensor([0, 2]), *embeddings(2, seed=3))
    other.state = memory.state
    first, second = similarity(memory, 0, 1, 2, 3), similarity(other, 0, 1, 2, 3)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_of_a_batch_that_is_shared_only_the_own_pairs_are_compared() -> None:
    memory = EmbeddingMemory(np.arange(6))
    memory.remember(torch.tensor([4, 0, 2, 5]), *embeddings(4, seed=4))
    rows = torch.tensor([5, 1, 4, 2, 0])  # nothing is known of 1
    whole = similarity(memory, *rows.tolist())
    part = memory.similarity(rows, slice(1, 3), lambda own: own)
    assert whole is not None
    assert part is not None
    torch.testing.assert_close(part.images, whole[1:3])
    torch.testing.assert_close(part.texts, whole[:, 1:3])
    assert part.first == 1
