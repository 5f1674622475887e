"""Cross-modal biased complementary learning: what a pair teaches even when it is mismatched.

"Text j is not the caption of image i" stays true for j ≠ i whether or not pair i is mismatched, so it can be learned
from every pair. *Stated*: a "cross-modal biased complementary learning" that uses "negative matches overlooked in
hard-negative training". *Ours*: both equations, after Yu et al. (2018), "Learning with Biased Complementary Labels".
With no bias both equal RCL's log loss −Σ_{j≠i} log(1 − p_ij) up to constants.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from noisyclean.srem.logits import PairMatrix

# The share of the transition that is uniform. A strong bias underflows to Q_kj = 0, where log (Qᵀp)_j may be −inf.
_SMOOTHING = 1e-6


def complementary_loss(logits: Tensor | PairMatrix, similarity_bias: Tensor | float = 0.0) -> Tensor:
    """−Σ_{j≠i} q_ij log(1 − p_ij), averaged over the rows and over the two directions. *Ours*.

    q_i = softmax over j ≠ i of bias·z_ij, held constant: a positive bias dwells on the similar negatives. Bias 0 is
    uniform, and the loss then the mean over j ≠ i of −log(1 − p_ij): RCL's sum divided by B − 1.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`. The loss and its gradient stay finite however
            close a p_ij is to 1.
        similarity_bias: a number or a scalar tensor; no gradient flows into it.

    Returns:
        Scalar, ≥ 0, same dtype; 0 when B < 2, where nothing is complementary.
    """
    z = PairMatrix.of(logits)
    if len(z) < 2:
        return _nothing(z)
    image_loss = z.gather(_complementary(z.images, similarity_bias, z.first)).mean()
    text_loss = z.gather(_complementary(z.texts.T, similarity_bias, z.first)).mean()
    return (image_loss + text_loss) / 2


def transition_complementary_loss(logits: Tensor | PairMatrix, similarity_bias: Tensor | float = 0.0) -> Tensor:
    """−Σ_{j≠i} Q_ij log (Qᵀp_i)_j, averaged over the rows and over the two directions. *Ours*.

    Q_kj = P(complementary label j | true class k): Q_kk = 0, and for j ≠ k the softmax over j of bias·z_kj, mixed with
    one millionth of the uniform distribution and held constant. Image k stands for its class, so z_kj says how alike
    classes k and j are. (Qᵀp_i)_j is then the predicted probability of the complementary label j, and the loss the
    cross-entropy from its distribution for true class i, minimal at p_ii = 1.

    Bias 0 makes Q uniform, (Qᵀp_i)_j = (1 − p_ij)/(B − 1), and the loss :func:`complementary_loss` + log(B − 1).

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`. The loss and its gradient stay finite however
            close a p_ij is to 1.
        similarity_bias: a number or a scalar tensor; no gradient flows into it.

    Returns:
        Scalar, ≥ 0, same dtype; 0 when B < 2, where nothing is complementary. Costs a ``[B, B]`` matmul a direction.
    """
    z = PairMatrix.of(logits)
    if len(z) < 2:
        return _nothing(z)
    whole = z.whole  # (Qᵀp_i) takes the rows of all classes k
    image_loss = _transition_complementary(whole, similarity_bias).mean()
    text_loss = _transition_complementary(whole.T, similarity_bias).mean()
    return (image_loss + text_loss) / 2


def _nothing(z: PairMatrix) -> Tensor:
    return z.images.sum() * 0.0  # a zero that can still be differentiated


def _complementary(logits: Tensor, bias: Tensor | float, first: int) -> Tensor:
    labels = _complementary_labels(logits, bias, first)
    return -(labels * _log_one_minus_softmax(logits)).sum(dim=1)


def _transition_complementary(logits: Tensor, bias: Tensor | float) -> Tensor:
    transition = torch.lerp(_complementary_labels(logits, bias), _complementary_labels(logits, 0.0), weight=_SMOOTHING)
    return -(transition * _log_transitioned_softmax(logits, transition)).sum(dim=1)


@torch.no_grad()
def _complementary_labels(logits: Tensor, bias: Tensor | float, first: int = 0) -> Tensor:
    """Row i: a distribution over j ≠ ``first`` + i, the softmax of bias·z_ij."""
    biased = bias * logits
    biased.diagonal(first).fill_(-torch.inf)
    return biased.softmax(dim=1)


def _log_one_minus_softmax(logits: Tensor) -> Tensor:
    """log(1 − p_ij) without cancellation, of the shape of ``logits``.

    Only the largest p of a row can exceed ½ and come near 1. There 1 − p is the sum of the others, which makes
    log(1 − p) = log σ(logsumexp of the others − z); everywhere else log1p(−p) is exact.
    """
    top = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    at_top = logsigmoid(others - logits.gather(1, top))
    elsewhere = torch.log1p(-logits.softmax(dim=1).scatter(1, top, 0.0))
    return elsewhere.scatter(1, top, at_top)


def _log_transitioned_softmax(logits: Tensor, transition: Tensor) -> Tensor:
    """log (Qᵀp_i)_j without underflow, ``[B, B]``.

    As Q_jj = 0, the sum loses its large term only where j is the top class of row i, and only there is it taken in log
    space: one column of Q a row. Everywhere else Q_kj p_ik at the top class k bounds the sum away from 0.
    """
    top = logits.argmax(dim=1, keepdim=True)
    log_column = transition.log().T[top.squeeze(1)]
    at_top = (log_column + logits.log_softmax(dim=1)).logsumexp(dim=1, keepdim=True)
    elsewhere = (logits.softmax(dim=1) @ transition).scatter(1, top, 1.0).log()
    return elsewhere.scatter(1, top, at_top)
