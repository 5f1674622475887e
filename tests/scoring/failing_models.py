"""Models that fail on a Ray cluster, or are slow. In a module of their own, which its processes import."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from faults.dying import killed, once

from noisyclean.corpus.locate import Shard
from noisyclean.scoring.engines.ray import _Models
from noisyclean.scoring.engines.work import Done, Work
from noisyclean.scoring.scorer import Scorer

DEADLY = "00003"


def _ill(device: torch.device) -> Scorer:
    raise RuntimeError("CUDA error: uncorrectable ECC error")


class Forgetful(_Models):
    """As if their process was replaced each time after they had been loaded; and one of them falls ill, once."""

    loaded = False

    def load(self, work: Work) -> None:
        if self.loaded:
            super().load(replace(work, scorer=_ill) if once(work.out / "ill") else work)
        self.loaded = True


class Slow(_Models):
    """They are at their shards for a while."""

    def score(self, work: list[Any], shards: Mapping[Shard, str]) -> Iterator[Done]:
        for shard, state in shards.items():
            yield from super().score(work, {shard: state})
            time.sleep(0.5)


class Mortal(_Models):
    """One shard always ends them."""

    def score(self, work: list[Any], shards: Mapping[Shard, str]) -> Iterator[Done]:
        for shard, state in shards.items():
            if shard.name == DEADLY:
                killed(os.getpid())
            yield from super().score(work, {shard: state})
