"""How shards are handed out: so that all who score end at about the same time, and none ends them all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

_ROUNDS = 2
"""A parcel is one in so many of an equal share of what is left: who is half as fast as the others then has no more than
can be done while they do the rest."""
_EACH = 4
"""But so many shards for each decoding process, where there are: towards the end of a parcel some of them idle."""


def parcel_size(waiting: int, crew: int, workers: int) -> int:
    """How many of the ``waiting`` shards the next of the crew gets.

    Args:
        waiting: shards that nobody has yet, at least one.
        crew: how many sets of models there are.
        workers: decoding processes beside each.
    """
    return min(math.ceil(waiting / crew), max(waiting // (_ROUNDS * crew), _EACH * max(workers, 1)))


class Waiting(Generic[T]):
    """The shards that nobody has, by their names."""

    def __init__(self, shards: Mapping[str, T], crew: int, workers: int) -> None:
        """Take the shards; for the others see :func:`parcel_size`."""
        self._shards = dict(shards)
        self._crew = crew
        self._workers = workers
        self._at_most: dict[str, int] = {}
        self._lost_alone: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._shards)

    def take(self) -> dict[str, T]:
        """The next parcel."""
        size = parcel_size(len(self), self._crew, self._workers)
        parcel: dict[str, T] = {}
        for name in islice(self._shards, size):
            size = min(size, self._at_most.get(name, size))
            if len(parcel) >= size:
                break
            parcel[name] = self._shards[name]
        for name in parcel:
            del self._shards[name]
        return parcel

    def give_back(self, left: Mapping[str, T]) -> int:
        """What is left of a parcel waits again, behind all others, as whoever had it was lost.

        One of these shards may have been why. They come in parcels half as large, so that one that always ends who has
        it is soon alone.

        Returns:
            How often the only shard that is left was lost alone; 0 where there are several.
        """
        self._shards.update(left)
        self._at_most |= dict.fromkeys(left, math.ceil(len(left) / 2))
        if len(left) != 1:
            return 0
        (name,) = left
        self._lost_alone[name] += 1
        return self._lost_alone[name]
