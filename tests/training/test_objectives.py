"""What each objective minimises, checked against the formulas it is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from noisyclean.objectives import rince_loss, triplet_loss
from noisyclean.recipe import OBJECTIVES, load_recipe
from noisyclean.srem import (
    PairMatrix,
    agreement,
    complementary_loss,
    soft_target_loss,
    swapped_pair_weight,
    swapped_weights,
    transition_complementary_loss,
    weighted_contrastive_loss,
)
from noisyclean.training.objectives import Objective, Step, make_objective

SIZE = 8
PAIRS = 20


def objective(name: str = "srem", **keys: Any) -> Objective:
    overrides = [f"objective.name={name}", *(f"objective.{key}={value}" for key, value in keys.items())]
    return make_objective(load_recipe(None, overrides).objective, PAIRS)


def step(
    *,
    epoch: int = 5,
    progress: float = 0.5,
    weights: Tensor | None = None,
    taught: Tensor | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Step:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, SIZE, 4, generator=generator, dtype=torch.float64)
    similarity = torch.nn.functional.normalize(image, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    return Step(
        similarity=PairMatrix.of((scale * similarity).requires_grad_()),
        temperature=torch.tensor(0.1, dtype=torch.float64),
        rows=torch.arange(3, 3 + SIZE),
        weights=weights,
        taught=None if taught is None else PairMatrix.of(taught),
        epoch=epoch,
        progress=progress,
    )


WEIGHTS = torch.linspace(0, 1, SIZE, dtype=torch.float64)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("epoch", [0, 5])
def test_every_objective_can_be_minimised(name: str, epoch: int) -> None:
    made = objective(name)
    given = step(epoch=epoch)
    before = made.terms(given)["loss"]
    (gradient,) = torch.autograd.grad(before, given.similarity.whole)
    assert before.isfinite()
    assert gradient.abs().sum() > 0
    after = made.terms(step(epoch=epoch))["loss"]  # labels may have been refined in between
    moved = objective(name).terms(
        replace(given, similarity=given.similarity.map(lambda cosines: cosines - 0.01 * gradient))
    )["loss"]
    assert moved < before
    assert after.isfinite()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_hopelessly_wrong_pairs_have_finite_gradients(name: str) -> None:
    similarity = (1 - 2 * torch.eye(SIZE)).requires_grad_()
    given = Step(PairMatrix.of(similarity), torch.tensor(0.01), torch.arange(SIZE), None, None, 5, 0.5)
    loss = objective(name).terms(given)["loss"]
    (gradient,) = torch.autograd.grad(loss, similarity)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("weighting", ["none", "swapped", "cross"])
@pytest.mark.parametrize("form", ["simple", "transition"])
def test_srem_is_the_sum_of_its_terms(weighting: str, form: str) -> None:
    made = objective(complementary=form, complementary_weight=0.3, complementary_bias=0.1, entropy_weighting=weighting)
    given = step(weights=WEIGHTS)
    image_weights = text_weights = None
    if weighting == "swapped":
        image_weights, text_weights = swapped_weights(given.logits)
    elif weighting == "cross":
        image_weights = text_weights = swapped_pair_weight(given.logits)
    matching = weighted_contrastive_loss(given.logits, WEIGHTS, image_weights=image_weights, text_weights=text_weights)
    negative = complementary_loss if form == "simple" else transition_complementary_loss
    complementary = (SIZE - 1) * negative(given.logits, 0.1)
    terms = made.terms(given)
    torch.testing.assert_close(terms["matching"], matching)
    torch.testing.assert_close(terms["complementary"], complementary)
    torch.testing.assert_close(terms["loss"], matching + 0.3 * complementary)


def test_a_fading_complementary_term_is_gone_at_the_end() -> None:
    made = objective(complementary_weight=1.0, complementary_schedule="fade")
    for progress, share in ((0.0, 1.0), (0.75, 0.25), (1.0, 0.0)):
        terms = made.terms(step(progress=progress))
        torch.testing.assert_close(terms["loss"], terms["matching"] + share * terms["complementary"])


def test_the_warm_up_takes_all_pairs_alike() -> None:
    made = objective(warmup_epochs=2)
    torch.testing.assert_close(made.terms(step(epoch=1, weights=WEIGHTS)), made.terms(step(epoch=1)))
    warm = objective(warmup_epochs=2, warmup="complementary").terms(step(epoch=1))
    torch.testing.assert_close(warm["loss"], (SIZE - 1) * complementary_loss(step().logits))
    assert "matching" in objective(warmup_epochs=2, warmup="complementary").terms(step(epoch=2))


@pytest.mark.parametrize("rule", ["and", "or"])
def test_agreement_leaves_out_pairs_that_others_fit_better(rule: str) -> None:
    given = step(weights=WEIGHTS, seed=3)
    image, text = agreement(given.logits)
    kept = (image & text) if rule == "and" else (image | text)
    assert kept.sum() < SIZE
    expected = weighted_contrastive_loss(given.logits, WEIGHTS * kept)
    terms = objective(agreement=rule, complementary_weight=0).terms(given)
    torch.testing.assert_close(terms["loss"], expected)


def test_the_energy_bank_follows_the_pairs_that_disagree() -> None:
    made = objective(threshold="energy_bank", complementary_weight=0)
    logits = step().logits.whole.detach()
    energy = -0.1 * (logits.logsumexp(1) + logits.logsumexp(0)) / 2
    disagrees = ~torch.stack(agreement(logits)).all(0)
    threshold = energy[disagrees].mean()
    torch.testing.assert_close(
        made.terms(step())["loss"], weighted_contrastive_loss(step().logits, (energy < threshold).double())
    )
    torch.testing.assert_close(made.state["energy_threshold"], threshold)
    made.terms(step(seed=1))
    moved = made.state["energy_threshold"] - threshold
    assert 0 < moved.abs() < 0.05 * threshold.abs()


def test_soft_targets_share_the_matching_loss() -> None:
    taught = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    made = objective(soft_targets=0.25, complementary_weight=0, warmup_epochs=2)
    given = step(weights=WEIGHTS, taught=taught)
    hard = weighted_contrastive_loss(given.logits, WEIGHTS)
    soft = soft_target_loss(given.logits, taught / given.temperature)
    torch.testing.assert_close(made.terms(given)["loss"], 0.75 * hard + 0.25 * soft)
    torch.testing.assert_close(made.terms(step(weights=WEIGHTS))["loss"], hard)
    early = step(epoch=1, taught=taught)
    torch.testing.assert_close(made.terms(early)["loss"], weighted_contrastive_loss(early.logits))


def test_a_triplet_warms_up_on_all_negatives() -> None:
    made = objective(matching="triplet", complementary_weight=0, warmup_epochs=2, margin=0.3)
    similarity = step().similarity.whole
    torch.testing.assert_close(made.terms(step(epoch=1))["loss"], triplet_loss(similarity, margin=0.3, hardest=False))
    torch.testing.assert_close(
        made.terms(step(epoch=2, weights=WEIGHTS))["loss"], triplet_loss(similarity, WEIGHTS, margin=0.3)
    )


def test_baselines_are_their_formulas() -> None:
    logits, similarity = step().logits.whole, step().similarity.whole
    torch.testing.assert_close(objective("infonce").terms(step())["loss"], weighted_contrastive_loss(logits))
    torch.testing.assert_close(
        objective("ncr").terms(step(weights=WEIGHTS))["loss"], weighted_contrastive_loss(logits, WEIGHTS)
    )
    torch.testing.assert_close(objective("rcl").terms(step())["loss"], (SIZE - 1) * complementary_loss(logits))
    torch.testing.assert_close(
        objective("rince", exponent=0.4, density=0.02).terms(step())["loss"],
        rince_loss(logits, q=0.4, density=0.02),
    )
    made = objective("vse", margin=0.1, warmup_epochs=1)
    torch.testing.assert_close(made.terms(step(epoch=0))["loss"], triplet_loss(similarity, margin=0.1, hardest=False))
    torch.testing.assert_close(made.terms(step(epoch=1))["loss"], triplet_loss(similarity, margin=0.1))


@pytest.mark.parametrize("name", ["decl", "crcl"])
def test_labels_are_refined_for_the_pairs_of_the_batch_only(name: str) -> None:
    made = objective(name)
    for _ in range(3):
        made.terms(step())
    labels = made.state["labels"]
    outside = torch.cat([labels[:3], labels[3 + SIZE :]])
    assert (outside == 1).all()
    assert (labels[3 : 3 + SIZE] < 1).any()
    assert ((labels >= 0) & (labels <= 1)).all()
