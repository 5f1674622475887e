"""Work in processes: every item once, in the order that was asked for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from noisyclean.corpus.parallel import default_workers, map_in_processes, map_in_threads


def work(seconds: float) -> tuple[float, int]:
    time.sleep(seconds)
    return seconds, os.getpid()


def test_as_the_items_stand_or_as_they_are_done() -> None:
    items = [1.0, 0.0, 0.01, 0.02]
    ordered = list(map_in_processes(work, items, 2))
    assert [seconds for seconds, _ in ordered] == items
    done = list(map_in_processes(work, items, 2, ordered=False))
    assert sorted(seconds for seconds, _ in done) == sorted(items)
    assert done[-1][0] == 1.0
    assert os.getpid() not in {process for _, process in [*ordered, *done]}


@pytest.mark.parametrize("ordered", [True, False])
def test_one_worker_or_one_item_stays_here(ordered: bool) -> None:
    here = os.getpid()
    assert list(map_in_processes(work, [0.0, 0.01], 1, ordered=ordered)) == [(0.0, here), (0.01, here)]
    assert list(map_in_processes(work, [0.0], 8, ordered=ordered)) == [(0.0, here)]
    assert list(map_in_processes(work, [], 8, ordered=ordered)) == []
    assert default_workers() >= 1


def test_in_threads_the_next_is_computed_while_the_caller_has_the_last() -> None:
    begun = [threading.Event() for _ in range(5)]

    def compute(item: int) -> tuple[int, int]:
        begun[item].set()
        return item, threading.get_ident()

    for item, thread in map_in_threads(compute, range(5), threads=1):
        assert thread != threading.get_ident()
        assert begun[min(item + 1, 4)].wait(10)
        assert item >= 3 or not begun[item + 2].is_set()


def test_in_threads_what_fails_is_told_in_its_turn_and_what_is_read_is_closed() -> None:
    closed: list[bool] = []

    def items() -> Iterator[int]:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    found = map_in_threads(lambda item: 6 // (item - 3), items(), threads=2)
    assert [next(found) for _ in range(3)] == [-2, -3, -6]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert closed == [True]
