"""Training in several processes under torchrun: as in one, whatever the shards are like, and whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import encode_noise, pair, write_tar

import noisyclean as nc
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.source import StreamSource
from noisyclean.encoders import DualEncoder
from noisyclean.training.distributed import World
from noisyclean.training.sharing import SharedStream

LIMIT = 300
"""Seconds after which something hangs."""
STEPS = Path(__file__).with_name("steps.py")
SMALL = ["optimiser.batch_size=24", "optimiser.epochs=2", "objective.warmup_epochs=1"]
PICO = ["encoder.name=pico", *SMALL]
SREM = {
    "default": [],
    "curve": ["encoder.name=pico-vit", "optimiser.epochs=25"],
    "agreement": ["objective.agreement=or", "objective.entropy_weighting=cross", "objective.complementary_bias=0.5"],
    "energy": ["objective.threshold=energy_bank", "objective.entropy_weighting=swapped"],
    "transition": ["objective.complementary=transition", "objective.complementary_bias=0.5"],
    "triplet": ["objective.matching=triplet"],
}
BASELINES = ("infonce", "vse", "decl", "rcl", "crcl", "rince")
TAKES_NO_WARMUP = ("infonce", "rcl", "rince")
TOGETHER = [(2, name) for name in (*SREM, *BASELINES, "uneven")] + [(4, "curve"), (4, "decl"), (4, "uneven")]
"""In how many processes gradients are compared with those of one, and whose."""


def torchrun(processes: int, *words: object, cwd: Path, restarts: int = 0) -> subprocess.Popen[str]:
    """Start ``torchrun … WORDS``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", processes, "--max-restarts", restarts]
    return subprocess.Popen(
        [*command, *map(str, [*options, *words])],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end(running: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for its end; fails if it hangs."""
    try:
        out, err = running.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        kill(running)
        raise
    return running.returncode, out, err


def kill(running: subprocess.Popen[str]) -> None:
    """SIGKILL to torchrun and all processes that it has started, which are in sessions of their own."""
    for listed in Path(f"/proc/{running.pid}/task").glob("*/children"):
        for process in map(int, listed.read_text().split()):
            os.kill(process, signal.SIGKILL)
    running.kill()
    running.communicate()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs: with batches of 24, every second one is ragged."""
    made = tmp_path_factory.mktemp("corpus")
    nc.generate_corpus(made, pairs=40, pairs_per_shard=15, image_size=32, seed=5)
    return made


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 150, 7, 90 and 60 pairs; of the one of 90 no picture can be decoded, and of the last every third."""
    made = tmp_path_factory.mktemp("uneven")
    broken = {"00002": range(90), "00003": range(0, 60, 3)}
    for shard, (name, count) in enumerate({"00000": 150, "00001": 7, "00002": 90, "00003": 60}.items()):
        samples = {}
        for number in range(count):
            seed = 1000 * shard + number
            sample = {**pair(seed), "png": encode_noise(seed)}
            if number in broken.get(name, ()):
                sample["png"] = sample["png"][:200]
            samples[f"{name}{number:04d}"] = sample
        write_tar(made / f"{name}.tar", samples)
    return made


@pytest.fixture(scope="module")
def steps(corpus: Path, uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], dict[str, Any]]:
    """Trains each plan in 1, 2 and 4 processes; gives the steps of one."""
    home = tmp_path_factory.mktemp("steps")
    plan = {name: [str(corpus), [*PICO, *overrides]] for name, overrides in SREM.items()}
    for name in BASELINES:
        keys = [one for one in PICO if name not in TAKES_NO_WARMUP or not one.startswith("objective.")]
        plan[name] = [str(corpus), [*keys, f"objective.name={name}"]]
    plan["uneven"] = [str(uneven), [*PICO, "optimiser.batch_size=64"]]
    plan["streamed"] = [str(uneven), [*PICO, "optimiser.batch_size=64", "data.cache=stream", "optimiser.shift=2"]]
    for processes in (1, 2, 4):
        wanted = {name for count, name in TOGETHER if processes in (1, count)} | {"streamed"}
        (home / "plan.json").write_text(json.dumps({name: plan[name] for name in sorted(wanted)}))
        (home / str(processes)).mkdir()
        code, _, err = end(torchrun(processes, STEPS, home / "plan.json", home / str(processes), cwd=home))
        assert code == 0, err
    return lambda processes, name: torch.load(home / str(processes) / f"{name}.pt")


@pytest.mark.parametrize(("processes", "name"), TOGETHER)
def test_gradients_are_those_of_one_process(name: str, processes: int, steps: Callable[..., dict[str, Any]]) -> None:
    alone, together = steps(1, name), steps(processes, name)
    assert together["pairs"] == alone["pairs"]
    for expected, found in zip(alone["gradients"], together["gradients"], strict=True):
        assert expected.keys() == found.keys()
        assert max(one.abs().max() for one in expected.values()) > 0.01
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-9, msg=parameter)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_loss_runs_the_same_course(processes: int, steps: Callable[..., dict[str, Any]]) -> None:
    alone, together = (np.array(steps(one, "curve")["losses"]) for one in (1, processes))
    assert steps(1, "curve")["pairs"] == [24, 16]
    assert len(alone) == 50
    assert alone[-2:].mean() < alone[:2].mean() - 1
    assert np.abs(together - alone).max() < 1e-3


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_uneven_shards_are_streamed_to_their_ends(processes: int, steps: Callable[..., dict[str, Any]]) -> None:
    found = steps(processes, "streamed")
    # By the second epoch all know what cannot be decoded: 197 pairs are left, of which the last five are too few.
    assert found["pairs"] == [64, 64, 64]
    assert np.isfinite(found["losses"]).all()


class Unheard(World):
    """One of several processes, of which the others are not there to say anything."""

    def everyone(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [None, 3])
def test_a_stream_gives_every_pair_to_one_process(
    processes: int, shuffle: int | None, faulty_index: CorpusIndex, encoder: DualEncoder
) -> None:
    rows = np.flatnonzero(faulty_index.usable)
    stream = StreamSource(faulty_index, encoder.preprocessor, workers=0, shuffle_buffer=32)
    given = [
        [batch.rows for batch in SharedStream(stream, Unheard(rank, processes)).batches(rows, 16, shuffle=shuffle)]
        for rank in range(processes)
    ]
    everything = torch.cat([torch.cat(batches) for batches in given])
    alone = torch.cat([batch.rows for batch in stream.batches(rows, 16)])
    assert sorted(everything.tolist()) == sorted(alone.tolist())
    assert max(len(batches) for batches in given) <= min(len(batches) for batches in given) + 1


FIT = [
    "encoder.name=pico",
    "optimiser.epochs=4",
    "optimiser.batch_size=32",
    "objective.warmup_epochs=1",
    "bank.size=64",
]


def fit_words(shards: Path, out: Path, *overrides: str) -> list[object]:
    script = (
        "import open_clip, sys; open_clip.add_model_config(sys.argv.pop(1)); from noisyclean.cli import main; main()"
    )
    path = out.parent / "fit.py"
    path.write_text(script)
    settings = [f"--set={one}" for one in (*FIT, "data.workers=0", "data.holdout=0.2", *overrides)]
    return [path, Path(__file__).parents[1] / "pico.json", "fit", shards, "-o", out, *settings]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_killed_it_goes_on_in_another_number_of_processes(uneven: Path, tmp_path: Path) -> None:
    # In float32 Adam makes much of rounding; at a usual rate so much that already another number of threads shows.
    slowly = "optimiser.learning_rate=1e-6"
    overrides = [*FIT, slowly, "data.workers=0", "data.holdout=0.2"]
    alone = nc.fit(uneven, out=tmp_path / "alone", overrides=overrides, recipe="cpu-small")
    run = tmp_path / "run"
    words = [*fit_words(uneven, run, slowly), "-r", "cpu-small"]
    running = torchrun(2, *words, cwd=tmp_path)
    deadline = time.monotonic() + LIMIT
    while not (run / "checkpoint.pt").is_file():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill(running)
    assert not (run / "run.json").exists()
    code, said, err = end(torchrun(3, *words, cwd=tmp_path))
    assert code == 0, err
    assert err.count("going on after epoch") == 1
    assert said.count("Fitted 2 folds on 307 pairs") == 1
    rows, expected = metrics(run), metrics(tmp_path / "alone")
    assert [(row["epoch"], row["fold"]) for row in rows] == [(epoch, fold) for epoch in range(4) for fold in range(2)]
    for mine, theirs in zip(rows, expected, strict=True):
        for figure in ("loss", "holdout_loss", "mean_weight", "estimated_noise"):
            if figure in theirs:
                assert mine[figure] == pytest.approx(theirs[figure], rel=0.03, abs=0.02), figure
    assert not list(run.glob("*.tmp")) + list(run.glob("checkpoint*"))
    assert alone.pairs == json.loads((run / "run.json").read_text())["pairs"]
    summary = nc.score(model=run, out=tmp_path / "out", workers=0)
    assert summary.pairs == 307


def test_a_frozen_encoder_is_embedded_trained_and_filtered_together(
    uneven: Path, encoder: DualEncoder, tmp_path: Path
) -> None:
    encoder.save(tmp_path / "base")
    frozen = [f"encoder.name=local-dir:{tmp_path / 'base'}", "encoder.frozen=true", "objective.name=ncr"]
    words = fit_words(uneven, tmp_path / "run", *frozen)
    code, _, err = end(torchrun(2, *words, "-r", "cpu-small", cwd=tmp_path))
    assert code == 0, err
    overrides = [*FIT, "data.workers=0", "data.holdout=0.2", *frozen]
    nc.fit(uneven, out=tmp_path / "alone", recipe="cpu-small", overrides=overrides)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(tmp_path / "alone"), strict=True):
        for figure in ("loss", "holdout_loss", "mean_weight"):
            assert mine[figure] == pytest.approx(theirs[figure], rel=0.01), figure
    assert not list((tmp_path / "run").glob("embeddings-*"))


def test_an_error_is_told_once(corpus: Path, tmp_path: Path) -> None:
    words = ["-m", "noisyclean", "fit", corpus, "-o", tmp_path / "run", "--set", "optimiser.batch_size=2"]
    code, out, err = end(torchrun(3, *words, cwd=tmp_path))
    assert code != 0
    assert out == ""
    (line,) = [one for one in err.splitlines() if one.startswith("noisyclean: ")]
    assert "optimiser.batch_size is 2, which 3 processes share" in line


RESTARTED = """
import os, sys
import open_clip
import noisyclean as nc
from noisyclean.cli import main
from noisyclean.errors import NoisycleanError
from noisyclean.training.crossfit import CrossFit

open_clip.add_model_config(sys.argv.pop(1))
train_epoch = CrossFit.train_epoch

def fail_once(self, epoch, task):
    if epoch == 2 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        raise NoisycleanError("the second process is ill")
    return train_epoch(self, epoch, task)

CrossFit.train_epoch = fail_once
try:
    main()
except SystemExit as end:
    if end.code:
        raise
words = sys.argv[2:]
overrides = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
nc.fit(words[0], out="again", overrides=overrides, recipe="cpu-small")
"""


def test_torchrun_starts_them_again_and_one_trains_twice(uneven: Path, tmp_path: Path) -> None:
    _, *words = fit_words(uneven, tmp_path / "run")
    (tmp_path / "script.py").write_text(RESTARTED)
    code, _, err = end(torchrun(2, tmp_path / "script.py", *words, "-r", "cpu-small", cwd=tmp_path, restarts=1))
    assert code == 0, err
    assert err.count("noisyclean: the second process is ill") == 1
    assert err.count("going on after epoch 2 of 4") == 1
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "again"))
    assert first["pairs"] == second["pairs"] == 307
