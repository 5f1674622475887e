"""Reading a manifest back through noisyclean's own door."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import simulate_scores, write_scores

import noisyclean as nc
from noisyclean.errors import UsageError
from noisyclean.manifest.schema import MANIFEST_SCHEMA, SPLITS
from noisyclean.manifest.splitting import Summary


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    _, score, p = simulate_scores(300, 0.4, 0)
    faults = ["no image", *[None] * 299]
    write_scores(tmp_path, {"a": {"p_value": p, "match_score": score, "fault": faults}, "b/c": {"p_value": [0.5]}})
    return nc.split(tmp_path)


def test_splits(tmp_path: Path, summary: Summary) -> None:
    manifest = nc.Manifest(tmp_path)
    assert manifest.summary == summary
    for name in SPLITS:
        rows = manifest.pairs(name)
        assert len(rows) == getattr(summary, name) > 0
        assert set(rows["split"]) == {name}
    assert len(manifest.pairs("clean", "noisy")) == summary.clean + summary.noisy
    everything = manifest.table()
    assert everything.num_rows == summary.pairs == 301
    assert everything.schema.names == [*MANIFEST_SCHEMA.names, "split"]
    assert set(everything["shard"].to_pylist()) == {"a", "b/c"}


@pytest.mark.parametrize("split", ["clean", "uncertain"])
def test_columns(tmp_path: Path, summary: Summary, split: str) -> None:
    nc.split(tmp_path, keep=1.0)  # which leaves nothing uncertain: an empty part has the same columns
    manifest = nc.Manifest(tmp_path)
    rows = 300 if split == "clean" else 0
    for columns in (["key", "rank"], ["key", "rank", "split"], ["split"], []):
        table = manifest.table(split, columns=columns)
        assert set(table.schema.names) == {*columns, "split"}
        assert table.num_rows == rows


def test_unknown_column(tmp_path: Path, summary: Summary) -> None:
    with pytest.raises(UsageError, match="beauty: no such column; there are key, shard"):
        nc.Manifest(tmp_path).table(columns=["key", "beauty"])


def test_unknown_split(tmp_path: Path, summary: Summary) -> None:
    with pytest.raises(UsageError, match="dirty: no such split; there are clean, noisy, uncertain, unreadable"):
        nc.Manifest(tmp_path).table("dirty")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_broken_summary(tmp_path: Path, summary: Summary, content: str | None) -> None:
    (tmp_path / "summary.json").unlink()
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UsageError, match=r"summary\.json: missing or broken"):
        _ = nc.Manifest(tmp_path).summary
    nc.split(tmp_path)
    assert nc.Manifest(tmp_path).summary == summary


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no manifest in it"):
        nc.Manifest(tmp_path)
