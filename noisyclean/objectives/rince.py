"""RINCE: InfoNCE made symmetric, so that pairs that do not fit pull less."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rince_loss(logits: Tensor, *, q: float = 0.5, density: float = 0.01, shift: float = 0.0) -> Tensor:
    """−e^{q z_ii}/q + (λ Σ_j e^{z_ij})^q/q, averaged over the rows and over the two directions.

    *Theirs*, of Chuang et al. (CVPR 2022), "Robust Contrastive Learning against Noisy Views"; λ is ``density``. With
    q → 0 it is InfoNCE + log λ; with q = 1 it is symmetric, −(1 − λ) e^{z_ii} + λ Σ_{j≠i} e^{z_ij}, which random
    mismatches do not bias.

    A pair's gradient grows as e^{q z_ii}. Their logits are small (a temperature of 0.1 to 1); with 1/τ = 100 the loss
    itself is as large as e^{100q}, beyond float32 for q > 0.88. *Ours*, as the remedy: ``shift``. The loss is
    homogeneous in e^z, so that a constant taken off all logits multiplies it, and the gradient of every pair, by the
    same e^{−q·shift}: no optimum moves and no pair gains on another. A shift of 1/τ, the largest logit there can be,
    rules out overflow; one near a typical z_ii keeps the gradient about the size of InfoNCE's. It must not change in
    the course of training, as a maximum over the batch would.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.
        q: in (0, 1]; 0.1 to 0.6 in their experiments.
        density: λ > 0, 0.01 or 0.001 in their code.
        shift: a constant; 0 is the published loss.

    Returns:
        Scalar, same dtype; it may be negative. Finite in float32 while q·(z − shift) stays below 88 for all z and for
        log λ + their logsumexp.

    Raises:
        ValueError: ``q`` or ``density`` is out of range.
    """
    if not 0.0 < q <= 1.0:
        raise ValueError(f"q must be in (0, 1]: {q}")
    if not density > 0.0:
        raise ValueError(f"the density must be above 0: {density}")
    positive = q * (logits.diagonal() - shift)
    offset = math.log(density) - shift
    everything = torch.stack([q * (logits.logsumexp(dim=dim) + offset) for dim in (1, 0)])
    # Not as a difference of expm1, which a small q suggests: its gradient is rounded at 1e-7 where e^x is far smaller.
    return (everything.exp().mean() - positive.exp().mean()) / q
