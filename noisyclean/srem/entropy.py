"""Swapped classification entropy: what the *other* modality's whole prediction says of a pair.

*Stated*: the sensitivity of the selected samples is estimated "in view of the overall prediction distribution". The
abstract leaves the form open; the two readings built here are *ours*: (a) :func:`swapped_weights`, (b)
:func:`swapped_cross_entropy`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from noisyclean.srem.logits import PairMatrix


def normalised_entropy(logits: Tensor, dim: int) -> Tensor:
    """H(softmax(z)) / log n over the n candidates: 0 is certain, 1 is uniform. *Ours*.

    Args:
        logits: float, any shape, finite.
        dim: the dimension of the candidates, which the result lacks.

    Returns:
        Values in [0, 1], the shape of ``logits`` without ``dim``, same dtype; 0 where there is one candidate only.
    """
    log_p = logits.log_softmax(dim)
    entropy = -(log_p.exp() * log_p).sum(dim)
    # One candidate: the entropy is 0 and so is log n. The clamp is for rounding; a weight of −1e-7 would be a trap.
    return (entropy / (math.log(logits.shape[dim]) or 1.0)).clamp(0.0, 1.0)


def swapped_weights(logits: Tensor | PairMatrix) -> tuple[Tensor, Tensor]:
    """Reading (a): each modality's loss is weighted by how certain the other modality's prediction is. *Ours*.

    w_image_i = 1 − H(r_i)/log B and w_text_i = 1 − H(p_i)/log B.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.

    Returns:
        (w_image, w_text), two float ``[B]`` in [0, 1], same dtype; 1 when B = 1.
    """
    z = PairMatrix.of(logits)
    return 1.0 - z.gather(normalised_entropy(z.texts, dim=0)), 1.0 - z.gather(normalised_entropy(z.images, dim=1))


def swapped_pair_weight(logits: Tensor | PairMatrix) -> Tensor:
    """Reading (b) as a weight: w_i = max(0, 1 − H_s(i)/log B), one for both directions. *Ours*.

    Where both modalities predict the same, it is the weight of reading (a); where they contradict each other, less.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.

    Returns:
        Float ``[B]`` in [0, 1], same dtype; 1 when B = 1.
    """
    z = PairMatrix.of(logits)
    entropy = z.gather(swapped_cross_entropy(z.images, z.texts.T))
    return (1.0 - entropy / (math.log(len(z)) or 1.0)).clamp(0.0, 1.0)


def swapped_cross_entropy(image_logits: Tensor, text_logits: Tensor) -> Tensor:
    """Reading (b): H_s(i) = −½ Σ_j [p_ij log r_ij + r_ij log p_ij], whether the two predictions agree. *Ours*.

    Never below the mean of the two entropies (Gibbs), and equal to it when the predictions are the same. It does not
    single out the pair's own class, so it is a witness apart from the match score.

    Args:
        image_logits: float ``[B, M]``; row i holds the logits of image i over M candidate texts. In a batch: z.
        text_logits: float ``[B, M]``; row i holds those of text i over the M images of the same candidates. In a batch:
            zᵀ. A candidate to leave out is masked with −inf in both.

    Returns:
        Float ``[B]``, ≥ 0, same dtype.
    """
    # A masked candidate would contribute 0 · −inf = nan; the lowest finite number makes it 0 · log 0 = 0.
    lowest = torch.finfo(image_logits.dtype).min
    log_p = image_logits.log_softmax(dim=1).clamp_min(lowest)
    log_r = text_logits.log_softmax(dim=1).clamp_min(lowest)
    return -(log_p.exp() * log_r + log_r.exp() * log_p).sum(dim=1) / 2
