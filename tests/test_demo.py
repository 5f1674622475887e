from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd


def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    """At full size, as a user runs it: the figures the README states, of a truth the method has not seen."""
    command = [sys.executable, "-m", "noisyclean", "demo", "here", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 0.39 <= found["planted_noise"] <= 0.43
    assert found["auroc"] >= 0.97
    assert abs(found["estimated_noise"] - found["planted_noise"]) <= 0.03
    assert found["target_fdr"] == 0.05
    assert found["clean"]["realised_noise"] <= 0.07
    assert found["clean"]["recall"] >= 0.85
    assert found["seconds"] > 0
    assert {"random", "wrong_attribute", "uninformative"} <= set(found["kinds"])
    rows = pd.read_parquet(tmp_path / "here" / "out" / "manifest")
    truth = pd.read_parquet(tmp_path / "here" / "shards" / "truth.parquet")
    assert len(rows) == len(truth)
    assert set(zip(rows["shard"], rows["key"], strict=True)) == set(zip(truth["shard"], truth["key"], strict=True))
