"""Running a function over many things, most often shards, in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def default_workers() -> int:
    """As many worker processes as there are cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[S], T], items: Sequence[S], workers: int, *, ordered: bool = True
) -> Iterator[T]:
    """Yield ``function(item)`` for each item, computed in ``workers`` processes.

    The order is that of the items, or, if not ``ordered``, that in which they are done.

    ``function`` must be picklable (a module-level function or a partial of one). With one worker or one item
    everything happens in this process.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    from joblib import Parallel, delayed

    return_as = "generator" if ordered else "generator_unordered"
    # joblib's processes are neither forked, so that no lock of torch's or pyarrow's threads is inherited held, nor do
    # they import the caller's main module, so that a user's script needs no `if __name__ == "__main__"`.
    yield from Parallel(n_jobs=workers, return_as=return_as, batch_size=1)(delayed(function)(item) for item in items)
