"""The statistics that tell clean pairs from mismatched ones within a batch.

*Stated*: clean samples have high similarity and low uncertainty. *Ours*: the statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor


def agreement(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image's best text is its own, and each text's best image. *Ours*.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`. Which of exactly tied candidates is the
            best is left open.

    Returns:
        (image → text, text → image), two bool ``[B]``.
    """
    own = torch.arange(len(logits), device=logits.device)
    return logits.argmax(dim=1) == own, logits.argmax(dim=0) == own


def match_score(logits: Tensor) -> Tensor:
    """log p_ii + log r_ii: the similarity corrected by both energies, 2·(s_ii + E_i)/τ with E = (E_v + E_t)/2. *Ours*.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.

    Returns:
        Float ``[B]``, ≤ 0, same dtype; higher is better matched.
    """
    return logits.log_softmax(dim=1).diagonal() + logits.log_softmax(dim=0).diagonal()
