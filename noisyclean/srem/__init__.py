"""The method as pure tensor functions: no files, no modules, no state.

SREM, "Noisy Correspondence Learning with Self-Reinforcing Errors Mitigation" (Dang, Luo, Jia, Dai, Chang and Wang,
AAAI 2024, arXiv 2312.16478), is known to this project by its abstract, which fixes the ideas but not the equations.
Every docstring therefore says of each idea whether it is *stated* (the abstract says so) or *ours* (a reconstruction
or an addition).

Notation, with B pairs of unit-norm embeddings and temperature τ: s_ij is the cosine similarity of image i and text j,
z_ij = s_ij/τ their logit, p_ij = softmax over j of z_ij (image i chooses a text) and r_ij = softmax over j of z_ji
(text i chooses an image). Where ``logits`` are a square matrix they are z: finite, images along dimension 0. Functions
that take a :class:`PairMatrix` in its place return the same, of all B pairs, in every process that holds a part of it.

The functions keep the dtype they are given. Half precision is too coarse for a logit of 1/τ = 100: compute in float32,
outside autocast.
"""

from noisyclean.srem.bank import NullScores, PairStatistics, bank_statistics, logsumexps, near_miss_scores, null_scores
from noisyclean.srem.complementary import complementary_loss, transition_complementary_loss
from noisyclean.srem.energy import energy, pair_energies
from noisyclean.srem.entropy import normalised_entropy, swapped_cross_entropy, swapped_pair_weight, swapped_weights
from noisyclean.srem.filtration import agreement, match_score
from noisyclean.srem.logits import PairMatrix, pair_logits
from noisyclean.srem.neighbours import expanded_match_scores, expanded_null_scores, expanded_queries
from noisyclean.srem.objective import soft_target_loss, weighted_contrastive_loss, weighted_mean

__all__ = [
    "NullScores",
    "PairMatrix",
    "PairStatistics",
    "agreement",
    "bank_statistics",
    "complementary_loss",
    "energy",
    "expanded_match_scores",
    "expanded_null_scores",
    "expanded_queries",
    "logsumexps",
    "match_score",
    "near_miss_scores",
    "normalised_entropy",
    "null_scores",
    "pair_energies",
    "pair_logits",
    "soft_target_loss",
    "swapped_cross_entropy",
    "swapped_pair_weight",
    "swapped_weights",
    "transition_complementary_loss",
    "weighted_contrastive_loss",
    "weighted_mean",
]
