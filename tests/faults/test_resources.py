"""No room, no permission, few descriptors, a clock set back: one line, nothing lost, and the same command goes on."""

from __future__ import annotations

import ctypes
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from faults.harness import Command, contents, parse_all

import noisyclean as nc

SMALL = ["encoder.image_size=32", "optimiser.epochs=2", "objective.warmup_epochs=1", "bank.size=64", "data.workers=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shards/``, a RUN of two of them, ``scores`` of all, and what is exported of these."""
    home = tmp_path_factory.mktemp("resources")
    nc.generate_corpus(home / "shards", pairs=480, pairs_per_shard=40, image_size=32, seed=3)
    nc.fit(home / "shards" / "0000[0-5].tar", out=home / "run", overrides=SMALL)
    nc.score(home / "shards", model=home / "run", out=home / "scored", workers=0)
    nc.split(home / "scored", keep=0.9)
    nc.export(home / "scored", to=home / "exported", format="shards")
    return home


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def score(home: Path, out: Path, *more: str) -> Command:
    return Command(["score", "shards", "-m", "run", "--workers", "2", *more], home, out)


def test_a_full_disk_and_more_room(home: Path, small_disk: Path) -> None:
    command = Command(["export", "scored", "--format", "shards"], home, small_disk / "out")
    code, said = command.end()
    last = said.splitlines()[-1]
    assert (code, last.count("\n")) == (1, 0)
    assert last.startswith(f"noisyclean: {small_disk}/out/0000")
    assert "No space left on device); make room, and repeat the command" in last
    parse_all(small_disk / "out")
    done = {path: path.stat().st_mtime_ns for path in (small_disk / "out").glob("*.tar")}
    assert 0 < len(done) < 12
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    command.run()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    expected = contents(home / "exported")
    assert contents(small_disk / "out") == expected


def test_scores_on_a_full_disk(home: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(330_000))
    code, said = score(home, small_disk / "out").end()
    assert code == 1
    assert "No space left on device); make room" in said.splitlines()[-1]
    parse_all(small_disk / "out")
    kept = list((small_disk / "out" / "scores").glob("*.parquet"))
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    code, said = score(home, small_disk / "out").end()
    assert code == 0
    if kept:
        assert f"{len(kept)} of 12 shards are scored already" in said
    nc.split(small_disk / "out", keep=0.9)
    assert contents(small_disk / "out" / "manifest") == contents(home / "scored" / "manifest")


def limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))


def test_files_that_may_not_grow(home: Path, tmp_path: Path) -> None:
    """As of a quota; where no file system can be mounted this stands for a full disk."""
    command = Command(["export", "scored", "--format", "shards"], home, tmp_path / "out")
    code, said = command.end(setup=partial(limit, resource.RLIMIT_FSIZE, 20_000))
    assert code == 1
    assert said.splitlines()[-1] == (
        f"noisyclean: {tmp_path}/out/00000.tar: cannot be written (File too large); make room, and repeat the command"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export.json"]
    command.run()
    assert contents(tmp_path / "out") == contents(home / "exported")


def test_a_checkpoint_that_does_not_fit(home: Path, tmp_path: Path) -> None:
    command = Command(["fit", "shards", *[f"--set={one}" for one in SMALL]], home, tmp_path / "run")
    code, said = command.end(setup=partial(limit, resource.RLIMIT_FSIZE, 1_000_000))
    assert code == 1
    assert said.splitlines()[-1].startswith(f"noisyclean: {tmp_path}/run/checkpoint.pt: cannot be written (")
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_few_file_descriptors(home: Path, tmp_path: Path) -> None:
    code, said = score(home, tmp_path / "out").end(setup=partial(limit, resource.RLIMIT_NOFILE, 64))
    assert code == 0, said
    assert contents(tmp_path / "out" / "scores") == contents(home / "scored" / "scores")


def shrink_shared_memory() -> None:
    own_mounts = 0x20000
    assert ctypes.CDLL(None, use_errno=True).unshare(own_mounts) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"], check=True)


@pytest.mark.usefixtures("small_disk")  # where one cannot be mounted, neither can this
def test_little_shared_memory(home: Path, tmp_path: Path) -> None:
    """A container has 64 MB of it by default, which a few chunks of large pictures would fill."""
    code, said = score(home, tmp_path / "out").end(setup=shrink_shared_memory)
    assert code == 0, said
    assert contents(tmp_path / "out" / "scores") == contents(home / "scored" / "scores")


def test_a_read_only_output(home: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, said = score(home, small_disk / "out").end()
    assert code == 1
    assert said.splitlines()[-1].startswith(f"noisyclean: {small_disk}/out")
    assert "Read-only file system" in said.splitlines()[-1]


def test_an_output_that_vanishes(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ThreadPoolExecutor() as pool:
        ending = pool.submit(score(home, out).end)
        while not ending.done() and not list(out.glob("scores/*.parquet")):
            time.sleep(0.001)
        while not ending.done() and out.exists():
            shutil.rmtree(out, ignore_errors=True)
        code, said = ending.result()
    assert code in (1, 2)
    assert said.splitlines()[-1].startswith("noisyclean: ")
    assert str(out) in said.splitlines()[-1]
    score(home, out).run()
    assert contents(out / "scores") == contents(home / "scored" / "scores")


def clock_goes_back() -> None:
    real, calls = time.time, iter(range(10**9))
    time.time = lambda: real() - 3600 * next(calls)


def test_a_clock_that_goes_back(home: Path, tmp_path: Path) -> None:
    code, said = score(home, tmp_path / "out").end(setup=clock_goes_back)
    assert code == 0, said
    assert contents(tmp_path / "out" / "scores") == contents(home / "scored" / "scores")
    assert nc.Manifest(tmp_path / "out").summary.seconds > 0
