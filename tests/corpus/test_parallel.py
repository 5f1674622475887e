"""Work in processes: every item once, in the order that was asked for."""

from __future__ import annotations

import os
import time

import pytest

from noisyclean.corpus.parallel import default_workers, map_in_processes


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
