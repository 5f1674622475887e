"""What the closing table says in words of a corpus with nothing to keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import write_scores
from typer.testing import CliRunner

from noisyclean.cli import app

RANDOM = "The pairs do not stand out from random pairings: either the model cannot tell"
EMPTY = "The clean part is empty: "


def split(out: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["split", str(out), *options])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def random_pairings(tmp_path: Path) -> Path:
    return write_scores(tmp_path / "out", {"0": {"p_value": np.linspace(0.01, 1, 200)}})


def test_random_pairings(random_pairings: Path) -> None:
    lines = split(random_pairings).splitlines()
    (said,) = (line for line in lines if line.startswith(RANDOM))
    assert lines[lines.index(said) - 1].startswith("Estimated mismatch rate: 100.0%")
    (said,) = (line for line in lines if line.startswith(EMPTY))
    assert "at 5.0%" in said
    assert "`noisyclean split --keep 0.1`" in said


def test_nothing_passes_the_score_that_is_asked(random_pairings: Path) -> None:
    (said,) = (line for line in split(random_pairings, "--min-score", "9").splitlines() if line.startswith(EMPTY))
    assert "an easier --min-score" in said
    assert EMPTY not in split(random_pairings, "--keep", "0.1")


def test_pairs_that_stand_out(tmp_path: Path) -> None:
    p = np.concatenate([np.full(200, 1e-4), np.linspace(0.01, 1, 100)])
    said = split(write_scores(tmp_path / "out", {"0": {"p_value": p}}))
    assert "Estimated mismatch rate: 3" in said
    assert RANDOM not in said
    assert EMPTY not in said


def test_nothing_can_be_read(tmp_path: Path) -> None:
    said = split(write_scores(tmp_path / "out", {"0": {"p_value": np.ones(3), "fault": ["not an image"] * 3}}))
    assert "3 not an image" in said
    assert RANDOM not in said
    assert EMPTY not in said
