"""Which shards a spec names, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from noisyclean.corpus.locate import Shard, find_shards
from noisyclean.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar", "00000.parquet", "00000_stats.json"):
        (tmp_path / name).touch()
    return tmp_path


def names(shards: list[Shard]) -> list[str]:
    return [shard.name for shard in shards]


def test_folder(folder: Path) -> None:
    found = find_shards(folder)
    assert found == [Shard(f"0000{i}", str(folder / f"0000{i}.tar")) for i in range(3)]


def test_folder_is_searched_to_the_bottom_for_all_kinds_of_tar(tmp_path: Path) -> None:
    for name in ("en/a.tar", "en/deep/b.tar.gz", "c.tgz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(find_shards(str(tmp_path))) == ["a", "b", "c"]


def test_single_file(folder: Path) -> None:
    assert names(find_shards(folder / "00001.tar")) == ["00001"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.tar", ["00000", "00001", "00002"]),
        ("0000[12].tar", ["00001", "00002"]),
        ("{00000..00001}.tar", ["00000", "00001"]),
        ("{00002,00000}.tar", ["00000", "00002"]),
        ("0000{1,[02]}.tar", ["00000", "00001", "00002"]),
    ],
)
def test_pattern(folder: Path, pattern: str, expected: list[str]) -> None:
    assert names(find_shards(str(folder / pattern))) == expected


def test_relative_glob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert names(find_shards("*1.tar")) == ["00001"]


def test_list_is_relative_to_itself(folder: Path) -> None:
    (folder / "list.txt").write_text("# the first two\n00000.tar\n\n  {00001..00001}.tar\n")
    assert names(find_shards(f"@{folder / 'list.txt'}")) == ["00000", "00001"]


def test_several_specs_are_joined_and_sorted(folder: Path) -> None:
    assert names(find_shards([folder / "00002.tar", str(folder / "{00000..00001}.tar")])) == ["00000", "00001", "00002"]


def test_equal_names_are_told_apart_by_as_many_folders_as_it_takes(tmp_path: Path) -> None:
    for name in ("x/en/0.tar", "y/en/0.tar", "y/fr/0.tar", "y/fr/1.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(find_shards(tmp_path)) == ["1", "fr/0", "x/en/0", "y/en/0"]


def test_remote_pattern() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("/corpus/0.tar", "/corpus/1.tar", "/corpus/notes.txt"):
        memory.pipe_file(name, b"")
    try:
        assert names(find_shards("memory://corpus")) == ["0", "1"]
        assert names(find_shards("memory://corpus/*1.tar")) == ["1"]
        assert names(find_shards("memory://corpus/{0..1}.tar")) == ["0", "1"]
        assert names(find_shards("memory://elsewhere/7.tar")) == ["7"]  # taken at its word
        with pytest.raises(UsageError, match="matches no"):
            find_shards("memory://nowhere/*.tar")
    finally:
        memory.rm("/corpus", recursive=True)


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("missing", "matches no shards"),
        ("*.zip", "matches no shards"),
        ("{00003..00004}.tar", "no such shards"),
        ("{00001..00004}.tar", r"00003\.tar: no such shard, nor 1 more"),
        ("@missing.txt", "matches no shards"),
        ("empty", r"no \.tar files"),
    ],
)
def test_nothing_matches(folder: Path, pattern: str, complaint: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match=complaint):
        find_shards(str(folder / pattern))


def test_bad_lists(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the list"):
        find_shards(f"@{tmp_path / 'missing.txt'}")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UsageError, match="is empty"):
        find_shards(f"@{tmp_path / 'empty.txt'}")


def test_shard_named_twice(folder: Path) -> None:
    with pytest.raises(UsageError, match="named 2 times"):
        find_shards([folder, folder / "00000.tar"])
