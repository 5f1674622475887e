"""What a fold's model minimises: SREM, or one of the baselines; made from the recipe's ``objective`` section.

An objective is given each step's similarities and returns the loss with its terms. What it must remember from step to
step is in its ``state``, tensors that travel in the checkpoint. The formulas are in :mod:`noisyclean.srem` and
:mod:`noisyclean.objectives`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, assert_never

import torch
from torch import Tensor

from noisyclean.objectives import (
    active_complementary_loss,
    dynamic_hinge_loss,
    evidence_agreement,
    evidential_loss,
    refine_labels,
    rince_loss,
    triplet_loss,
)
from noisyclean.recipe import (
    CrclObjective,
    DeclObjective,
    InfoNCEObjective,
    NcrObjective,
    ObjectiveRecipe,
    RclObjective,
    RinceObjective,
    SremObjective,
    VseObjective,
)
from noisyclean.srem import (
    PairMatrix,
    agreement,
    complementary_loss,
    pair_energies,
    soft_target_loss,
    swapped_pair_weight,
    swapped_weights,
    transition_complementary_loss,
    weighted_contrastive_loss,
)

ENERGY_MOMENTUM = 0.99
"""Share of the energy bank's moving average that a step keeps (ours)."""
DECL_NEGATIVES = 5
"""The number of negatives that DECL's hinge ends with."""


@dataclass(frozen=True, slots=True)
class Step:
    """One batch of B pairs as an objective sees it.

    Attributes:
        similarity: [B, B] float32 cosines, of which each process of a training holds those of its own pairs.
        temperature: τ, a scalar tensor.
        rows: (B,) int64 rows of the index, on the CPU.
        weights: (B,) how clean the filter holds each pair to be; None: not filtered yet.
        taught: [B, B] cosines as the model itself saw the pairs an epoch ago; None: not yet, or not wanted.
        epoch: from 0.
        progress: the share of the training that is done, in [0, 1].
    """

    similarity: PairMatrix
    temperature: Tensor
    rows: Tensor
    weights: Tensor | None
    taught: PairMatrix | None
    epoch: int
    progress: float

    @property
    def logits(self) -> PairMatrix:
        """[B, B] similarities over τ."""
        return self.similarity / self.temperature


class Objective(Protocol):
    """A training objective. What it computes, every process of a training computes alike, of the whole batch."""

    state: dict[str, Tensor]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """The scalar ``loss`` to minimise, and whatever parts of it are worth logging."""


def make_objective(recipe: ObjectiveRecipe, pairs: int) -> Objective:
    """The objective of a recipe, for a corpus whose index has ``pairs`` rows."""
    match recipe:
        case SremObjective():
            return _Srem(recipe)
        case InfoNCEObjective() | NcrObjective():  # NCR is a filter: its loss is that of the pairs it selects
            return _Contrastive()
        case VseObjective():
            return _Vse(recipe)
        case DeclObjective():
            return _Decl(recipe, pairs)
        case RclObjective():
            return _Rcl()
        case CrclObjective():
            return _Crcl(recipe, pairs)
        case RinceObjective():
            return _Rince(recipe)
        case _:
            assert_never(recipe)


class _Srem:
    def __init__(self, recipe: SremObjective) -> None:
        self.recipe = recipe
        # The energy bank's moving average; nan before a pair has disagreed.
        self.state = {"energy_threshold": torch.tensor(torch.nan)} if recipe.threshold == "energy_bank" else {}

    def terms(self, step: Step) -> dict[str, Tensor]:
        recipe = self.recipe
        logits = step.logits
        # Summed over a pair's B − 1 negatives, which is RCL's own scale: the mean would vanish beside the other term,
        # the more so the larger the batch.
        negative = transition_complementary_loss if recipe.complementary == "transition" else complementary_loss
        complementary = (len(logits) - 1) * negative(logits, recipe.complementary_bias)
        warming_up = step.epoch < recipe.warmup_epochs
        if warming_up and recipe.warmup == "complementary":
            return {"loss": complementary, "complementary": complementary}
        matching = self._matching(step, logits, None if warming_up else self._weights(step, logits.detach()))
        weight = recipe.complementary_weight
        if recipe.complementary_schedule == "fade":
            weight *= 1 - step.progress
        found = {"matching": matching, "complementary": complementary}
        if recipe.soft_targets and not warming_up and step.taught is not None:
            found["soft_target"] = soft_target_loss(logits, step.taught / step.temperature)
            matching = torch.lerp(matching, found["soft_target"], recipe.soft_targets)
        return {"loss": matching + weight * complementary, **found}

    def _matching(self, step: Step, logits: PairMatrix, weights: Tensor | None) -> Tensor:
        recipe = self.recipe
        image_weights = text_weights = None
        match recipe.entropy_weighting:
            case "none":
                pass
            case "swapped":
                image_weights, text_weights = swapped_weights(logits.detach())
            case "cross":
                image_weights = text_weights = swapped_pair_weight(logits.detach())
            case _:
                assert_never(recipe.entropy_weighting)
        if recipe.matching == "triplet":
            if image_weights is not None and text_weights is not None:
                entropy_weights = (image_weights + text_weights) / 2
                weights = entropy_weights if weights is None else weights * entropy_weights
            # The hardest negative of an untrained encoder is noise, and collapses it: the warm-up takes the sum.
            hardest = step.epoch >= recipe.warmup_epochs
            return triplet_loss(step.similarity.whole, weights, margin=recipe.margin, hardest=hardest)
        return weighted_contrastive_loss(logits, weights, image_weights=image_weights, text_weights=text_weights)

    def _weights(self, step: Step, logits: PairMatrix) -> Tensor:
        """How clean the filter of the epoch and the rules of the batch together hold each pair to be."""
        weights = step.temperature.new_ones(len(logits)) if step.weights is None else step.weights
        if self.recipe.agreement == "none" and self.recipe.threshold != "energy_bank":
            return weights
        image_agrees, text_agrees = agreement(logits)
        match self.recipe.agreement:
            case "none":
                pass
            case "and":
                weights = weights * (image_agrees & text_agrees)
            case "or":
                weights = weights * (image_agrees | text_agrees)
            case _:
                assert_never(self.recipe.agreement)
        if self.recipe.threshold == "energy_bank":
            image_energy, text_energy = pair_energies(logits, step.temperature.detach())
            energy = (image_energy + text_energy) / 2
            weights = weights * (energy < self._energy_threshold(energy, ~(image_agrees & text_agrees)))
        return weights

    def _energy_threshold(self, energy: Tensor, disagrees: Tensor) -> Tensor:
        if disagrees.any():
            mean = energy[disagrees].mean().cpu()
            before = self.state["energy_threshold"]
            kept = mean if before.isnan() else before.lerp(mean, 1 - ENERGY_MOMENTUM)
            self.state["energy_threshold"] = kept
        threshold = self.state["energy_threshold"]
        # No pair has ever disagreed: all are clean.
        return torch.full_like(threshold, torch.inf) if threshold.isnan() else threshold


class _Contrastive:
    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def terms(self, step: Step) -> dict[str, Tensor]:
        return {"loss": weighted_contrastive_loss(step.logits, step.weights)}


class _Vse:
    def __init__(self, recipe: VseObjective) -> None:
        self.recipe = recipe
        self.state: dict[str, Tensor] = {}

    def terms(self, step: Step) -> dict[str, Tensor]:
        hardest = step.epoch >= self.recipe.warmup_epochs
        return {"loss": triplet_loss(step.similarity.whole, margin=self.recipe.margin, hardest=hardest)}


class _Decl:
    def __init__(self, recipe: DeclObjective, pairs: int) -> None:
        self.recipe = recipe
        self.state = {"labels": torch.ones(pairs)}

    def terms(self, step: Step) -> dict[str, Tensor]:
        recipe, similarity = self.recipe, step.similarity.whole
        labels = None
        if step.epoch >= recipe.warmup_epochs:
            labels = _recall(self.state["labels"], step.rows, similarity)
        agrees = evidence_agreement(similarity.detach(), recipe.evidence_temperature)
        self.state["labels"][step.rows] = agrees.float().cpu()  # for the pair's next turn, in the next epoch
        evidential = evidential_loss(similarity, recipe.evidence_temperature, labels, kl_weight=recipe.kl_weight)
        # All negatives at first and the hardest few at the end. Theirs comes down to these in its first 5,000 steps,
        # more than a small training has; and too few of them too early collapse an encoder from scratch.
        size = len(similarity)
        negatives = max(round(size * (1 - step.progress)), min(DECL_NEGATIVES, size))
        hinge = dynamic_hinge_loss(similarity.tanh(), labels, negatives=negatives, margin=recipe.margin)
        clean = size if labels is None else labels.sum()
        loss = evidential + recipe.hinge_weight * clean * hinge
        return {"loss": loss, "evidential": evidential, "hinge": hinge}


class _Rcl:
    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def terms(self, step: Step) -> dict[str, Tensor]:
        return {"loss": (len(step.rows) - 1) * complementary_loss(step.logits)}


class _Crcl:
    def __init__(self, recipe: CrclObjective, pairs: int) -> None:
        self.recipe = recipe
        self.state = {"labels": torch.ones(pairs)}

    def terms(self, step: Step) -> dict[str, Tensor]:
        logits = step.logits.whole
        labels = _recall(self.state["labels"], step.rows, logits)
        if step.epoch >= self.recipe.warmup_epochs:
            labels = refine_labels(labels, logits.detach(), momentum=self.recipe.momentum)
            self.state["labels"][step.rows] = labels.float().cpu()
        loss = active_complementary_loss(logits, labels, complementary_weight=self.recipe.complementary_weight)
        return {"loss": loss}


class _Rince:
    def __init__(self, recipe: RinceObjective) -> None:
        self.recipe = recipe
        self.state: dict[str, Tensor] = {}

    def terms(self, step: Step) -> dict[str, Tensor]:
        return {"loss": rince_loss(step.logits.whole, q=self.recipe.exponent, density=self.recipe.density)}


def _recall(labels: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return labels[rows].to(like.device, like.dtype)
