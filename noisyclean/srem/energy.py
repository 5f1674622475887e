"""Energy: how little an image or a text matches anything at all."""

from __future__ import annotations

from torch import Tensor

from noisyclean.srem.logits import PairMatrix


def energy(logits: Tensor, temperature: Tensor | float, dim: int = 1) -> Tensor:
    """E = −τ·logsumexp(z), on the scale of the similarities; higher is more uncertain.

    *Stated*: filtration "through energy uncertainty". *Ours*: the form, after Liu et al. (2020), "Energy-based
    Out-of-distribution Detection". Energy alone does not find mismatches (the true caption may be among the other
    candidates, which makes a mismatched image look certain); it corrects the similarity in the match score.

    Args:
        logits: float, any shape; −inf masks a candidate.
        temperature: the τ > 0 that the logits were divided by.
        dim: the dimension of the candidates, which the result lacks.

    Returns:
        The shape of ``logits`` without ``dim``, same dtype.
    """
    return -temperature * logits.logsumexp(dim)


def pair_energies(logits: Tensor | PairMatrix, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """The energies (E_v, E_t) of the images over the texts and of the texts over the images.

    *Ours*, see :func:`energy`. The energy of a pair is their mean.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.
        temperature: the τ > 0 that the logits were divided by.

    Returns:
        Two float ``[B]``, same dtype.
    """
    z = PairMatrix.of(logits)
    return z.gather(energy(z.images, temperature, dim=1)), z.gather(energy(z.texts, temperature, dim=0))
