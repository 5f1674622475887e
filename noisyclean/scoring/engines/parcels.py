"""How many shards are handed out at a time, so that all who score end at about the same time."""

from __future__ import annotations

import math

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
