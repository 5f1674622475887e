"""Reading a manifest back through noisyclean's own door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("estimated_noise", "much"),
        ("estimated_noise", float("nan")),
        ("noise_interval", None),
        ("noise_interval", [0.1, 0.2, 0.3]),
        ("clean", 1.5),
        ("target_fdr", [0.05]),
    ],
)
def test_a_summary_whose_numbers_are_none(tmp_path: Path, summary: Summary, key: str, value: Any) -> None:
    values = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**values, key: value}))
    why = "NaN is no number" if value != value else rf"{key}: .*"
    with pytest.raises(UsageError, match=rf"summary\.json: missing or broken \({why}\); `noisyclean split") as error:
        _ = nc.Manifest(tmp_path).summary
    assert "\n" not in str(error.value)


def test_broken_files(tmp_path: Path, summary: Summary) -> None:
    path = tmp_path / "manifest" / "split=clean" / "a.parquet"
    rows = pq.read_table(path, partitioning=None)
    for broken, why in (
        (rows.drop_columns("rank"), "no column rank"),
        (rows.set_column(0, "key", pa.array([["a"]] * len(rows))), "list"),
        (rows.set_column(0, "key", pa.nulls(len(rows), pa.string())), "null"),
    ):
        pq.write_table(broken, path)
        with pytest.raises(
            UsageError, match=rf"a\.parquet: cannot read the manifest \(.*{why}.*\); `noisyclean"
        ) as error:
            nc.Manifest(tmp_path).pairs("clean")
        assert "\n" not in str(error.value)
    path.write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"a\.parquet: cannot read the manifest"):
        nc.Manifest(tmp_path).table()
    nc.split(tmp_path)
    assert nc.Manifest(tmp_path).table("clean").num_rows == summary.clean


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no manifest in it"):
        nc.Manifest(tmp_path)
