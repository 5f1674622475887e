"""Functions that end their process. Here alone, so that a process that is to run one need not import torch for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path


def killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def once(flag: Path) -> bool:
    """True at the first call, in whatever process that is."""
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def count_to(flags: Path, fault: str, item: int, skip: int, careful: bool) -> Iterator[tuple[int, int]]:
    """Five pieces; amid those of item 3 the process dies or hangs, once."""
    for piece in range(skip, 5):
        if (item, piece) == (3, 2) and (
            fault == "always" or (fault == "careless" and not careful) or (fault != "careless" and once(flags / fault))
        ):
            time.sleep(0.3)  # what it has made before is under way
            if fault == "hang":
                time.sleep(60)
            killed(os.getpid())
        yield item, piece


class Slow:
    """A number that takes a while to hand over."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        time.sleep(0.3)
        return int, (self.number,)


def count_past_deadly(item: int, skip: int, careful: bool) -> Iterator[Slow]:
    """Four pieces, of which two end the process unless each is the one that care is taken of."""
    for piece in range(skip, 4):
        if piece in (1, 2) and not (careful and piece == skip):
            killed(os.getpid())
        yield Slow(piece)


def wait_for_the_last(flags: Path, last: int, item: int, skip: int, careful: bool) -> Iterator[int]:
    """One piece; that of item 0 comes after the last item's."""
    while item == 0 and not (flags / "last").exists():
        time.sleep(0.01)
    yield item
    if item == last:
        (flags / "last").touch()


def nothing() -> None:
    pass


def work(flags: Path, item: int) -> int:
    if item == 3 and once(flags / "work"):
        killed(os.getpid())
    return item


def die(item: int) -> int:
    killed(os.getpid())
    return item
