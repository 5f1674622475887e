"""Kills the real command at chosen moments, and tells what it leaves behind.

A kill is SIGKILL to the command alone, as by the OOM killer: its worker processes have to end by themselves.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from safetensors import safe_open

from noisyclean.cli import main

# Importing torch takes longer than what is to be interrupted: commands are forked off a process that has done so.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["noisyclean.cli", "noisyclean.scoring.score", "noisyclean.training.fit", "noisyclean.manifest.exporting.export"]
)

VOLATILE = {"seconds", "filter_seconds", "pairs_per_second", "duration"}
"""What two runs measure differently."""


@dataclass(frozen=True)
class Command:
    """A command line with its output folder.

    Attributes:
        words: what is typed after ``noisyclean``; its output goes where ``-o`` says.
        cwd: where it is typed.
        out: the folder it writes.
    """

    words: Sequence[str]
    cwd: Path
    out: Path

    def run(self) -> float:
        """Run it to its end; returns the seconds it took."""
        started = time.monotonic()
        code, said = self.end()
        assert code == 0, said
        return time.monotonic() - started

    def end(self, *, setup: Callable[[], None] | None = None) -> tuple[int, str]:
        """Run it to its end; returns its exit code, and all it said. ``setup`` is called first, in its process."""
        with tempfile.TemporaryFile("w+") as log:
            running = self._start(log.fileno(), setup)
            running.join(300)
            assert running.exitcode is not None, "it hangs"
            log.seek(0)
            said = log.read()
        assert "Traceback" not in said, said
        return running.exitcode, said

    def kill(self, after: float) -> float | None:
        """Start it, and kill it after so many seconds; returns None, or how long it took if it had ended before."""
        started = time.monotonic()
        with tempfile.TemporaryFile("w+") as log:
            running = self._start(log.fileno(), None)
            running.join(after)
            seconds = time.monotonic() - started
            running.kill()
            running.join()
        assert running.exitcode in (0, -signal.SIGKILL)
        assert running.pid is not None
        _await_end_of_session(running.pid)
        return seconds if running.exitcode == 0 else None

    def _start(self, log: int, setup: Callable[[], None] | None) -> BaseProcess:
        argv = ["noisyclean", *self.words, "-o", str(self.out)]
        running = _PROCESSES.Process(target=_main, args=(argv, self.cwd, DupFd(log), setup))
        running.start()
        return running


def _main(argv: list[str], cwd: Path, log: Any, setup: Callable[[], None] | None) -> None:
    multiprocessing.set_start_method(None, force=True)
    os.setsid()
    descriptor = log.detach()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.chdir(cwd)
    sys.argv = argv
    if setup is not None:
        setup()
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    # As a command of its own ends; this process would wait for those that joblib keeps for the next call.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def moments(kills: int, seed: int) -> list[float]:
    """Shares of a duration from 0 to 1, one drawn from each of ``kills`` equal parts of it."""
    draw = random.Random(seed)
    return [(part + draw.random()) / kills for part in range(kills)]


def kill_and_finish(make: Callable[[], Command], kills: int, seed: int) -> tuple[Path, dict[str, list[str]]]:
    """Run a command undisturbed, then kill and finish it ``kills`` times, each time into a new folder.

    Returns:
        What the undisturbed run wrote, and, for each time that the outcome was another, when the command was killed and
        which files differ.
    """
    whole = make()
    seconds = whole.run()
    expected = contents(whole.out)
    different = {}
    for moment in moments(kills, seed):
        command = make()
        with watching(command.out):
            while (quicker := command.kill(moment * seconds)) is not None:
                seconds = quicker
                shutil.rmtree(command.out)
            parse_all(command.out)
            command.run()
        left_over = list(command.out.rglob("*.tmp"))
        assert not left_over
        found = contents(command.out)
        if found != expected:
            names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            different[f"{moment:.0%} of {seconds:.1f} s"] = names
    return whole.out, different


def contents(folder: Path) -> dict[str, str]:
    """File → a digest of what is in it, but for how long it took; without TensorBoard's files, named by the time."""
    return {
        path.relative_to(folder).as_posix(): hashlib.blake2b(_lasting(path)).hexdigest()
        for path in _visible(folder)
        if path.parent.name != "tensorboard"
    }


def _lasting(path: Path) -> bytes:
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return json.dumps(_without_volatile(values)).encode()


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_volatile(one) for name, one in value.items() if name not in VOLATILE}
    return [_without_volatile(one) for one in value] if isinstance(value, list) else value


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    """Parse every file that appears in ``folder`` at once, as another program might; fails if one is not whole."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def watch() -> None:
        seen: set[tuple[str, int, int]] = set()
        while not stop.wait(0.002) and not failed:
            try:
                parse_all(folder, seen)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def parse_all(folder: Path, seen: set[tuple[str, int, int]] | None = None) -> None:
    """Parse all files in ``folder`` under final names, but for those ``seen`` (path, inode and size)."""
    for path in _visible(folder):
        try:
            status = path.stat()
            identity = (str(path), status.st_ino, status.st_mtime_ns)
            if seen is not None and identity in seen:
                continue
            parse(path)
        except FileNotFoundError:
            continue  # gone again, or moved
        except Exception as error:
            raise AssertionError(f"{path} of {status.st_size:,} bytes is not whole: {error}") from error
        if seen is not None:
            seen.add(identity)


def parse(path: Path) -> None:
    """Read a file to its end, in whatever format its name says."""
    if path.suffix == ".parquet":
        pq.ParquetFile(path).read()
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                file.get_tensor(name)
    elif path.suffix == ".tar":
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert len(content.read()) == member.size
        assert path.read_bytes()[-1024:] == bytes(1024), "no end mark"
    elif path.suffix == ".pt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".yaml":
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))


def _visible(folder: Path) -> list[Path]:
    """Files under final names: what begins with a dot is nobody's business."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".")]
        found += [Path(root, one) for one in files if not one.startswith(".")]
    return sorted(found)


def _await_end_of_session(session: int) -> None:
    """Wait until the processes that a killed command has left are gone; fails if they stay."""
    deadline = time.monotonic() + 20
    while left := _processes_of(session):
        assert time.monotonic() < deadline, f"processes outlive their command: {left}"
        time.sleep(0.05)


def _processes_of(session: int) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(own_session) == session and state != "Z":
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (OSError, ValueError):
            continue
    return found
