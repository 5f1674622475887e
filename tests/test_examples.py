from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import simulate_scores, write_scores

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


def test_own_embeddings(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    image = random.normal(size=(300, 32))
    text = image + 0.3 * random.normal(size=image.shape)
    text[200:] = np.roll(text[200:], 1, axis=0)
    np.savez(tmp_path / "pairs.npz", img=image.astype(np.float16), txt=text.astype(np.float16))
    command = [sys.executable, str(EXAMPLES / "own_embeddings.py"), "pairs.npz"]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert said.startswith("300 pairs, ")
    kept = np.load(tmp_path / "keep.npy")
    assert (kept < 200).mean() > 0.9
    assert len(kept) > 150


class TestOverAManifest:
    """What reads a manifest with another library, which need not be there."""

    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        """A folder with ``noisyclean-out`` in it: two shards, one of them in a folder of its own."""
        parts = {}
        for seed, shard in enumerate(("00000", "en/00001")):
            _, score, p = simulate_scores(400, 0.4, seed)
            parts[shard] = {
                "p_value": p,
                "match_score": score,
                "caption": [f"{i % 90} " + "word " * (i % 7) for i in range(400)],
                "url": [f"https://site-{i % 3}.org/{i}.jpg" for i in range(400)],
                "fault": [None if i % 50 else "no image" for i in range(400)],
            }
        nc.split(write_scores(tmp_path / "noisyclean-out", parts))
        return tmp_path

    def run(self, home: Path, script: str) -> str:
        offline = {**os.environ, "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(EXAMPLES / script)]
        return subprocess.run(command, cwd=home, env=offline, check=True, capture_output=True, text=True).stdout

    @staticmethod
    def clean_keys(home: Path) -> list[tuple[str, str]]:
        rows = nc.Manifest(home / "noisyclean-out").pairs("clean").sort_values(["shard", "index"])
        return list(zip(rows["shard"], rows["key"], strict=True))

    def test_duckdb(self, home: Path) -> None:
        assert "site-2.org" in self.run(home, "duckdb_over_a_manifest.py")
        kept = pd.read_parquet(home / "keep.parquet")
        assert list(kept.itertuples(index=False, name=None)) == self.clean_keys(home)

    def test_polars(self, home: Path) -> None:
        pytest.importorskip("polars")
        clean = self.clean_keys(home)
        assert f"The keys of {len(clean)} clean pairs" in self.run(home, "polars_over_a_manifest.py")
        for shard in ("00000", "en/00001"):
            lines = (home / "keys" / f"{shard}.txt").read_text().splitlines()
            assert lines == [key for name, key in clean if name == shard]

    def test_datasets(self, home: Path) -> None:
        pytest.importorskip("datasets")
        said = self.run(home, "huggingface_datasets.py")
        summary = nc.Manifest(home / "noisyclean-out").summary
        assert f"'clean': {summary.clean}, " in said
        assert f"'unreadable': {summary.unreadable}" in said
        assert "'rank': 1}" in said
