"""The statistics that tell clean pairs from mismatched ones within a batch.

*Stated*: clean samples have high similarity and low uncertainty. *Ours*: the statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from noisyclean.srem.logits import PairMatrix


def agreement(logits: Tensor | PairMatrix) -> tuple[Tensor, Tensor]:
    """Whether each image's best text is its own, and each text's best image. *Ours*.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`. Which of exactly tied candidates is the
            best is left open.

    Returns:
        (image → text, text → image), two bool ``[B]``.
    """
    z = PairMatrix.of(logits)
    own = torch.arange(z.first, z.first + len(z.images), device=z.images.device)
    return z.gather(z.images.argmax(dim=1) == own), z.gather(z.texts.argmax(dim=0) == own)


def match_score(logits: Tensor | PairMatrix) -> Tensor:
    """log p_ii + log r_ii: the similarity corrected by both energies, 2·(s_ii + E_i)/τ with E = (E_v + E_t)/2. *Ours*.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.

    Returns:
        Float ``[B]``, ≤ 0, same dtype; higher is better matched.
    """
    z = PairMatrix.of(logits)
    image = z.images.log_softmax(dim=1).diagonal(z.first)
    text = z.texts.log_softmax(dim=0).diagonal(-z.first)
    return z.gather(image + text)
