"""Score parts: whole or not there, and they say what they are."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import pair, write_scores, write_tar

from noisyclean.corpus.locate import Shard
from noisyclean.errors import UsageError
from noisyclean.manifest.parts import (
    PartInfo,
    list_parts,
    part_path,
    read_part,
    read_part_info,
    shard_state,
    write_part,
)
from noisyclean.manifest.schema import PART_SCHEMA

INFO = PartInfo(scorer="ab12", source="10:20", damage="damaged tar: é")


@pytest.fixture
def table(tmp_path: Path) -> pa.Table:
    write_scores(tmp_path / "other", {"s": {"p_value": [0.1, 0.2, 0.3], "fault": [None, "no image", None]}})
    return read_part(tmp_path / "other", "s")


@pytest.mark.parametrize("shard", ["00000", "part.v2", "folder/00000", "bucket/a b/ü"])
def test_round_trip(tmp_path: Path, table: pa.Table, shard: str) -> None:
    write_part(tmp_path / "out", shard, table, INFO)
    assert list_parts(tmp_path / "out") == [shard]
    assert read_part_info(tmp_path / "out", shard) == INFO
    assert read_part(tmp_path / "out", shard) == table
    assert read_part(tmp_path / "out", shard, ["fault", "key"]) == table.select(["fault", "key"])


def test_empty_shard(tmp_path: Path) -> None:
    write_part(tmp_path, "s", PART_SCHEMA.empty_table(), INFO)
    assert read_part(tmp_path, "s").schema == PART_SCHEMA


def test_no_parts(tmp_path: Path) -> None:
    assert list_parts(tmp_path) == []


def test_failed_write_leaves_what_was_there(tmp_path: Path, table: pa.Table) -> None:
    write_part(tmp_path, "s", table, INFO)
    with pytest.raises(ValueError, match="schema"):
        write_part(tmp_path, "s", table.drop_columns("key"), INFO)
    assert read_part(tmp_path, "s") == table
    assert [path.name for path in part_path(tmp_path, "s").parent.iterdir()] == ["s.parquet"]


def test_unfinished_writes_are_no_parts(tmp_path: Path, table: pa.Table) -> None:
    write_part(tmp_path, "s", table, INFO)
    (part_path(tmp_path, "s").parent / ".t.parquet.123.tmp").write_bytes(b"half a file")
    assert list_parts(tmp_path) == ["s"]


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "foreign"])
def test_what_is_no_part_is_refused_by_name(tmp_path: Path, table: pa.Table, damage: str) -> None:
    write_part(tmp_path, "s", table, INFO)
    path = part_path(tmp_path, "s")
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        pq.write_table(table.replace_schema_metadata(None), path)
    else:
        path.write_bytes(path.read_bytes()[: {"cut": -20, "empty": 0}[damage]])
    with pytest.raises(UsageError, match=r"scores/s\.parquet: not a score part"):
        read_part(tmp_path, "s")


def test_other_schema_version_is_refused(tmp_path: Path, table: pa.Table) -> None:
    write_part(tmp_path, "s", table, replace(INFO, version="0"))
    with pytest.raises(UsageError, match="schema version 0"):
        read_part(tmp_path, "s")


def test_shard_state_tells_content(tmp_path: Path) -> None:
    def state(path: Path) -> str:
        return shard_state(Shard("s", str(path)))

    path = write_tar(tmp_path / "s.tar", {"k": pair(0)})
    before = state(path)
    copy = Path(shutil.copy(path, tmp_path / "copy.tar"))
    os.utime(copy, (1, 1))
    assert state(copy) == before != ""

    data = path.read_bytes()
    path.write_bytes(data.replace(b"caption number 0", b"caption number 1"))
    assert len(path.read_bytes()) == len(data)
    assert state(path) != before
    path.write_bytes(data + bytes(512))
    assert state(path) != before
    assert state(tmp_path / "missing.tar") == ""


@pytest.mark.parametrize("changed", [0, 2**22 + 6])
def test_shard_state_tells_changes_at_both_ends_of_a_large_shard(tmp_path: Path, changed: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(bytes(2**22 + 7))
    before = shard_state(Shard("s", str(path)))
    with path.open("r+b") as file:
        file.seek(changed)
        file.write(b"x")
    assert shard_state(Shard("s", str(path))) != before
