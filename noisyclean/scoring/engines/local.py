"""The engine that scores in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from noisyclean.corpus.locate import Shard
from noisyclean.scoring.engines.work import Done, Place, Work, score_shards


class LocalEngine:
    """One set of models, with decoding processes beside it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.device = self.own_device = place.device

    def run(self, work: Work, shards: Mapping[Shard, str]) -> Iterator[Done]:
        """Score the shards, each given with its state."""
        return score_shards(work, work.scorer(self.device), self._place, shards)
