"""Ways that are compared take turns, and a ratio is taken within a round: what else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

from noisyclean.progress import Progress

Rates = dict[str, list[float]]
"""What each way reached in each round."""


def rate(way: Callable[[], int]) -> Callable[[], float]:
    """A way that says how many it did, as one that says how many a second."""

    def run() -> float:
        started = time.perf_counter()
        done = way()
        return done / (time.perf_counter() - started)

    return run


def take_turns(name: str, ways: Mapping[str, Callable[[], float]], times: int, progress: Progress) -> Rates:
    """Run every way ``times`` times, in rounds, every other of them backwards."""
    found: Rates = {way: [] for way in ways}
    with progress.task(name, times * len(ways), "runs") as task:
        for turn in range(times):
            for way in list(ways)[:: 1 - 2 * (turn % 2)]:
                found[way].append(ways[way]())
                task.advance(1, f"{way}: {found[way][-1]:,.1f}/s")
    return found


def ratio(found: Rates, way: str, other: str) -> float:
    """The median over the rounds of one rate over another."""
    return median(a / b for a, b in zip(found[way], found[other], strict=True))
