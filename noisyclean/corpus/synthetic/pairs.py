"""The sequence of pairs, each a function of the seed and of its index alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

import numpy as np

from noisyclean.corpus.synthetic.captions import Description, describe, falsify, write, write_nothing
from noisyclean.corpus.synthetic.scenes import Scene, redraw, sample_scene
from noisyclean.errors import UsageError


class Kind(StrEnum):
    """How a pair came about."""

    MATCH = "match"
    NEAR_DUPLICATE = "near_duplicate"
    WRONG_ATTRIBUTE = "wrong_attribute"
    UNINFORMATIVE = "uninformative"

    @property
    def matched(self) -> bool:
        """Whether the caption tells the truth about the picture, and tells something."""
        return self in (Kind.MATCH, Kind.NEAR_DUPLICATE)


@dataclass(frozen=True, slots=True)
class Pair:
    """A scene and a caption; the description is what the caption claims, None where it claims nothing."""

    scene: Scene
    caption: str
    description: Description | None
    kind: Kind
    repeats: int | None = None  # the index of the pair whose scene a near-duplicate shows again


@dataclass(frozen=True, slots=True)
class PairSampler:
    """The pairs of a seed; the three rates are the expected shares of each kind, the rest being plain matches.

    Raises :class:`UsageError` for a negative seed, a rate outside [0, 1], or rates that sum to more than 1.
    """

    seed: int = 0
    near_duplicates: float = 0.03
    wrong_attribute: float = 0.02
    uninformative: float = 0.02

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, not {self.seed}")
        rates = (self.near_duplicates, self.wrong_attribute, self.uninformative)
        if not all(0 <= rate <= 1 for rate in rates) or math.fsum(rates) > 1:
            raise UsageError(f"the shares of the kinds of pair must be in 0 to 1 and sum to 1 at most, not {rates}")

    def pair(self, index: int) -> Pair:
        """The pair at ``index`` >= 0."""
        rng = np.random.default_rng([self.seed, index])
        kind = self._kind(index, rng.random())
        if kind is Kind.NEAR_DUPLICATE:
            return self._repeat(index, rng)
        scene = sample_scene(rng)
        if kind is Kind.UNINFORMATIVE:
            return Pair(scene, write_nothing(rng), None, kind)
        description = describe(scene, rng)
        if kind is Kind.WRONG_ATTRIBUTE:
            description = falsify(description, scene, rng)
        return Pair(scene, write(description, rng), description, kind)

    def _kind(self, index: int, lot: float) -> Kind:
        bounds = tuple(accumulate((self.uninformative, self.wrong_attribute, self.near_duplicates)))
        if lot < bounds[0]:
            return Kind.UNINFORMATIVE
        if lot < bounds[1]:
            return Kind.WRONG_ATTRIBUTE
        # The first pair has nothing before it to repeat.
        return Kind.NEAR_DUPLICATE if lot < bounds[2] and index > 0 else Kind.MATCH

    def _repeat(self, index: int, rng: np.random.Generator) -> Pair:
        """The scene of an earlier pair seen again, half of the time with that pair's own caption, if it is true."""
        source = int(rng.integers(index))
        first = self.pair(source)
        if first.repeats is not None:
            source, first = first.repeats, self.pair(first.repeats)
        scene = redraw(first.scene, rng)
        if first.kind is Kind.MATCH and rng.random() < 0.5:
            return Pair(scene, first.caption, first.description, Kind.NEAR_DUPLICATE, source)
        description = describe(scene, rng)
        return Pair(scene, write(description, rng), description, Kind.NEAR_DUPLICATE, source)
