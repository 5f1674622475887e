from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

import noisyclean as nc

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["encoder.image_size=32", "optimiser.epochs=2", "objective.warmup_epochs=1", "bank.size=64", "data.workers=0"]


def test_the_examples_run_as_they_are(tmp_path: Path) -> None:
    nc.generate_corpus(tmp_path / "shards", pairs=120, image_size=32, seed=2)

    def run(script: str, *words: str) -> str:
        command = [sys.executable, str(EXAMPLES / script), *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "of the pairs are mismatched" in run("clean_with_the_api.py", "shards", *SMALL)
    assert list(pd.read_csv(tmp_path / "keep.csv")) == ["shard", "key"]
    assert "120 pairs" in run("read_a_manifest.py", "api-out")
