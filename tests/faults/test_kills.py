"""Killed at any moment and run again, a command ends as if nothing had been.

By default a few kills each; ``NOISYCLEAN_KILLS=full`` makes it 50 of ``score``, and 20 of ``fit`` and of ``export``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.harness import Command, kill_and_finish

import noisyclean as nc

FULL = os.environ.get("NOISYCLEAN_KILLS") == "full"
SMALL = ["encoder.image_size=32", "optimiser.epochs=3", "objective.warmup_epochs=1", "bank.size=64", "data.workers=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shards/``, some of them damaged, and a RUN and its OUT."""
    home = tmp_path_factory.mktemp("kills")
    nc.generate_corpus(home / "shards", pairs=480, pairs_per_shard=40, image_size=32, seed=3)
    whole = home / "shards" / "00005.tar"
    whole.write_bytes(whole.read_bytes()[:30_000])
    (home / "shards" / "00006.tar").write_bytes(b"no tar")
    nc.fit(home / "shards", out=home / "run", overrides=SMALL)
    nc.score(model=home / "run", out=home / "out", workers=0)
    nc.split(home / "out", keep=0.5)
    return home


@pytest.fixture
def commands(home: Path, tmp_path: Path) -> Callable[..., Callable[[], Command]]:
    """Makes one command after another, the same but for the folder it writes."""
    folders: Iterator[Path] = (tmp_path / str(number) for number in itertools.count())
    return lambda *words: lambda: Command(words, home, next(folders))


def test_score(commands: Callable[..., Callable[[], Command]]) -> None:
    whole, different = kill_and_finish(commands("score", "-m", "run", "--workers", "2"), 50 if FULL else 1, seed=1)
    assert len(list((whole / "scores").iterdir())) == 12
    assert (whole / "manifest" / "split=unreadable" / "00005.parquet").is_file()
    assert different == {}


def test_fit(commands: Callable[..., Callable[[], Command]]) -> None:
    settings = [f"--set={one}" for one in SMALL]
    whole, different = kill_and_finish(commands("fit", "shards", *settings), 20 if FULL else 1, seed=2)
    assert (whole / "fold-1" / "encoder" / "open_clip_model.safetensors").is_file()
    assert different == {}


def test_export(commands: Callable[..., Callable[[], Command]]) -> None:
    words = ("export", "out", "--format", "shards", "--weights", "match_probability")
    whole, different = kill_and_finish(commands(*words), 20 if FULL else 2, seed=3)
    assert len(list(whole.glob("*.tar"))) > 8
    assert different == {}
