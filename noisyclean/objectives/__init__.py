"""The losses of published baselines as pure functions: no files, no modules, no state.

Each is written from its paper and from what its public code computes, for the dual encoder and the batches of this
project. The docstrings say what is *theirs* and what is *ours*: a simplification or a different normalisation. One
difference is common to all: theirs add the two directions (image → text and text → image), ours average them, which is
the scale of :func:`noisyclean.srem.weighted_contrastive_loss`.

RCL has no function here: it is ``(B − 1) * noisyclean.srem.complementary_loss(logits, 0.0)``.

Notation as in :mod:`noisyclean.srem`. Where ``similarity`` or ``logits`` are a square matrix they are finite, images
along dimension 0. The functions keep the dtype they are given; compute in float32, outside autocast.
"""

from noisyclean.objectives.active_complementary import active_complementary_loss, refine_labels
from noisyclean.objectives.evidential import evidence_agreement, evidential_loss, uncertainty
from noisyclean.objectives.mixture import Mixture, clean_posterior
from noisyclean.objectives.rince import rince_loss
from noisyclean.objectives.triplet import dynamic_hinge_loss, triplet_loss

__all__ = [
    "Mixture",
    "active_complementary_loss",
    "clean_posterior",
    "dynamic_hinge_loss",
    "evidence_agreement",
    "evidential_loss",
    "refine_labels",
    "rince_loss",
    "triplet_loss",
    "uncertainty",
]
