"""The training objective: learn from the pairs that look clean, and from every pair what it is not."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, assert_never

import torch
from torch import Tensor

from noisyclean.srem.complementary import complementary_loss, transition_complementary_loss
from noisyclean.srem.entropy import swapped_weights

EntropyWeighting: TypeAlias = Literal["none", "swapped"]
Complementary: TypeAlias = Literal["simple", "transition"]


class SremLoss(NamedTuple):
    """The objective and its two terms, scalars; ``total`` = ``contrastive`` + λ·``complementary``."""

    total: Tensor
    contrastive: Tensor
    complementary: Tensor


def weighted_contrastive_loss(
    logits: Tensor,
    weights: Tensor | None = None,
    *,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
) -> Tensor:
    """The symmetric cross-entropy, each direction a weighted mean over the pairs.

    ½ Σ_i a_i (−log p_ii) / Σ_i a_i + ½ Σ_i b_i (−log r_ii) / Σ_i b_i with a = weights · image_weights and b = weights ·
    text_weights; what is not given counts as 1, which leaves InfoNCE. The losses are those of the in-batch
    classification (*stated*); their weighting and its normalisation are *ours*.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.
        weights: float ``[B]``, ≥ 0, one a pair. Weights are held constant: no gradient flows into them.
        image_weights: float ``[B]``, ≥ 0, for the image → text direction only.
        text_weights: float ``[B]``, ≥ 0, for the text → image direction only.

    Returns:
        Scalar, ≥ 0, same dtype. A direction whose weights sum to 0 contributes 0, with a gradient of 0.
    """
    if weights is None:
        weights = logits.new_ones(len(logits))
    image_loss = -logits.log_softmax(dim=1).diagonal()
    text_loss = -logits.log_softmax(dim=0).diagonal()
    return (
        _weighted_mean(image_loss, weights if image_weights is None else weights * image_weights)
        + _weighted_mean(text_loss, weights if text_weights is None else weights * text_weights)
    ) / 2


def srem_loss(
    logits: Tensor,
    weights: Tensor | None,
    *,
    complementary_weight: float,
    similarity_bias: Tensor | float = 0.0,
    entropy_weighting: EntropyWeighting = "none",
    complementary: Complementary = "simple",
) -> SremLoss:
    """L = Σ_i w_i ℓ_i / Σ_i w_i + λ · complementary loss over all pairs. The sum is *ours*, its two terms are *stated*.

    The complementary term is the mean over pairs of a sum over their B − 1 negatives.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.
        weights: float ``[B]``, ≥ 0: how clean each pair is held to be, such as its match probability, or 0 and 1 for a
            hard selection. None: all the same, as in the warm-up. Held constant.
        complementary_weight: λ ≥ 0. Near 1 the complementary term swamps the other.
        similarity_bias: see :func:`noisyclean.srem.complementary_loss`.
        entropy_weighting: ``"swapped"`` multiplies the weights of each direction by
            :func:`noisyclean.srem.swapped_weights`, held constant.
        complementary: the ``"simple"`` form or the one by a ``"transition"`` matrix,
            :func:`noisyclean.srem.transition_complementary_loss`.

    Returns:
        The loss and its terms, scalars, same dtype.
    """
    image_weights: Tensor | None
    text_weights: Tensor | None
    match entropy_weighting:
        case "none":
            image_weights = text_weights = None
        case "swapped":
            image_weights, text_weights = swapped_weights(logits.detach())
        case _:
            assert_never(entropy_weighting)
    match complementary:
        case "simple":
            complementary_mean = complementary_loss(logits, similarity_bias)
        case "transition":
            complementary_mean = transition_complementary_loss(logits, similarity_bias)
        case _:
            assert_never(complementary)
    # As a sum over a pair's B − 1 negatives, which is RCL's own scale: the mean would vanish beside the other term, the
    # more so the larger the batch.
    complementary_term = (len(logits) - 1) * complementary_mean
    contrastive_term = weighted_contrastive_loss(
        logits, weights, image_weights=image_weights, text_weights=text_weights
    )
    return SremLoss(
        total=contrastive_term + complementary_weight * complementary_term,
        contrastive=contrastive_term,
        complementary=complementary_term,
    )


def _weighted_mean(loss: Tensor, weights: Tensor) -> Tensor:
    weights = weights.detach()
    # A batch may hold no clean pair at all: 0/tiny is 0, where 0/0 would end the training in nan.
    return (weights * loss).sum() / weights.sum().clamp_min(torch.finfo(loss.dtype).tiny)
