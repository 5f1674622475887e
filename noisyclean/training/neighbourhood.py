"""The pairs like a pair, and what they have to say of it, when the pairs of a fold are judged together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.calibration import match_probability, noise_rate
from noisyclean.scoring.reference import ReferenceBank, places
from noisyclean.srem import expanded_match_scores, expanded_null_scores, expanded_queries

NULL_SCORES = 2**15
"""Known mismatches in the null: what weights are made of needs no p-values under 1e-4."""
LEAST_PROBABILITY = 1e-3
"""What a pair's probability of being clean is at least taken to be."""


@dataclass(frozen=True)
class Neighbourhood:
    """P pairs that are asked about pairs like them, and the bank that these are scored against.

    Attributes:
        bank: drawn from among them.
        ids: (P,) int64 caption hashes, ascending, all different.
        image, text: (P, d) float32 unit-norm embeddings.
        log_weight: (P,) float32, log of the probability that each is clean, by its own match score.
        neighbours: how many are asked about a side of a pair.
    """

    bank: ReferenceBank
    ids: NDArray[np.int64]
    image: Tensor
    text: Tensor
    log_weight: Tensor
    neighbours: int

    @classmethod
    def of(
        cls,
        bank: ReferenceBank,
        ids: NDArray[np.int64],
        image: Tensor,
        text: Tensor,
        match_score: Tensor,
        neighbours: int,
    ) -> Neighbourhood:
        """Of these pairs, in any order, each with its own match score against the bank."""
        p = bank.p_values(match_score.cpu().numpy())
        clean = match_probability(p, noise_rate(p, null_pairs=len(bank)).estimate)
        log_weight = torch.from_numpy(np.log(np.maximum(clean, LEAST_PROBABILITY))).float()
        at = torch.from_numpy(np.argsort(ids))
        return cls(bank, np.sort(ids), image[at], text[at], log_weight[at].to(image.device), neighbours)

    def null(self) -> NDArray[np.float32]:
        """(n,) match scores of known mismatches, ascending."""
        bank = self.bank
        queries = self._queries(bank.ids, bank.image, bank.text)
        shifts = -(-NULL_SCORES // len(bank))
        scores = expanded_null_scores(bank.image, bank.text, *queries, bank.temperature, shifts)
        return np.sort(scores.cpu().numpy())

    def match_scores(self, ids: NDArray[np.int64], image: Tensor, text: Tensor) -> Tensor:
        """(B,) match scores of B pairs, of which the caption hashes and (B, d) embeddings are given.

        Pairs with the same caption are neither asked nor rivals: they are the pair itself, or say the same of others.
        """
        bank = self.bank
        own = torch.from_numpy(places(bank.ids, ids)).to(image.device)
        return expanded_match_scores(
            image, text, *self._queries(ids, image, text), bank.image, bank.text, bank.temperature, own
        )

    def _queries(self, ids: NDArray[np.int64], image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.from_numpy(places(self.ids, ids)).to(image.device)
        asked = (self.log_weight, own, self.bank.temperature, self.neighbours)
        return (
            expanded_queries(image, self.image, self.text, *asked),
            expanded_queries(text, self.text, self.image, *asked),
        )
