"""The losses of the matching classification: of the pairs that look clean, and against a teacher's predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from noisyclean.srem.logits import PairMatrix


def weighted_contrastive_loss(
    logits: Tensor | PairMatrix,
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
    z = PairMatrix.of(logits)
    if weights is None:
        weights = z.images.new_ones(len(z))
    image_loss = -z.gather(z.images.log_softmax(dim=1).diagonal(z.first))
    text_loss = -z.gather(z.texts.log_softmax(dim=0).diagonal(-z.first))
    return (
        weighted_mean(image_loss, weights if image_weights is None else weights * image_weights)
        + weighted_mean(text_loss, weights if text_weights is None else weights * text_weights)
    ) / 2


def soft_target_loss(logits: Tensor | PairMatrix, teacher_logits: Tensor | PairMatrix) -> Tensor:
    """The symmetric cross-entropy against a teacher's predictions instead of the pairs' own classes. *Ours*.

    −½ mean_i Σ_j [p*_ij log p_ij + r*_ij log r_ij] with p*, r* the softmax of the teacher's logits. Every pair has a
    target that does not rest on its being matched: which of the batch's captions would fit the image, and the reverse.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.
        teacher_logits: float ``[B, B]``, held constant; −inf leaves a candidate out, of the student's softmax too.
            The diagonal is finite.

    Returns:
        Scalar, ≥ 0, same dtype; least, the mean entropy of the teacher's predictions, where the two agree.
    """
    teacher = PairMatrix.of(teacher_logits).detach()
    z = PairMatrix.of(logits).map(lambda ours, theirs: ours.masked_fill(theirs == -torch.inf, -torch.inf), teacher)
    image_loss = z.gather(_cross_entropies(z.images, teacher.images)).mean()
    text_loss = z.gather(_cross_entropies(z.texts.T, teacher.texts.T)).mean()
    return (image_loss + text_loss) / 2


def _cross_entropies(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    # A candidate that is left out would contribute 0 · −inf = nan.
    log_p = logits.log_softmax(dim=1).clamp_min(torch.finfo(logits.dtype).min)
    return -(teacher_logits.softmax(dim=1) * log_p).sum(dim=1)


def weighted_mean(loss: Tensor, weights: Tensor) -> Tensor:
    """Σ_i w_i ℓ_i / Σ_i w_i of two float ``[B]``, the weights held constant; 0, with no gradient, if they sum to 0."""
    weights = weights.detach()
    # A batch may hold no clean pair at all: 0/tiny is 0, where 0/0 would end the training in nan.
    return (weights * loss).sum() / weights.sum().clamp_min(torch.finfo(loss.dtype).tiny)
