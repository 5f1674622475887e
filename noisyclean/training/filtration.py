"""Which pairs count as clean: each judged by the model that does not train on it.

This is where self-reinforcing errors are cut. A model that has learned a mismatch scores it well, and would keep
learning it; the model of the other fold has never seen it (ours; METHOD: cross-fitting).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from noisyclean.calibration import NoiseRate, match_probability, noise_rate
from noisyclean.corpus.source import PairSource
from noisyclean.encoders import DualEncoder
from noisyclean.scoring.reference import build_bank

FILTER_BATCH = 256


@dataclass(frozen=True)
class Filtered:
    """What one model says of the pairs it did not train on.

    Attributes:
        rows: (R,) int64 rows of the index.
        probability: (R,) float32 match probabilities.
        noise: the share of mismatches among them.
    """

    rows: NDArray[np.int64]
    probability: NDArray[np.float32]
    noise: NoiseRate


def refilter(
    encoder: DualEncoder,
    source: PairSource,
    unseen: NDArray[np.int64],
    bank_size: int,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Filtered:
    """Judge the pairs of ``unseen``, none of which ``encoder`` trains on.

    They are scored as ``score`` does, against a bank drawn from themselves, and calibrated by its null: the weight of
    a pair in the next epoch is its match probability, 1 − local false discovery rate.
    """
    index = source.index
    bank = build_bank(encoder, source, unseen, bank_size)
    rows: list[NDArray[np.int64]] = []
    scores: list[NDArray[np.float32]] = []
    with encoder.inference():
        for batch in source.batches(unseen, FILTER_BATCH):
            at = batch.rows.numpy()
            image, text = encoder.encode_image(batch.pixels).float(), encoder.encode_text(batch.tokens).float()
            rows.append(at)
            scores.append(bank.score(image, text, index.caption[at]).match_score.cpu().numpy())
            if on_batch is not None:
                on_batch(len(batch))
    p = bank.p_values(np.concatenate(scores))
    noise = noise_rate(p, null_pairs=len(bank))
    return Filtered(np.concatenate(rows), match_probability(p, noise.estimate).astype(np.float32), noise)
