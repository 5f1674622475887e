"""How many labels a share still needs until it is known well enough: pure arithmetic."""

from __future__ import annotations

from typing import Final

import numpy as np

from noisyclean.evaluation.labelling import proportion_interval

WITHIN: Final = 0.02
"""How far the 95 % limits of a share that is known well may lie from it."""
_MOST: Final = 3000
"""More than any share needs: at one half, where it takes most, some 2,450."""


def labels_to_go(matched: int, labelled: int) -> int:
    """How many more labels bring both 95 % limits to ``WITHIN`` of the share, if it stays as observed.

    Args:
        matched, labelled: counts; at least one is labelled.
    """
    share = matched / labelled
    trials = labelled + np.arange(_MOST)
    low, high = proportion_interval(share * trials, trials)
    return int(np.argmax(np.maximum(high - share, share - low) <= WITHIN))
