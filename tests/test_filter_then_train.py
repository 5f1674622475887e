from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import write_scores

import noisyclean as nc
from noisyclean.corpus.locate import absolute_paths, find_shards
from noisyclean.corpus.shards import ShardReader

EXAMPLE = Path(__file__).parent.parent / "examples" / "filter_then_train.py"


def test_open_clip_trains_on_the_clean_pairs(tmp_path: Path) -> None:
    nc.generate_corpus(tmp_path / "shards", pairs=120, pairs_per_shard=60, image_size=32, seed=2)
    shards = find_shards(tmp_path / "shards")
    keys = {shard.name: [sample.key for sample in ShardReader(shard)] for shard in shards}
    out = write_scores(
        tmp_path / "out",
        {name: {"key": several, "p_value": np.linspace(0.01, 1, 60)} for name, several in keys.items()},
    )
    record = out / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "paths": absolute_paths(shards)}))
    nc.split(out, keep=0.4)

    command = [sys.executable, str(EXAMPLE), str(out), "--model", "noisyclean-nano", "--device", "cpu"]
    command += ["--precision", "fp32", "--batch-size", "16", "--epochs", "1", "--workers", "0", "--warmup", "1"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "48 clean pairs in 2 shards" in done.stdout
    log = (tmp_path / "logs" / "clean" / "out.log").read_text()
    assert "Train Epoch: 0 [48/48 (100%)]" in log
    assert "Loss" in log
    assert (tmp_path / "logs" / "clean" / "checkpoints" / "epoch_1.pt").is_file()
