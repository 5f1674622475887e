"""Scored on a Ray cluster, whatever happens to its nodes, a corpus has the OUT folder that one machine makes."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from faults.harness import contents, watching
from helpers import Listener

import noisyclean as nc
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.progress import Task
from noisyclean.scoring import window

# Ray is imported by the fixture that sets how it is to be.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'noisyclean[ray]'")

SMALL = ["encoder.image_size=32", "optimiser.epochs=2", "objective.warmup_epochs=1", "bank.size=64", "data.workers=0"]
SHARDS = 18


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one CPU each, beside a head that scores nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")  # else the cluster would take orders from whoever reaches this machine
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 150 * 2**20}
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        for _ in range(3):
            found.add_node(num_cpus=1, **small)
        try:
            yield found
        finally:
            found.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shards/``, one of them damaged, and a RUN."""
    home = tmp_path_factory.mktemp("ray")
    nc.generate_corpus(home / "shards", pairs=SHARDS * 40, pairs_per_shard=40, image_size=32, seed=3)
    damaged = home / "shards" / "00005.tar"
    damaged.write_bytes(damaged.read_bytes()[:20_000])
    nc.fit(home / "shards", out=home / "run", overrides=SMALL)
    return home


@pytest.fixture(scope="module")
def local(home: Path) -> Path:
    """What one machine makes of the RUN."""
    nc.score(model=home / "run", out=home / "local", workers=1)
    return home / "local"


@pytest.fixture
def score(cluster: Any, home: Path) -> Iterator[Callable[..., Any]]:
    """Scores with the RUN on the cluster, and leaves no process there."""

    def run(**options: Any) -> Any:
        return nc.score(**{"model": home / "run", "engine": "ray", "address": cluster.address, **options})

    yield run
    deadline = time.monotonic() + 20
    while left := _processes_of_models():
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def _processes_of_models() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(b"ray::_Models"):
                found.append(process.name)
        except OSError:
            continue
    return found


class At(Listener):
    """Does something once, at the first word from the models that shards are done; keeps what is said."""

    def __init__(self, do: Callable[[], None]) -> None:
        super().__init__()
        self._do = [do]

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        if amount and self._do:
            self._do.pop()()


class Before(Listener):
    """Does something as the scoring begins."""

    def __init__(self, do: Callable[[], None]) -> None:
        super().__init__()
        self._do = do

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Task]:
        if name == "scoring":
            self._do()
        yield self


def interrupt() -> None:
    raise KeyboardInterrupt


def parts(out: Path) -> dict[str, tuple[int, int]]:
    """Which file each part is: one that was written again is another."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out / "scores").glob("[!.]*.parquet")}


def test_all_that_is_written_is_as_from_one_machine(score: Callable[..., Any], home: Path, tmp_path: Path) -> None:
    asked = {"model": home / "run" / "fold-0" / "encoder", "rematch": True}
    nc.score(home / "shards", **asked, out=tmp_path / "local", save_embeddings=tmp_path / "saved-local", workers=1)
    (tmp_path / "ray").mkdir()
    with watching(tmp_path / "ray"):
        score(shards=home / "shards", **asked, out=tmp_path / "ray", save_embeddings=tmp_path / "saved-ray")
    assert len(parts(tmp_path / "ray")) == SHARDS
    # Of the bank, whose metadata safetensors shuffles, each part has the fingerprint.
    ray, local = (contents(tmp_path / one) for one in ("ray", "local"))
    assert {*ray} == {*local}
    assert {name for name in ray if ray[name] != local[name]} <= {"bank.safetensors"}
    assert contents(tmp_path / "saved-ray") == contents(tmp_path / "saved-local")


def test_a_node_is_lost(
    score: Callable[..., Any], cluster: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scoring.failing_models import Slow

    monkeypatch.setattr("noisyclean.scoring.engines.ray._Models", Slow)  # none is through when the first word comes
    (node, *_) = cluster.worker_nodes
    listener = At(lambda: cluster.remove_node(node, allow_graceful=False))
    try:
        score(out=tmp_path / "out", progress=listener)
    finally:
        cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)
    assert [one for one in listener.said if one.startswith("models on the Ray cluster were lost")]
    assert contents(tmp_path / "out") == contents(local)


def test_models_are_lost_while_idle_or_fall_ill(
    score: Callable[..., Any], home: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scoring.failing_models import Forgetful

    monkeypatch.setattr("noisyclean.scoring.engines.ray._Models", Forgetful)
    listener = Listener()
    score(out=tmp_path / "out", progress=listener)
    assert [one for one in listener.said if "(RuntimeError on node" in one and "uncorrectable ECC error" in one]
    (tmp_path / "out" / "ill").unlink()
    assert contents(tmp_path / "out") == contents(local)


def test_a_shard_that_always_ends_its_models_is_named(
    score: Callable[..., Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scoring.failing_models import DEADLY, Mortal

    monkeypatch.setattr("noisyclean.scoring.engines.ray._Models", Mortal)
    shards = [home / "shards" / f"0000{number}.tar" for number in range(1, 7)]
    with pytest.raises(NoisycleanError, match=rf"{DEADLY}\.tar: the models that score it are lost, 3 times in a row"):
        score(shards=shards, out=tmp_path / "out")
    assert sorted(parts(tmp_path / "out")) == [f"{one.stem}.parquet" for one in shards if one.stem != DEADLY]


@pytest.mark.parametrize("first", ["local", "ray"])
def test_one_engine_finishes_what_the_other_began(
    score: Callable[..., Any], first: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "PASSES", 4)  # or one machine would finish all shards at once
    out = tmp_path / "out"
    engines = [{"engine": "local", "address": None, "workers": 1}, {}]
    if first == "ray":
        engines.reverse()
    with pytest.raises(KeyboardInterrupt):
        score(out=out, **engines[0], progress=At(interrupt))
    begun = parts(out)
    assert 0 < len(begun) < SHARDS
    score(out=out, **engines[1])
    finished = parts(out)
    assert {name: finished[name] for name in begun} == begun
    assert contents(out) == contents(local)
    score(out=out, **engines[0])
    assert parts(out) == finished


def test_a_shard_that_a_node_cannot_open(score: Callable[..., Any], home: Path, tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    shard.write_bytes((home / "shards" / "00000.tar").read_bytes())
    with pytest.raises(NoisycleanError, match=r"00000\.tar: .* \(on node .+\)$"):
        score(shards=shard, out=tmp_path / "out", progress=Before(shard.unlink))


def test_a_node_without_the_folder(score: Callable[..., Any], home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    elsewhere = Before(lambda: (out / "run.json").rename(out / "elsewhere.json"))
    with pytest.raises(UsageError, match=f"{out}: node .+ does not see this folder as this machine does"):
        score(shards=home / "shards" / "00000.tar", out=out, progress=elsewhere)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "local", "address": "auto"}, "--address auto goes with --engine ray"),
        ({"address": "ray://127.0.0.1:1"}, "no Ray client; run the command on a node"),
        ({"address": "127.0.0.1:1"}, "cannot join a Ray cluster there"),
        ({"device": "cuda"}, "--device cuda: no node of the Ray cluster has a GPU"),
        ({"device": "cuda:1"}, "--device cuda:1: cpu or cuda with --engine ray"),
    ],
)
def test_what_cannot_be_meant(
    score: Callable[..., Any], options: dict[str, str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=said):
        score(out=tmp_path / "out", **options)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()


def test_without_ray(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noisyclean.scoring.engines.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'noisyclean\[ray\]'"):
        nc.score(model=home / "run", out=tmp_path / "out", engine="ray")
