"""Exporting: every chosen sample once, byte for byte, in forms that other tools read without noisyclean."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, get_args

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from helpers import Listener, Members, pair, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

import noisyclean as nc
from noisyclean.cli import main
from noisyclean.corpus import shards
from noisyclean.corpus.locate import Shard, absolute_paths, find_shards
from noisyclean.corpus.shards import SampleMembers, ShardReader, open_shard
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import write_json
from noisyclean.manifest.exporting.export import Format
from noisyclean.manifest.exporting.tars import INCOMPLETE, REPEATED, UNSAFE
from noisyclean.manifest.schema import MANIFEST_SCHEMA, SPLITS

FORMATS: tuple[Format, ...] = get_args(Format)

Rows = Mapping[str, Sequence[Any]]


def uid(number: int) -> str:
    return f"{random.Random(number).getrandbits(128):032x}"


def write_manifest(out: Path, corpus: Path, splits: Mapping[str, Sequence[str]], **columns: Rows) -> Path:
    """Make an OUT folder of a real corpus: shard → the split of each sample, and of other columns what is given."""
    found = find_shards(corpus)
    for shard in found:
        samples = list(ShardReader(shard))
        names = list(splits[shard.name])
        assert len(samples) == len(names)
        table = pa.table(
            {
                "key": [one.key for one in samples],
                "shard": [shard.name] * len(samples),
                "index": [one.index for one in samples],
                "uid": [one.uid for one in samples],
                "caption": [one.caption for one in samples],
                "match_probability": [None if one == "unreadable" else (i + 1) / 64 for i, one in enumerate(names)],
                "similarity": np.linspace(-0.5, 0.9, len(samples)),
                "reason": ["because"] * len(samples),
            }
        )
        for name, values in columns.items():
            if shard.name in values:
                table = table.drop_columns(name).append_column(name, pa.array(values[shard.name]))
        whole = pa.table(
            [
                table[one.name].cast(one.type) if one.name in table.schema.names else pa.nulls(len(samples), one.type)
                for one in MANIFEST_SCHEMA
            ],
            schema=MANIFEST_SCHEMA,
        )
        for split in set(names):
            path = out / "manifest" / f"split={split}" / f"{shard.name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(whole.filter(pa.array([name == split for name in names])), path)
    record = {"shards": [one.name for one in found], "paths": absolute_paths(found)}
    write_json(out / "run.json", {**record, "null_pairs": 100, "scorer": "s", "model": "m"})
    return out


def alternate(count: int, first: int = 0) -> list[str]:
    return [("clean", "noisy", "clean", "uncertain")[(first + i) % 4] for i in range(count)]


SPLIT = {"00000": alternate(12), "00001": ["noisy"] * 5, "00002": alternate(9, 1)}
CLEAN = sum(names.count("clean") for names in SPLIT.values())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three shards, one of them gzipped, of samples with more members than a caption and a picture."""

    def samples(start: int, count: int) -> dict[str, Members]:
        numbers = range(start, start + count)
        return {f"{i:09d}": {**pair(i, uid=uid(i)), "mask.png": b"m" * i, "cls": str(i).encode()} for i in numbers}

    root = tmp_path / "shards"
    write_tar(root / "00000.tar", samples(0, 12))
    write_tar(root / "00001.tar", samples(12, 5))
    write_tar(root / "00002.tar.gz", samples(17, 9), "w:gz")
    return root


@pytest.fixture
def out(corpus: Path, tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "out", corpus, SPLIT)


def samples_in(*paths: Path) -> list[SampleMembers]:
    found = []
    for path in paths:
        reader = ShardReader(Shard(path.name, str(path)))
        found += list(reader.members())
        assert reader.damage is None
    return found


def members_in(*paths: Path) -> list[tuple[str, bytes]]:
    """Name and bytes of every member, by tarfile alone."""
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found.append((member.name, content.read()))
    return found


def wanted(corpus: Path, splits: Mapping[str, Sequence[str]], *names: str) -> list[tuple[str, bytes]]:
    """The members that an export of these splits must have."""
    found = []
    for shard in find_shards(corpus):
        for raw, split in zip(ShardReader(shard).members(), splits[shard.name], strict=True):
            if split in names:
                found += [(f"{raw.key}.{extension}", data) for extension, data in raw.members.items()]
    return found


def tars_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tar"))


def content(folder: Path) -> dict[str, bytes]:
    """All files but those that say how long it took."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("_stats.json"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextmanager
def interrupting(where: object, name: str) -> Iterator[None]:
    """Press Ctrl-C when that function is called."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, interrupt)
        yield


class TestShards:
    def test_samples_are_whole_and_in_order(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        done = nc.export(out, to=tmp_path / "to", format="shards")
        tars = tars_in(tmp_path / "to")
        assert [tar.name for tar in tars] == ["00000.tar", "00002.tar"]
        assert members_in(*tars) == wanted(corpus, SPLIT, "clean")
        assert (done.rows, done.files, done.left_out) == (CLEAN, 2, {})
        assert done.bytes == sum(tar.stat().st_size for tar in tars)
        assert tars[1].read_bytes()[:2] != b"\x1f\x8b"

    def test_several_splits(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        nc.export(out, to=tmp_path / "to", format="shards", splits=["uncertain", "noisy"])
        assert members_in(*tars_in(tmp_path / "to")) == wanted(corpus, SPLIT, "noisy", "uncertain")

    @pytest.mark.parametrize("size", [1, 4, 100])
    def test_shards_of_one_size(self, corpus: Path, out: Path, tmp_path: Path, size: int) -> None:
        nc.export(out, to=tmp_path / "to", format="shards", shard_size=size)
        tars = tars_in(tmp_path / "to")
        assert [tar.stem for tar in tars] == [f"{i:05d}" for i in range(-(-CLEAN // size))]
        assert members_in(*tars) == wanted(corpus, SPLIT, "clean")
        assert [len(samples_in(tar)) for tar in tars[:-1]] == [size] * (len(tars) - 1)

    def test_each_shard_is_read_once(self, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = []

        def count(shard: Shard) -> IO[bytes]:
            opened.append(shard.name)
            return open_shard(shard)

        monkeypatch.setattr(shards, "open_shard", count)
        nc.export(out, to=tmp_path / "to", format="shards", shard_size=2)
        assert opened == ["00000", "00002"]

    def test_webdataset_reads_them(self, out: Path, tmp_path: Path) -> None:
        nc.export(out, to=tmp_path / "to", format="shards", shard_size=5)
        urls = [str(tar) for tar in tars_in(tmp_path / "to")]
        read = [one for one in webdataset.WebDataset(urls, shardshuffle=False) if "__key__" in one]
        assert [one["__key__"] for one in read] == list(nc.Manifest(out).pairs("clean")["key"])
        assert {*read[0]} >= {"png", "json", "txt", "mask.png", "cls"}

    @pytest.mark.parametrize("size", [None, 4])
    def test_counts_beside_the_tars(self, out: Path, tmp_path: Path, size: int | None) -> None:
        nc.export(out, to=tmp_path / "to", format="shards", shard_size=size)
        counts = {tar.name: len(samples_in(tar)) for tar in tars_in(tmp_path / "to")}
        assert json.loads((tmp_path / "to" / "sizes.json").read_text()) == counts
        for name, count in counts.items():
            stats = json.loads((tmp_path / "to" / name.replace(".tar", "_stats.json")).read_text())
            assert stats["count"] == stats["successes"] == count
            assert stats["status_dict"] == {"success": count}
            assert stats["duration"] > 0

    def test_nested_shards_of_equal_keys(self, tmp_path: Path) -> None:
        for number, language in enumerate(("en", "lang=fr")):
            samples = {str(i): pair(10 * number + i) for i in range(4)}
            write_tar(tmp_path / "in" / language / "0.tar", samples)
        splits = {"en/0": ["clean"] * 4, "lang=fr/0": ["noisy", "clean", "clean", "clean"]}
        out = write_manifest(tmp_path / "out", tmp_path / "in", splits)
        (out / "manifest" / "split=clean" / "lang=fr").rename(out / "manifest" / "split=clean" / "lang%3Dfr")
        nc.export(out, to=tmp_path / "to", format="shards")
        assert json.loads((tmp_path / "to" / "en" / "sizes.json").read_text()) == {"0.tar": 4}
        assert json.loads((tmp_path / "to" / "lang=fr" / "sizes.json").read_text()) == {"0.tar": 3}
        # Mixed into one tar, samples of one key could not be told apart.
        nc.export(out, to=tmp_path / "flat", format="shards", shard_size=6)
        tars = tars_in(tmp_path / "flat")
        assert [[one.key for one in samples_in(tar)] for tar in tars] == [["0", "1", "2", "3"], ["1", "2", "3"]]
        assert members_in(*tars) == wanted(tmp_path / "in", splits, "clean")

    def test_weights(self, out: Path, tmp_path: Path) -> None:
        nc.export(out, to=tmp_path / "to", format="shards", weights="match_probability")
        rows = nc.Manifest(out).pairs("clean")
        for tar in tars_in(tmp_path / "to"):
            table = pq.read_table(tar.with_suffix(".parquet"))
            assert table.schema.names == ["key", "weight"]
            assert table["key"].to_pylist() == [one.key for one in samples_in(tar)]
            expected = rows[rows["shard"] == tar.stem]["match_probability"]
            assert table["weight"].to_pylist() == list(expected)
        nc.export(out, to=tmp_path / "to", format="shards")
        assert not list((tmp_path / "to").rglob("*.parquet"))

    def test_the_index_decides_among_samples_of_one_key(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in" / "0.tar", [("a", pair(0)), ("b", pair(1)), ("a", pair(2)), ("c", pair(3))])
        splits = {"0": ["noisy", "clean", "clean", "noisy"]}
        out = write_manifest(tmp_path / "out", tmp_path / "in", splits)
        nc.export(out, to=tmp_path / "to", format="shards")
        assert members_in(*tars_in(tmp_path / "to")) == wanted(tmp_path / "in", splits, "clean")

    def test_one_key_twice_in_a_tar(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in" / "0.tar", [("a", pair(0)), ("b", pair(1)), ("a", pair(2))])
        out = write_manifest(tmp_path / "out", tmp_path / "in", {"0": ["unreadable"] * 3})
        done = nc.export(out, to=tmp_path / "to", format="shards", splits=["unreadable"])
        assert (done.rows, done.left_out) == (2, {REPEATED: 1})
        assert [name for name, _ in members_in(*tars_in(tmp_path / "to"))][::3] == ["a.png", "b.png"]
        done = nc.export(out, to=tmp_path / "cut", format="shards", splits=["unreadable"], shard_size=9)
        assert (done.rows, done.files, done.left_out) == (3, 2, {})

    def test_hostile_keys(self, tmp_path: Path) -> None:
        keys = ["../../x", "/abs", "a/../../y", "b\\..\\..\\z", "fine", "a..b/c", "./dot"]
        write_tar(tmp_path / "in" / "0.tar", {key: pair(i) for i, key in enumerate(keys)})
        out = write_manifest(tmp_path / "out", tmp_path / "in", {"0": ["clean"] * 7})
        listener = Listener()
        done = nc.export(out, to=tmp_path / "to", format="shards", progress=listener)
        assert (done.rows, done.left_out) == (3, {UNSAFE: 4})
        assert [one.key for one in samples_in(*tars_in(tmp_path / "to"))] == ["fine", "a..b/c", "dot"]
        assert len(listener.said) == 1
        assert "../../x" in listener.said[0]
        with tarfile.open(tmp_path / "to" / "0.tar") as tar:
            if hasattr(tarfile, "data_filter"):  # since Python 3.11.4
                tar.extractall(tmp_path / "unpacked", filter="data")  # which refuses what leads out
        stats = json.loads((tmp_path / "to" / "0_stats.json").read_text())
        assert (stats["count"], stats["successes"]) == (7, 3)
        assert nc.export(out, to=tmp_path / "to", format="shards") == done  # as it was recorded

    @pytest.mark.parametrize(
        ("key", "safe"),
        [
            ("\\x", False),
            ("C:\\x", False),
            ("c:x", False),
            ("a/.. /x", False),
            ("é\0b", False),  # of which a tar keeps the é
            ("a\nb", False),
            ("\x1b[2J", False),
            ("a\x9bb", False),
            ("x" * 251, True),
            ("x" * 252, False),
            ("é" * 126, False),
            ("d/" * 510 + "abc", False),
            ("ab:c", True),
            ("日本 語", True),
        ],
    )
    def test_names_that_are_unsafe_on_some_system(self, tmp_path: Path, key: str, safe: bool) -> None:
        write_tar(tmp_path / "in" / "0.tar", {key: {"png": b"p", "txt": b"t"}, "fine": {"png": b"p", "txt": b"t"}})
        out = write_manifest(tmp_path / "out", tmp_path / "in", {"0": ["clean"] * 2})
        listener = Listener()
        done = nc.export(out, to=tmp_path / "to", format="shards", progress=listener)
        assert done.left_out == ({} if safe else {UNSAFE: 1})
        assert [name for name, _ in members_in(tmp_path / "to" / "0.tar")] == [
            *([f"{key}.png", f"{key}.txt"] if safe else []),
            "fine.png",
            "fine.txt",
        ]
        assert all(said.isprintable() for said in listener.said)

    def test_a_sample_that_is_cut_off(self, tmp_path: Path) -> None:
        tar = write_tar(tmp_path / "in" / "0.tar", {str(i): {"png": b"p" * 2000, "txt": b"t"} for i in range(3)})
        tar.write_bytes(tar.read_bytes()[: 2 * 3584 + 1000])
        out = write_manifest(tmp_path / "out", tmp_path / "in", {"0": ["unreadable"] * 3})
        done = nc.export(out, to=tmp_path / "to", format="shards", splits=["unreadable"])
        assert (done.rows, done.left_out) == (2, {INCOMPLETE: 1})

    def test_long_and_foreign_keys(self, tmp_path: Path) -> None:
        keys = ["x" * 150, "日本/é", "plain"]
        write_tar(tmp_path / "in" / "0.tar", {key: pair(i) for i, key in enumerate(keys)})
        out = write_manifest(tmp_path / "out", tmp_path / "in", {"0": ["clean"] * 3})
        nc.export(out, to=tmp_path / "to", format="shards")
        assert [one.key for one in samples_in(*tars_in(tmp_path / "to"))] == keys

    @settings(max_examples=20)
    @given(
        st.lists(st.lists(st.sampled_from(SPLITS), min_size=1, max_size=8), min_size=1, max_size=4),
        st.one_of(st.none(), st.integers(1, 9)),
    )
    def test_the_splits_part_the_samples(self, drawn: list[list[str]], size: int | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            splits = {str(at): names for at, names in enumerate(drawn)}
            for name, names in splits.items():
                samples = {f"{name}-{i}": {"jpg": f"{name} {i}".encode(), "txt": b"t"} for i in range(len(names))}
                write_tar(root / "in" / f"{name}.tar", samples)
            out = write_manifest(root / "out", root / "in", splits)
            seen: Counter[tuple[str, bytes]] = Counter()
            for split in SPLITS:
                done = nc.export(out, to=root / split, format="shards", splits=[split], shard_size=size)
                found = members_in(*tars_in(root / split))
                assert found == wanted(root / "in", splits, split)
                assert done.rows == len(found) / 2 == sum(names.count(split) for names in drawn)
                seen.update(found)
            assert seen == Counter(wanted(root / "in", splits, *SPLITS))
            assert set(seen.values()) == {1}


class TestGoingOn:
    @pytest.mark.parametrize("size", [None, 4])
    def test_after_an_interruption(self, out: Path, tmp_path: Path, size: int | None) -> None:
        to = tmp_path / "to"
        with pytest.raises(KeyboardInterrupt):
            nc.export(out, to=to, format="shards", shard_size=size, progress=Listener("00000"))
        assert [tar.name for tar in tars_in(to)] == ["00000.tar"]
        assert not (to / "sizes.json").exists()
        before = (to / "00000.tar").stat()
        listener = Listener()
        done = nc.export(out, to=to, format="shards", shard_size=size, progress=listener)
        assert listener.said == [f"1 of {done.files} tars were there already"]
        assert (to / "00000.tar").stat() == before
        assert done == nc.export(out, to=tmp_path / "whole", format="shards", shard_size=size)
        assert content(to) == content(tmp_path / "whole")

    def test_in_the_middle_of_a_tar(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        to = tmp_path / "to"
        nc.export(out, to=to, format="shards")
        with interrupting(tarfile.TarFile, "addfile"), pytest.raises(KeyboardInterrupt):
            nc.export(out, to=to, format="shards", splits=["noisy"])
        assert not (to / "sizes.json").exists()
        # The old tar stays until the new one is whole.
        assert members_in(*tars_in(to)) == wanted(corpus, SPLIT, "clean")
        nc.export(out, to=to, format="shards")
        nc.export(out, to=tmp_path / "whole", format="shards")
        assert content(to) == content(tmp_path / "whole")

    def test_between_a_tar_and_its_mark(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in" / "0.tar", {str(i): {"png": b"p", "txt": b"t"} for i in range(8)})
        splits = {"0": ["clean", "noisy"] * 4}  # tars of one size
        out = write_manifest(tmp_path / "out", tmp_path / "in", splits)
        nc.export(out, to=tmp_path / "to", format="shards")
        with interrupting(pq, "write_table"), pytest.raises(KeyboardInterrupt):
            nc.export(out, to=tmp_path / "to", format="shards", splits=["noisy"], weights="match_probability")
        assert members_in(*tars_in(tmp_path / "to")) == wanted(tmp_path / "in", splits, "noisy")
        nc.export(out, to=tmp_path / "to", format="shards")
        assert members_in(*tars_in(tmp_path / "to")) == wanted(tmp_path / "in", splits, "clean")

    def test_a_tar_that_was_damaged(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        nc.export(out, to=tmp_path / "to", format="shards")
        first = tmp_path / "to" / "00000.tar"
        first.write_bytes(first.read_bytes()[:10240])
        nc.export(out, to=tmp_path / "to", format="shards")
        assert members_in(*tars_in(tmp_path / "to")) == wanted(corpus, SPLIT, "clean")

    def test_weights_that_were_removed(self, out: Path, tmp_path: Path) -> None:
        to = tmp_path / "to"
        nc.export(out, to=to, format="shards", weights="match_probability")
        before, kept = content(to), (to / "00002.tar").stat()
        (to / "00000.parquet").unlink()
        nc.export(out, to=to, format="shards", weights="match_probability")
        assert content(to) == before
        assert (to / "00002.tar").stat() == kept

    @pytest.mark.parametrize("format", FORMATS)
    def test_leftovers_of_killed_exports(self, out: Path, tmp_path: Path, format: Format) -> None:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        to = tmp_path / "to"
        to.mkdir()
        for name in (f".export.json.{gone.pid}.tmp", f".uids.npy.{os.getpid()}.tmp"):
            (to / name).write_bytes(b"half a file")
        nc.export(out, to=to, format=format)  # there was no more of it, and no one else's
        before = content(to)
        assert not list(to.glob(".*"))
        (to / "en").mkdir()
        for name in (f".00000.tar.{gone.pid}.tmp", f"en/.0.tar.{gone.pid}.tmp"):
            (to / name).write_bytes(b"half a tar")
        others = (f".00000.tar.{os.getppid()}.tmp", ".notes.tmp", f"notes.{gone.pid}.tmp")
        for name in others:
            (to / name).write_bytes(b"not ours")
        nc.export(out, to=to, format=format, dry_run=True)
        assert (to / f".00000.tar.{gone.pid}.tmp").exists()
        nc.export(out, to=to, format=format)
        assert content(to) == before | dict.fromkeys(others, b"not ours")

    def test_a_changed_split(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        to = tmp_path / "to"
        nc.export(out, to=to, format="shards")
        kept = (to / "00000.tar").stat()
        shutil.rmtree(out / "manifest")
        changed = {**SPLIT, "00001": ["clean"] * 5, "00002": ["noisy"] * 9}
        write_manifest(out, corpus, changed)
        nc.export(out, to=to, format="shards")
        assert (to / "00000.tar").stat() == kept
        assert [tar.name for tar in tars_in(to)] == ["00000.tar", "00001.tar"]
        assert not (to / "00002_stats.json").exists()
        assert members_in(*tars_in(to)) == wanted(corpus, changed, "clean")
        assert json.loads((to / "sizes.json").read_text()) == {"00000.tar": 6, "00001.tar": 5}

    def test_a_changed_shard(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        to = tmp_path / "to"
        nc.export(out, to=to, format="shards")
        samples = {one.key: {**one.members, "cls": b"new"} for one in samples_in(corpus / "00000.tar")}
        write_tar(corpus / "00000.tar", samples)
        nc.export(out, to=to, format="shards")
        assert members_in(*tars_in(to)) == wanted(corpus, SPLIT, "clean")

    def test_other_sizes(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        for size in (2, 7, None):
            nc.export(out, to=tmp_path / "to", format="shards", shard_size=size)
            assert members_in(*tars_in(tmp_path / "to")) == wanted(corpus, SPLIT, "clean")

    def test_a_folder_of_something_else(self, out: Path, tmp_path: Path) -> None:
        to = tmp_path / "to"
        nc.export(out, to=to, format="keys")
        before = content(to)
        with pytest.raises(UsageError, match=r"holds keys exported from .*out; give another folder"):
            nc.export(out, to=to, format="csv")
        other = shutil.copytree(out, tmp_path / "other")
        with pytest.raises(UsageError, match="give another folder"):
            nc.export(other, to=to, format="keys")
        for folder in (out, tmp_path / "shards"):
            with pytest.raises(UsageError, match="holds files that are no export"):
                nc.export(out, to=folder, format="shards")
        with pytest.raises(UsageError, match="is a file"):
            nc.export(out, to=out / "run.json", format="keys")
        assert content(to) == before

    def test_a_failed_export_does_not_claim_the_folder(self, corpus: Path, tmp_path: Path) -> None:
        out = write_manifest(tmp_path / "out", corpus, SPLIT, uid={"00000": [None] * 12})
        with pytest.raises(UsageError, match="uid is missing"):
            nc.export(out, to=tmp_path / "to", format="datacomp")
        assert nc.export(out, to=tmp_path / "to", format="keys").rows == CLEAN


class TestTables:
    def test_keys(self, out: Path, tmp_path: Path) -> None:
        done = nc.export(out, to=tmp_path / "to", format="keys", splits=["clean", "uncertain"])
        frame = pd.read_parquet(tmp_path / "to" / "keys.parquet")
        expected = nc.Manifest(out).pairs("clean", "uncertain", columns=["shard", "key", "index", "uid"])
        expected = expected.sort_values(["shard", "index"], ignore_index=True).drop(columns="split")
        pd.testing.assert_frame_equal(frame, expected)
        assert (done.rows, done.files) == (len(expected), 1)

    @pytest.mark.parametrize("format", ["csv", "jsonl"])
    def test_all_columns(self, out: Path, tmp_path: Path, format: Format) -> None:
        done = nc.export(out, to=tmp_path / "to", format=format, splits=SPLITS, weights="match_probability")
        path = tmp_path / "to" / f"pairs.{format}"
        assert done.bytes == path.stat().st_size
        rows = duckdb.sql(f"select * from '{path}'").df()
        assert list(rows) == [*MANIFEST_SCHEMA.names, "split", "weight"]
        expected = nc.Manifest(out).pairs().sort_values(["shard", "index"], ignore_index=True)
        for name in ("caption", "split", "index"):
            assert list(rows[name]) == list(expected[name])
        for name in ("similarity", "match_probability"):
            assert (rows[name].to_numpy(np.float32) == expected[name].to_numpy(np.float32)).all()
        assert (rows["weight"] == rows["match_probability"]).all()

    def test_cells_that_a_spreadsheet_would_run(self, tmp_path: Path) -> None:
        captions = ['=HYPERLINK("x")', "+1", "-1", "@SUM(A1)", "\t=1", " =1", "＝1", "1=1", 'a "b",\r\nc\x00\u2028d']
        write_tar(tmp_path / "in" / "0.tar", {f"-{i}": pair(i) for i in range(len(captions))})
        splits = {"0": ["clean"] * len(captions)}
        out = write_manifest(tmp_path / "out", tmp_path / "in", splits, caption={"0": captions})
        nc.export(out, to=tmp_path / "csv", format="csv")
        text = (tmp_path / "csv" / "pairs.csv").read_bytes().decode()
        rows = list(csv.DictReader(text.splitlines()))
        assert len(text.splitlines()) == len(rows) + 1 == len(captions) + 1
        assert [row["caption"] for row in rows] == [
            '\'=HYPERLINK("x")',
            "'+1",
            "'-1",
            "'@SUM(A1)",
            "' =1",
            "' =1",
            "'＝1",
            "1=1",
            'a "b",  c  d',
        ]
        assert rows[0]["key"] == "'-0"
        assert float(rows[0]["similarity"]) == -0.5  # a number is no formula
        nc.export(out, to=tmp_path / "jsonl", format="jsonl")
        lines = (tmp_path / "jsonl" / "pairs.jsonl").read_text().splitlines()
        assert [json.loads(line)["caption"] for line in lines] == captions

    def test_datacomp(self, corpus: Path, tmp_path: Path) -> None:
        chosen = [uid(i).upper() if i == 3 else uid(i % 10) for i in range(12)]
        chosen[5] = chosen[4][:16] + chosen[5][16:]  # the first half alone does not order them
        out = write_manifest(tmp_path / "out", corpus, SPLIT, uid={"00000": chosen})
        done = nc.export(out, to=tmp_path / "to", format="datacomp", splits=SPLITS)
        array = np.load(tmp_path / "to" / "uids.npy")
        assert array.dtype == np.dtype("u8,u8")
        uids = nc.Manifest(out).pairs()["uid"]
        assert array.tolist() == sorted((int(one[:16], 16), int(one[16:32], 16)) for one in uids)
        assert done.rows == len(array) == 26 > len(set(array.tolist()))

    @pytest.mark.parametrize("broken", [None, "12", "g" * 32, uid(1) + "0", uid(1) + "\n", "é" * 16])
    def test_datacomp_needs_uids(self, corpus: Path, tmp_path: Path, broken: str | None) -> None:
        uids = [*(uid(i) for i in range(4)), broken, *(uid(i) for i in range(7))]
        out = write_manifest(tmp_path / "out", corpus, SPLIT, uid={"00000": uids})
        with pytest.raises(UsageError, match=r"shard 00000, key 000000004: its uid is .* use --format shards or keys"):
            nc.export(out, to=tmp_path / "to", format="datacomp")
        assert not (tmp_path / "to" / "uids.npy").exists()

    @pytest.mark.parametrize("format", FORMATS)
    def test_no_pairs_at_all(self, corpus: Path, tmp_path: Path, format: Format) -> None:
        out = write_manifest(tmp_path / "out", corpus, {name: ["noisy"] * len(one) for name, one in SPLIT.items()})
        done = nc.export(out, to=tmp_path / "to", format=format)
        assert done.rows == 0
        if format == "shards":
            assert json.loads((tmp_path / "to" / "sizes.json").read_text()) == {}
        if format == "keys":
            assert pq.read_table(tmp_path / "to" / "keys.parquet").schema.names == ["shard", "key", "index", "uid"]
        if format == "datacomp":
            assert len(np.load(tmp_path / "to" / "uids.npy")) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_dry_run_says_what_is_then_written(out: Path, tmp_path: Path, format: Format) -> None:
    for size in (None, 4) if format == "shards" else (None,):
        to = tmp_path / f"to-{size}"
        planned = nc.export(out, to=to, format=format, shard_size=size, dry_run=True)
        assert not to.exists()
        assert planned == nc.export(out, to=to, format=format, shard_size=size)
        assert planned.bytes == sum(path.stat().st_size for path in to.rglob("*") if path.suffix != ".json")
        before = content(to)
        assert nc.export(out, to=to, format=format, shard_size=size, splits=SPLITS, dry_run=True).rows == 26
        assert content(to) == before


class TestRefusals:
    def test_shards_that_changed_since(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        write_tar(corpus / "00000.tar", {"other": pair(1)})
        with pytest.raises(NoisycleanError, match=r"00000\.tar: sample 0 is not 000000000 any more"):
            nc.export(out, to=tmp_path / "to", format="shards")
        whole = {f"{i:09d}": pair(i) for i in range(6)}
        write_tar(corpus / "00000.tar", whole)
        with pytest.raises(NoisycleanError, match=r"00000\.tar: sample 6 is not 000000006 any more"):
            nc.export(out, to=tmp_path / "to", format="shards")
        (corpus / "00000.tar").write_bytes(b"<html>" * 2000)
        with pytest.raises(NoisycleanError, match=r"00000\.tar: sample 0 is not 000000000 any more \(damaged tar: "):
            nc.export(out, to=tmp_path / "to", format="shards")
        (corpus / "00000.tar").unlink()
        with pytest.raises(NoisycleanError, match=r"00000\.tar: cannot open the shard"):
            nc.export(out, to=tmp_path / "to", format="shards")
        assert tars_in(tmp_path / "to") == []

    def test_an_out_that_does_not_know_its_shards(self, out: Path, tmp_path: Path) -> None:
        record = json.loads((out / "run.json").read_text())
        del record["paths"]
        write_json(out / "run.json", record)
        with pytest.raises(UsageError, match="does not say where its shards lie; repeat the `noisyclean score`"):
            nc.export(out, to=tmp_path / "to", format="shards")
        assert nc.export(out, to=tmp_path / "to", format="keys").rows == CLEAN

    def test_an_out_that_is_from_embeddings(self, out: Path, tmp_path: Path) -> None:
        record = json.loads((out / "run.json").read_text())
        write_json(out / "run.json", {**record, "paths": ["/e/0.npz", "/e/1.npz", "/e/2.npz"]})
        with pytest.raises(UsageError, match="from embeddings, so there are no shards to copy; use --format keys"):
            nc.export(out, to=tmp_path / "to", format="shards")
        assert nc.export(out, to=tmp_path / "to", format="keys").rows == CLEAN

    def test_a_shard_name_that_leads_out(self, corpus: Path, out: Path, tmp_path: Path) -> None:
        for path in (out / "manifest" / "split=clean").iterdir():
            table = pq.read_table(path, partitioning=None)
            pq.write_table(table.set_column(1, "shard", pa.array(["../up"] * len(table))), path)
        record = json.loads((out / "run.json").read_text())
        write_json(out / "run.json", {**record, "shards": ["../up"], "paths": [str(corpus / "00000.tar")]})
        with pytest.raises(UsageError, match=r"'\.\./up' is no safe name for a tar; use --shard-size"):
            nc.export(out, to=tmp_path / "to", format="shards")
        assert not (tmp_path / "up.tar").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"format": "zip"}, "--format zip: no such format; there are shards, datacomp"),
            ({"splits": ["dirty"]}, "dirty: no such split; there are clean"),
            ({"splits": []}, "--split names no split"),
            ({"format": "keys", "shard_size": 4}, "--shard-size goes with --format shards"),
            ({"shard_size": 0}, "--shard-size 0: at least 1"),
            ({"format": "datacomp", "weights": "match_probability"}, "has no place for weights"),
            ({"weights": "caption"}, "--weights caption: no column of numbers; there are index"),
            ({"weights": "beauty"}, "--weights beauty: no column of numbers"),
            ({"weights": "similarity"}, "--weights similarity: not from 0 to 1 everywhere"),
            ({"weights": "q_value"}, "--weights q_value: clean pairs have none"),
        ],
    )
    def test_arguments(self, out: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            nc.export(out, to=tmp_path / "to", **{"format": "shards", **options})
        assert not (tmp_path / "to").exists()

    def test_a_manifest_that_is_missing_or_broken(self, out: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no scores in it"):
            nc.export(tmp_path / "nowhere", to=tmp_path / "to", format="keys")
        path = next((out / "manifest" / "split=clean").iterdir())
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns("similarity"), path)
        with pytest.raises(UsageError, match=r"no column similarity, .*; `noisyclean split"):
            nc.export(out, to=tmp_path / "to", format="keys")
        path.write_bytes(b"PAR1")
        with pytest.raises(UsageError, match=r"cannot read the manifest .*; `noisyclean split"):
            nc.export(out, to=tmp_path / "to", format="keys")
        shutil.rmtree(out / "manifest")
        with pytest.raises(UsageError, match="no manifest in it; `noisyclean split"):
            nc.export(out, to=tmp_path / "to", format="keys")


class TestCommand:
    def run(self, monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["noisyclean", "export", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0

    def test_says_what_it_wrote(
        self, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        words = (out, "--format", "shards", "-o", tmp_path / "to", "--split", "clean,noisy", "--split", "uncertain")
        self.run(monkeypatch, *words, "--dry-run")
        assert "Would write 26 pairs (clean, noisy, uncertain) in 3 tars" in capfd.readouterr().out
        assert not (tmp_path / "to").exists()
        self.run(monkeypatch, *words, "--json")
        done = json.loads(capfd.readouterr().out)
        assert (done["rows"], done["files"], done["left_out"], done["dry_run"]) == (26, 3, {}, False)
        assert done["bytes"] == sum(tar.stat().st_size for tar in tars_in(tmp_path / "to"))

    def test_help_has_examples(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.run(monkeypatch, "--help")
        assert "  noisyclean export --format shards -o clean/" in capfd.readouterr().out


class TestOthersFiles:
    """DIR is the export's, but for what someone else put there since."""

    def test_a_repeated_export_leaves_what_is_not_its_own(self, out: Path, tmp_path: Path) -> None:
        to = tmp_path / "to"
        nc.export(out, to=to, format="shards")
        mine = to / "mine"
        mine.mkdir()
        for name in ("val.tar", "val.parquet", "val_stats.json", "sizes.json"):
            (mine / name).write_bytes(b"{}")
        before = content(to)
        nc.export(out, to=to, format="shards")
        assert content(to) == before

    def test_shards_that_are_read_are_not_written_over(self, out: Path, corpus: Path) -> None:
        before = content(corpus)
        (corpus / "export.json").write_text(json.dumps({"out": str(out.resolve()), "format": "shards"}))
        with pytest.raises(UsageError, match="which is exported from"):
            nc.export(out, to=corpus, format="shards", shard_size=2)
        (corpus / "export.json").unlink()
        assert content(corpus) == before
