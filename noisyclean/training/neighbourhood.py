"""The pairs like a pair, and what they have to say of it, when the pairs of a fold are judged together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.calibration import match_probability, noise_rate
from noisyclean.corpus.index import CorpusIndex
from noisyclean.scoring.reference import Embedded, ReferenceBank, places
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
        index: of the corpus.
        rows: (P,) int64 rows of the index.
        captions, pictures: of the P their hashes, no two of which are equal.
        image, text: (P, d) float32 unit-norm embeddings.
        log_weight: (P,) float32, log of the probability that each is clean, by its own match score.
        neighbours: how many are asked about a side of a pair.
    """

    bank: ReferenceBank
    index: CorpusIndex
    rows: NDArray[np.int64]
    captions: pd.Index
    pictures: pd.Index
    image: Tensor
    text: Tensor
    log_weight: Tensor
    neighbours: int

    @classmethod
    def of(
        cls, bank: ReferenceBank, index: CorpusIndex, pool: Embedded, match_score: Tensor, neighbours: int
    ) -> Neighbourhood:
        """Of the pairs of a pool, with their own match scores against the bank.

        Of those whose scores are not finite, as of an overflow in half precision, nobody is asked anything.
        """
        finite = match_score.isfinite()
        rows, image, text = pool[0][finite.cpu().numpy()], pool[1][finite], pool[2][finite]
        p = bank.p_values(match_score[finite].cpu().numpy())
        clean = match_probability(p, noise_rate(p, null_pairs=len(bank)).estimate)
        log_weight = torch.from_numpy(np.log(np.maximum(clean, LEAST_PROBABILITY))).float().to(image.device)
        captions, pictures = (pd.Index(hashes[rows]) for hashes in (index.caption, index.image))
        return cls(bank, index, rows, captions, pictures, image, text, log_weight, neighbours)

    def null(self) -> NDArray[np.float32]:
        """(n,) match scores of known mismatches, ascending."""
        bank = self.bank
        queries = self._queries(self.rows[self.captions.get_indexer(pd.Index(bank.ids))], bank.image, bank.text)
        shifts = -(-NULL_SCORES // len(bank))
        scores = expanded_null_scores(bank.image, bank.text, *queries, bank.temperature, shifts)
        return np.sort(scores.cpu().numpy())

    def match_scores(self, rows: NDArray[np.int64], image: Tensor, text: Tensor) -> Tensor:
        """(B,) match scores of the pairs of (B,) rows, whose (B, d) embeddings are given.

        A pair with the same caption is no rival: it is the pair itself, or says the same. Nor is it asked, nor is one
        with the same picture, of which all captions may have gone wrong together: none of the null's pairs has one.
        """
        bank = self.bank
        own = torch.from_numpy(places(bank.ids, self.index.caption[rows])).to(image.device)
        return expanded_match_scores(
            image, text, *self._queries(rows, image, text), bank.image, bank.text, bank.temperature, own
        )

    def _queries(self, rows: NDArray[np.int64], image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        sides = ((self.captions, self.index.caption), (self.pictures, self.index.image))
        own = np.stack([known.get_indexer(pd.Index(hashes[rows])) for known, hashes in sides], axis=1)
        asked = (self.log_weight, torch.from_numpy(own).to(image.device), self.bank.temperature, self.neighbours)
        return (
            expanded_queries(image, self.image, self.text, *asked),
            expanded_queries(text, self.text, self.image, *asked),
        )
