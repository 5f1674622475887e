"""The ``objective`` section of a recipe: SREM with its switches, or one of the baselines it is compared with."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from noisyclean.recipe.section import Section


class SremObjective(Section):
    """SREM: clean-weighted matching loss + λ · complementary loss over all pairs."""

    name: Literal["srem"] = "srem"
    warmup_epochs: int = Field(2, ge=1, description="epochs in which every pair counts as clean; fewer than the epochs")
    warmup: Literal["matching", "complementary"] = Field(
        "matching", description="loss of the warm-up: that of clean pairs, or the complementary loss alone"
    )
    judge: Literal["out-of-fold", "in-sample"] = Field(
        "out-of-fold", description="who filters a pair: the model that never trains on it, or the one that does"
    )
    statistic: Literal["match_score", "similarity", "energy"] = Field(
        "match_score", description="what a mixture tells clean pairs by"
    )
    threshold: Literal["posterior", "q_value", "mixture", "energy_bank", "none"] = Field(
        "posterior",
        description="posterior: weight = match probability under the shuffled null; q_value: the pairs with q ≤ "
        "filter_fdr; mixture: posterior of the better of two Gaussians; energy_bank: the pairs of a batch below the "
        "moving average of the disagreeing pairs' energies; none: only agreement selects",
    )
    selectivity: float = Field(
        3.0,
        ge=1,
        description="exponent of a weight: 1, the probability of being clean; higher, the surest pairs count most",
    )
    min_trained_share: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="lower the exponent, where the weights would come down to fewer of the pairs than this share",
    )
    neighbours: int = Field(
        10,
        ge=0,
        description="pairs like it, by picture and by caption, that are asked for a second opinion of how clean a pair "
        "is, which counts where it tells more; 0: none",
    )
    filter_fdr: float = Field(
        0.1, gt=0, lt=1, description="the mismatch rate asked of the pairs with threshold q_value"
    )
    agreement: Literal["none", "and", "or"] = Field(
        "none", description="keep only pairs that are their own best match in the batch, both ways (and) or one (or)"
    )
    entropy_weighting: Literal["none", "swapped", "cross"] = Field(
        "none",
        description="swapped: the entropy of the other modality's prediction weights this modality's loss; cross: the "
        "swapped cross-entropy weights the pair",
    )
    matching: Literal["cross_entropy", "triplet"] = Field(
        "cross_entropy", description="loss of the clean pairs: softmax over the batch, or hardest-negative hinge"
    )
    margin: float = Field(0.2, gt=0, description="margin of the triplet loss")
    complementary: Literal["simple", "transition"] = Field(
        "simple", description="form of the complementary loss: of each p alone, or through a transition matrix"
    )
    complementary_bias: float = Field(
        0.0, ge=0, description="0: all negatives count alike; 1: in proportion to the softmax over the negatives"
    )
    complementary_weight: float = Field(0.05, ge=0, description="λ of the complementary loss over all pairs")
    complementary_schedule: Literal["constant", "fade"] = Field(
        "constant", description="fade: λ falls linearly to 0 over the training"
    )
    soft_targets: float = Field(
        0.4,
        ge=0,
        le=1,
        description="share of the matching loss whose target is what the model itself predicted an epoch ago; keeps "
        "4·d bytes of embeddings a pair in memory",
    )


class InfoNCEObjective(Section):
    """The symmetric cross-entropy on all pairs, as CLIP trains."""

    name: Literal["infonce"]


class VseObjective(Section):
    """VSE++: the hinge of the hardest negative on all pairs; the sum over all negatives in the warm-up."""

    name: Literal["vse"]
    margin: float = Field(0.2, gt=0, description="margin between a pair and its rivals, in cosine")
    warmup_epochs: int = Field(1, ge=0, description="epochs with the sum over all negatives first")


class NcrObjective(Section):
    """After NCR: the pairs that a two-component mixture over the model's own losses holds clean."""

    name: Literal["ncr"]
    warmup_epochs: int = Field(2, ge=1, description="epochs on all pairs; fewer than the epochs")
    mixture: Literal["gaussian", "beta"] = Field("gaussian", description="what the two components are")
    co_teaching: bool = Field(False, description="two models a fold, each selecting for the other: twice the time")


class DeclObjective(Section):
    """After DECL: evidential learning of the in-batch classification, and a hinge on the pairs held to be clean."""

    name: Literal["decl"]
    evidence_temperature: float = Field(0.1, gt=0, description="τ of the evidence exp(tanh(s)/τ)")
    kl_weight: float = Field(0.1, ge=0, description="weight of the divergence from no evidence")
    hinge_weight: float = Field(0.8, ge=0, description="weight of the hinge, summed over the clean pairs of a batch")
    margin: float = Field(0.2, gt=0, description="margin of the hinge, on tanh(s)")
    warmup_epochs: int = Field(1, ge=0, description="epochs before pairs that disagree count as having no match")


class RclObjective(Section):
    """RCL: the uniform complementary loss −Σ_{j≠i} log(1 − p_ij) on all pairs."""

    name: Literal["rcl"]


class CrclObjective(Section):
    """CRCL: an active loss weighted by self-refined labels, and a robust complementary loss."""

    name: Literal["crcl"]
    complementary_weight: float = Field(5.0, ge=0, description="λ of the complementary loss")
    momentum: float = Field(0.8, ge=0, lt=1, description="share of a pair's label that is kept at each refinement")
    warmup_epochs: int = Field(2, ge=0, description="epochs in which all labels are 1")


class RinceObjective(Section):
    """RINCE: the robust InfoNCE −e^{q s⁺}/q + (λ Σ e^s)^q/q on all pairs."""

    name: Literal["rince"]
    exponent: float = Field(
        0.1, gt=0, le=0.8, description="q: near 0 it is InfoNCE, at 1 it would be symmetric and robust"
    )
    density: float = Field(0.01, gt=0, description="λ: the weight of the negatives")


def _name(values: Any) -> str:
    return str(values.get("name", "srem") if isinstance(values, dict) else getattr(values, "name", values))


ObjectiveRecipe: TypeAlias = Annotated[
    Annotated[SremObjective, Tag("srem")]
    | Annotated[InfoNCEObjective, Tag("infonce")]
    | Annotated[VseObjective, Tag("vse")]
    | Annotated[NcrObjective, Tag("ncr")]
    | Annotated[DeclObjective, Tag("decl")]
    | Annotated[RclObjective, Tag("rcl")]
    | Annotated[CrclObjective, Tag("crcl")]
    | Annotated[RinceObjective, Tag("rince")],
    Discriminator(_name),
]

OBJECTIVES: dict[str, type[Section]] = {
    "srem": SremObjective,
    "infonce": InfoNCEObjective,
    "vse": VseObjective,
    "ncr": NcrObjective,
    "decl": DeclObjective,
    "rcl": RclObjective,
    "crcl": CrclObjective,
    "rince": RinceObjective,
}
"""Objective by ``objective.name``."""
