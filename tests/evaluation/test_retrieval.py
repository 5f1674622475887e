"""Retrieval figures equal those of sorting every list by hand, ties and all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.evaluation.retrieval import Retrieval, five_fold, retrieval

Case = tuple[Tensor, Tensor, NDArray[np.int64]]


@st.composite
def cases(draw: st.DrawFn, least: int = 1) -> Case:
    """Whole numbers: their products are exact, and many of them tie. Captions in a random order."""
    seed = draw(st.integers(0, 2**20))
    random = np.random.default_rng(seed)
    images = draw(st.integers(least, 14))
    captions = random.integers(1, 6, images)
    owner = random.permutation(np.repeat(np.arange(images), captions))
    spread = draw(st.sampled_from([0, 1, 2, 9]))
    image = random.integers(-spread, spread + 1, (images, 3))
    text = random.integers(-spread, spread + 1, (len(owner), 3)) + draw(st.booleans()) * image[owner]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(image, dtype=dtype), torch.tensor(text, dtype=dtype), owner


def reference(image: Tensor, text: Tensor, owner: NDArray[np.int64]) -> Retrieval:
    scores = image.double().numpy() @ text.double().numpy().T
    image_ranks, text_ranks = [], []
    for i in range(len(image)):  # sorted by score, of equal ones the wrong first
        order = sorted(range(len(text)), key=lambda t: (-scores[i, t], owner[t] == i))
        image_ranks.append(1 + next(place for place, t in enumerate(order) if owner[t] == i))
    for t in range(len(text)):
        order = sorted(range(len(image)), key=lambda i: (-scores[i, t], owner[t] == i))
        text_ranks.append(1 + order.index(owner[t]))

    def recalls(ranks: list[int]) -> tuple[float, float, float]:
        first, second, third = (100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10))
        return first, second, third

    return Retrieval(
        recalls(image_ranks), recalls(text_ranks), float(np.median(image_ranks)), float(np.median(text_ranks))
    )


def assert_equal(found: Retrieval, expected: Retrieval) -> None:
    assert found.image_to_text == pytest.approx(expected.image_to_text)
    assert found.text_to_image == pytest.approx(expected.text_to_image)
    assert (found.image_median_rank, found.text_median_rank) == pytest.approx(
        (expected.image_median_rank, expected.text_median_rank)
    )


@settings(max_examples=60)
@given(case=cases(), chunk=st.integers(1, 16))
def test_figures_equal_the_sorted_lists(case: Case, chunk: int) -> None:
    assert_equal(retrieval(*case, chunk=chunk), reference(*case))


@settings(max_examples=40)
@given(case=cases(least=3), folds=st.integers(1, 3))
def test_folds_are_contiguous_and_averaged(case: Case, folds: int) -> None:
    image, text, owner = case
    parts = []
    for rows in np.array_split(np.arange(len(image)), folds) if len(image) % folds == 0 else []:
        captions = np.isin(owner, rows)
        parts.append(reference(image[torch.from_numpy(rows)], text[captions], owner[captions] - rows[0]))
    found = five_fold(image, text, owner, folds)
    if parts:
        assert found.image_to_text == pytest.approx(np.mean([part.image_to_text for part in parts], axis=0))
        assert found.text_to_image == pytest.approx(np.mean([part.text_to_image for part in parts], axis=0))
        assert found.image_median_rank == pytest.approx(np.mean([part.image_median_rank for part in parts]))
        assert found.text_median_rank == pytest.approx(np.mean([part.text_median_rank for part in parts]))
    if folds == 1:
        assert_equal(found, retrieval(image, text, owner))


def test_uneven_folds_keep_every_image() -> None:
    eye = torch.eye(7)
    assert five_fold(eye, eye, np.arange(7)).rsum == pytest.approx(600)


def test_the_chunk_does_not_matter_to_float32_embeddings_with_duplicates() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(90, 33, generator=generator), dim=1)
    image[60:] = image[:30]  # each of them ties with its double
    owner = np.repeat(np.arange(90), 3)
    text = torch.nn.functional.normalize(image[owner] + torch.randn(270, 33, generator=generator), dim=1)
    whole = retrieval(image, text, owner, chunk=90)
    assert 0 < whole.text_to_image[0] < 100
    assert all(retrieval(image, text, owner, chunk=chunk) == whole for chunk in (1, 7, 32, 1000))


def test_an_encoder_that_maps_everything_to_one_point_finds_nothing() -> None:
    image, text = torch.ones(50, 4), torch.ones(100, 4)
    collapsed = retrieval(image, text, np.repeat(np.arange(50), 2))
    assert collapsed.rsum == 0
    assert (collapsed.image_median_rank, collapsed.text_median_rank) == (99, 50)


def test_figures_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 0.7]])  # the second belongs to image 0 but fits image 1
    found = retrieval(image, text, np.array([0, 0, 1]))
    assert found.image_to_text == pytest.approx((50, 100, 100))
    assert found.text_to_image == pytest.approx((200 / 3, 100, 100))
    assert (found.image_median_rank, found.text_median_rank) == (1.5, 1)
    assert found.rsum == pytest.approx(50 + 200 / 3 + 400)
    assert json.loads(json.dumps(found.to_dict()))["rsum"] == found.rsum


def test_inputs_that_do_not_fit_are_refused() -> None:
    image, text, owner = torch.eye(3), torch.eye(3), np.arange(3)
    for wrong, message in [
        (np.array([0, 0, 1]), "1 of 3 images have no caption, the first being image 2"),
        (np.array([0, 1, 3]), "image 3, but there are 3"),
        (np.array([-1, 1, 2]), "image -1, but"),
        (np.array([0, 1]), "one integer index"),
        (np.array([0.0, 1.0, 2.0]), "one integer index"),
    ]:
        with pytest.raises(ValueError, match=message):
            retrieval(image, text, wrong)
        with pytest.raises(ValueError, match=message):
            five_fold(image, text, wrong, 3)
    with pytest.raises(ValueError, match="width"):
        retrieval(image, torch.eye(4)[:3], owner)
    with pytest.raises(ValueError, match="no image"):
        retrieval(image[:0], text[:0], owner[:0])
    with pytest.raises(ValueError, match="have no caption"):
        retrieval(image, text[:0], owner[:0])
    with pytest.raises(ValueError, match="not finite"):
        retrieval(image, text * torch.nan, owner)
    for folds in (0, 4):
        with pytest.raises(ValueError, match="between 1 and 3"):
            five_fold(image, text, owner, folds)
