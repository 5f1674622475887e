"""The engine that scores on a Ray cluster: a set of models on each GPU, or on each node where there are none.

Ray brings the models to the nodes, notices what is lost, and starts its models anew where there is room. What they do
there is what the local engine does (:func:`~.work.score_shards`): parts are written from where they are made, and
nothing but the names of finished shards comes back. Shards are handed out in parcels, the smaller the fewer are left,
so that all end at about the same time.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from noisyclean.corpus.locate import Shard, is_address, without_secrets
from noisyclean.corpus.parallel import LIVES, default_workers
from noisyclean.device import choose_device
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.manifest.splitting import read_out
from noisyclean.progress import Progress
from noisyclean.scoring.engines.parcels import Waiting
from noisyclean.scoring.engines.work import Done, Place, Work, score_shards

_PATIENCE = 30.0
"""Seconds without any models at work after which the user is told."""
_ANSWER = 10.0
"""Seconds within which a cluster must answer."""
_PASSED_ON = ("GOMP_SPINCOUNT",)
"""What the command line sets in its environment that is of use where models run."""

_Parcel: TypeAlias = dict[str, tuple[Shard, str]]
"""By their names, shards with their states."""


@contextmanager
def connected_engine(
    address: str | None, device: str | None, workers: int | None, progress: Progress
) -> Iterator[RayEngine]:
    """Yield an engine on the cluster at ``address``, on that which the caller has joined, or else on one of our own.

    Raises:
        UsageError: there is no such cluster or device.
        NoisycleanError: no node of it could score.
    """
    ours = address is not None or not ray.is_initialized()
    if ours:
        _join(address)
    try:
        yield RayEngine(device, workers, progress)
    finally:
        if ours:
            ray.shutdown()


def _join(address: str | None) -> None:
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        ray.init("local", num_cpus=default_workers(), include_dashboard=False, **quietly)
        return
    if "://" in address:
        raise UsageError(
            f"--address {address}: no Ray client; run the command on a node of the cluster, with --address auto"
        )
    try:
        host, _, port = address.rpartition(":")
        if host:
            # Ray would try for minutes.
            socket.create_connection((host, int(port)), _ANSWER).close()
        ray.init(address, **quietly)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"--address {address}: cannot join a Ray cluster there ({_first_line(error)})") from error


class RayEngine:
    """Sets of models on the nodes of the cluster that this process has joined."""

    def __init__(self, device: str | None, workers: int | None, progress: Progress) -> None:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self.device = _choose_device(device, nodes)
        self.own_device = choose_device("cpu" if self.device.type == "cpu" else None)
        self._seats = [seat for node in nodes for seat in _seats(node, self.device, workers)]
        if not self._seats:
            raise NoisycleanError(f"no node of the Ray cluster has CPUs for a model on {self.device.type}; start some")
        self._workers = max(seat.place.workers for seat in self._seats)
        self._progress = progress

    def run(self, work: Work, shards: Mapping[Shard, str]) -> Iterator[Done]:
        """Score the shards, each given with its state.

        Raises:
            NoisycleanError: models were lost again and again, by one shard or with none finished meanwhile; or as on
                one machine.
        """
        # The models' working directories are Ray's.
        saving = None if work.saving is None else replace(work.saving, directory=work.saving.directory.absolute())
        shared = ray.put(replace(work, out=work.out.absolute(), saving=saving))
        crew = [seat.take() for seat in self._seats[: len(shards)]]
        named = {shard.name: (_absolute(shard), state) for shard, state in shards.items()}
        try:
            yield from self._supervise(crew, shared, Waiting(named, len(crew), self._workers))
        finally:
            for models in crew:
                ray.kill(models)

    def _supervise(self, crew: list[Any], work: Any, waiting: Waiting[tuple[Shard, str]]) -> Iterator[Done]:
        """Keep the models supplied until all is done; what those had that are lost goes to others.

        Args:
            work: in Ray's store.
        """
        loading = {models.load.remote(work): models for models in crew}
        idle: list[Any] = []
        working: dict[Any, _Assignment] = {}
        samples, lives = 0, LIVES * len(crew)
        while waiting or working:
            while waiting and idle:
                models, parcel = idle.pop(), waiting.take()
                under_way = models.score.options(num_returns="streaming", max_task_retries=0).remote(
                    [work], dict(parcel.values())
                )
                working[under_way] = _Assignment(models, parcel)
            heard, _ = ray.wait([*loading, *working], num_returns=1, timeout=_PATIENCE)
            if not heard:
                if not working:
                    self._progress.say("waiting for the Ray cluster: models are being loaded, or find no room")
                continue
            (one,) = heard
            try:
                if one in loading:
                    ray.get(one)
                    idle.append(loading.pop(one))
                    continue
                assignment = working[one]
                done = ray.get(next(one))
            except StopIteration:
                idle.append(working.pop(one).models)
            except RayError as error:
                lost = _Assignment(loading.pop(one), {}) if one in loading else working.pop(one)
                why = str(error).strip().splitlines()[-1][:200]
                if isinstance(error, RayTaskError):
                    if not isinstance(error.cause, _FailedModelsError):
                        raise error.cause from error
                    why = str(error.cause)
                    ray.kill(lost.models, no_restart=False)
                lives -= 1
                if waiting.give_back(lost.left) == LIVES:
                    ((shard, _),) = lost.left.values()
                    raise NoisycleanError(
                        f"{without_secrets(shard.path)}: the models that score it are lost, {LIVES} times in a row "
                        f"({why}); if memory is short, use fewer workers, and repeat the command"
                    ) from error
                if not lives:
                    raise NoisycleanError(
                        f"models on the Ray cluster were lost {LIVES * len(crew)} times in a row ({why}); if memory is "
                        "short, use fewer workers, and repeat the command"
                    ) from error
                self._progress.say(
                    f"models on the Ray cluster were lost ({why}); shards that wait again: {len(lost.left)}"
                )
                loading[lost.models.load.remote(work)] = lost.models  # when they are there again
            else:
                lives = LIVES * len(crew)
                samples += assignment.count(done)
                yield Done(done.shards, samples)


@dataclass
class _Assignment:
    """What a set of models is at."""

    models: Any
    left: _Parcel
    samples: int = 0

    def count(self, done: Done) -> int:
        """Strike out what is done; returns how many samples were read since the last word."""
        for name in done.shards:
            del self.left[name]
        before, self.samples = self.samples, done.samples
        return done.samples - before


@dataclass(frozen=True)
class _Seat:
    """Room for a set of models on a node: a GPU where they need one, and a share of the cores."""

    node: str
    cores: int
    place: Place

    def take(self) -> Any:
        """Start a process for models there; should it be lost, another one is started, there or where there is room."""
        return (
            ray.remote(_Models)
            .options(
                num_cpus=self.cores,
                num_gpus=int(self.place.device.type == "cuda"),
                scheduling_strategy=NodeAffinitySchedulingStrategy(self.node, soft=True),
                max_restarts=-1,
                max_task_retries=LIVES,
                runtime_env={"env_vars": {name: os.environ[name] for name in _PASSED_ON if name in os.environ}},
            )
            .remote(self.place)
        )


class _FailedModelsError(Exception):
    """Models cannot go on where they are, as on a GPU that is broken or full; another process may."""


class _Models:
    """The models with their banks, in a process on some node."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._work: Work | None = None

    def load(self, work: Work) -> None:
        """Bring the models to their device."""
        try:
            here = read_out(work.out)["scorer"]
        except (OSError, UsageError):
            here = None
        if here != work.fingerprint:
            raise UsageError(
                f"{work.out}: node {platform.node()} does not see this folder as this machine does; with --engine ray, "
                "it and the shards must lie where every node of the cluster reaches them"
            )
        with _failures_named():
            self._scorer = work.scorer(self._place.device)
        self._work = work

    def score(self, work: list[Any], shards: Mapping[Shard, str]) -> Iterator[Done]:
        """Score the shards, each given with its state; yields when some are done.

        Args:
            work: alone in a list, which keeps Ray from fetching it: a process that was lost while it had nothing to do
                has been replaced unnoticed, and loads it now.
        """
        if self._work is None:
            self.load(ray.get(work[0]))
        assert self._work is not None
        with _failures_named():
            for done in score_shards(self._work, self._scorer, self._place, shards):
                if done.shards:
                    yield done


@contextmanager
def _failures_named() -> Iterator[None]:
    """Errors say on which node they were raised."""
    try:
        yield
    except NoisycleanError as error:
        raise type(error)(f"{error} (on node {platform.node()})") from error
    except (RuntimeError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise _FailedModelsError(f"{type(error).__name__} on node {platform.node()}: {first[:200]}") from error


def _choose_device(name: str | None, nodes: list[dict[str, Any]]) -> torch.device:
    gpus = any(node["Resources"].get("GPU") for node in nodes)
    if name is None:
        name = "cuda" if gpus else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: cpu or cuda with --engine ray, which gives each set of models a GPU")
    if name == "cuda" and not gpus:
        raise UsageError("--device cuda: no node of the Ray cluster has a GPU; leave it out to compute on CPUs")
    return torch.device(name)


def _seats(node: dict[str, Any], device: torch.device, workers: int | None) -> Iterator[_Seat]:
    """Of a node: one for each GPU, or for all of its cores."""
    cores = int(node["Resources"].get("CPU", 0))
    seats = min(cores, int(node["Resources"].get("GPU", 0)) if device.type == "cuda" else 1)
    for _ in range(seats):
        share = cores // seats
        yield _Seat(node["NodeID"], share, Place(device, share if workers is None else workers))


def _absolute(shard: Shard) -> Shard:
    return shard if is_address(shard.path) else replace(shard, path=str(Path(shard.path).absolute()))


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
