"""Where shards are scored: in this process, or on a Ray cluster.

What is done with a shard is the same everywhere (:mod:`~.work`); an engine only says where.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, TypeAlias

from noisyclean.errors import UsageError
from noisyclean.progress import Progress

if TYPE_CHECKING:
    from noisyclean.scoring.engines.work import Engine

EngineName: TypeAlias = Literal["local", "ray"]


@contextmanager
def open_engine(
    name: EngineName, *, address: str | None, device: str | None, workers: int | None, progress: Progress
) -> Iterator[Engine]:
    """Yield an engine that can be given work.

    Args:
        address: of the Ray cluster; None: one of this machine alone, started for the purpose.
        device: what the models run on; None: a GPU where there is one.
        workers: decoding processes beside each model; None: as many as it has cores.
        progress: who is told of what is lost and what is waited for.

    Raises:
        UsageError: there is no such device or cluster, or ``address`` has no meaning here.
        NoisycleanError: the cluster has no node that could score.
    """
    if name == "ray":
        if find_spec("ray") is None:
            raise UsageError("--engine ray needs Ray: pip install 'noisyclean[ray]'")
        # Asked when Ray is imported. It would tell its makers of this use, and print what it notices among our results.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        # Ray has its processes give way to all others: to the decoding ones too, which are to give way to the model.
        os.environ.setdefault("RAY_worker_niceness", "0")
        from noisyclean.scoring.engines.ray import connected_engine

        with connected_engine(address, device, workers, progress) as engine:
            yield engine
        return
    if address is not None:
        raise UsageError(f"--address {address} goes with --engine ray")
    from noisyclean.corpus.parallel import default_workers
    from noisyclean.device import choose_device
    from noisyclean.scoring.engines.local import LocalEngine
    from noisyclean.scoring.engines.work import Place

    yield LocalEngine(Place(choose_device(device), default_workers() if workers is None else workers))
