"""Whatever is in a tar, every sample comes out exactly once: whole, or with a fault."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from helpers import Members, add_member, encode_image, pair, read_tar, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noisyclean.corpus import shards
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.shards import Sample, SampleMembers, ShardReader
from noisyclean.errors import NoisycleanError

IMAGE = encode_image()


def read_one(path: Path, members: Members) -> Sample:
    (sample,) = read_tar(write_tar(path, {"k": members}))
    return sample


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return tmp_path / "00000.tar"


def test_img2dataset_sample(tar: Path) -> None:
    write_tar(tar, {"000000000": pair(0, " A dog. \n", uid="ab" * 16, url="http://x/y.jpg", width=8, height=6)})
    assert read_tar(tar) == [
        Sample(
            shard="00000",
            key="000000000",
            index=0,
            image=IMAGE,
            caption="A dog.",
            uid="ab" * 16,
            url="http://x/y.jpg",
            width=8,
            height=6,
        )
    ]


def test_members_keep_their_order_and_are_lower_case(tar: Path) -> None:
    write_tar(tar, {"k": {"TXT": b"a", "cls": b"1", "img.PNG": IMAGE}})
    (raw,) = ShardReader(Shard("s", str(tar))).members()
    assert raw == SampleMembers("k", 0, {"txt": b"a", "cls": b"1", "img.png": IMAGE})
    assert read_tar(tar)[0].image == IMAGE


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.txt", "b.jpg", "b.txt"],
        ["dir/a.jpg", "dir/a.txt", "other/a.jpg", "other/a.txt"],
        ["a.b/c.jpg", "a.b/c.txt", "a.b/d.seg.png", "a.b/d.jpg"],
        ["x/y/z.left.jpg", "x/y/z.right.jpg", "x/y/z.json"],
        ["a.JPG", "a.Txt"],
        ["é.jpg", "é.txt", "日本.jpg"],
        ["README", ".hidden", "a.jpg", "dir/README", "a.txt"],
    ],
)
def test_grouping_is_webdatasets(tar: Path, names: list[str]) -> None:
    with tarfile.open(tar, "w") as file:
        for name in names:
            add_member(file, name, name.encode())
    ours = [(raw.key, raw.members) for raw in ShardReader(Shard("s", str(tar))).members()]
    theirs = [
        (one["__key__"], {name: data for name, data in one.items() if not name.startswith("__")})
        for one in webdataset.WebDataset(str(tar), shardshuffle=False)
        if "__key__" in one  # webdataset may end a shard with an empty sample
    ]
    assert ours == theirs


def test_folders_links_and_nameless_members_are_passed_over(tar: Path) -> None:
    with tarfile.open(tar, "w") as file:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("dir.jpg")
            member.type = kind
            member.linkname = "elsewhere"
            file.addfile(member)
        add_member(file, "./k.png", IMAGE)
        add_member(file, "nameless", b"")
        add_member(file, "./k.txt", b"a dog")
    (sample,) = read_tar(tar)
    assert (sample.key, sample.caption, sample.fault) == ("k", "a dog", None)


def test_duplicate_keys(tar: Path) -> None:
    write_tar(tar, [("a", pair(0)), ("a", pair(1)), ("b", pair(2)), ("a", pair(3))])
    assert [(one.key, one.index, one.fault) for one in read_tar(tar)] == [
        ("a", 0, None),
        ("a", 1, "duplicate key"),
        ("b", 2, None),
        ("a", 3, "duplicate key"),
    ]


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"txt": b"a dog"}, "no image"),
        ({"png": b"", "txt": b"a dog"}, "empty image"),
        ({"png": IMAGE}, "no caption"),
        ({"png": IMAGE, "json": b"{}"}, "no caption"),
        ({"png": IMAGE, "json": b"{broken"}, "no caption"),
        ({"png": IMAGE, "json": b"[" * 100_000}, "no caption"),
        ({"png": IMAGE, "json": b'{"caption": null}'}, "no caption"),
        ({"png": IMAGE, "json": b'["a dog"]'}, "no caption"),
        ({"png": IMAGE, "txt": b""}, "empty caption"),
        ({"png": IMAGE, "txt": b" \n\t"}, "empty caption"),
        ({"png": IMAGE, "txt": "café".encode("latin-1")}, "caption is not UTF-8"),
        ({"pdf": IMAGE, "txt": b"a dog"}, "no image"),
    ],
)
def test_faults(tar: Path, members: Members, fault: str) -> None:
    assert read_one(tar, members).fault == fault


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ({"json": b'{"caption": "a dog"}'}, "a dog"),
        ({"json": b'{"captions": ["a dog", "a cat"]}'}, "a dog"),
        ({"txt": b"a dog", "json": b'{"caption": "a cat"}'}, "a dog"),
        ({"caption": b"a dog"}, "a dog"),
        ({"text": b"a cat", "txt": b"a dog"}, "a dog"),
        ({"txt": b"a dog", "json": b"{broken"}, "a dog"),
        ({"json": b'{"caption": "half an emoji \\ud83d"}'}, "half an emoji ?"),
    ],
)
def test_where_captions_come_from(tar: Path, members: Members, caption: str) -> None:
    sample = read_one(tar, {"png": IMAGE, **members})
    assert (sample.caption, sample.fault) == (caption, None)


def test_odd_metadata_is_none(tar: Path) -> None:
    metadata = {"caption": "a dog", "uid": ["x"], "url": "", "width": -1, "height": "6"}
    sample = read_one(tar, {"png": IMAGE, "json": json.dumps(metadata).encode()})
    assert (sample.uid, sample.url, sample.width, sample.height, sample.fault) == (None, None, None, None, None)


def test_member_name_that_is_not_utf8_gives_a_key_that_is(tar: Path) -> None:
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as file:
        add_member(file, "café.png", IMAGE)
        add_member(file, "café.txt", b"a cafe")
    (sample,) = read_tar(tar)
    assert sample.fault is None
    assert sample.key.encode() == rb"caf\xe9"


def test_too_large_member(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 1000)
    write_tar(tar, {"a": {"png": b"x" * 1001, "txt": b"a dog"}, "b": pair(1)})
    large, whole = read_tar(tar)
    assert (large.fault is None, large.image, large.caption) == (False, None, "a dog")
    assert whole.fault is None


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar"])
def test_gzipped(tmp_path: Path, suffix: str) -> None:
    path = write_tar(tmp_path / f"0{suffix}", {"a": pair(0), "b": pair(1)}, "w:gz")
    assert [sample.key for sample in read_tar(path)] == ["a", "b"]


def test_remote() -> None:
    import fsspec

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        add_member(file, "a.png", IMAGE)
        add_member(file, "a.txt", b"a dog")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/remote/0.tar", buffer.getvalue())
    try:
        (sample,) = ShardReader(Shard("0", "memory://remote/0.tar"))
        assert (sample.caption, sample.fault) == ("a dog", None)
    finally:
        memory.rm("/remote", recursive=True)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(NoisycleanError, match=r"0\.tar: cannot open the shard"):
        list(ShardReader(Shard("0", str(tmp_path / "0.tar"))))


def test_empty_tar_is_whole(tar: Path) -> None:
    assert read_tar(write_tar(tar, {})) == []


HEADER = 512


@pytest.mark.parametrize(
    ("damage", "keys"),
    [
        (lambda data: b"", []),
        (lambda data: b"no tar at all" * 1000, []),
        (lambda data: b"\x1f\x8b no gzip" * 1000, []),
        (lambda data: data[: HEADER // 2], []),
        # Four samples of one block of header and one of data for each of two members.
        (lambda data: data[: 4 * HEADER + HEADER + 3], ["a", "b"]),  # in the data of b.png
        (lambda data: data[: 8 * HEADER], ["a", "b"]),  # between two members
        (lambda data: data[: 8 * HEADER + 100], ["a", "b"]),  # in the header of c.png
        (lambda data: data[: 8 * HEADER] + b"?" * HEADER + data[9 * HEADER :], ["a", "b"]),  # that header is garbage
    ],
)
def test_damage_is_said_and_what_lies_before_it_comes_out(
    tar: Path, damage: Callable[[bytes], bytes], keys: list[str]
) -> None:
    image = IMAGE[:HEADER]
    write_tar(tar, {key: {"png": image, "txt": b"a dog"} for key in "abcd"})
    tar.write_bytes(damage(tar.read_bytes()))
    reader = ShardReader(Shard("0", str(tar)))
    read = [sample.key for sample in reader if sample.fault is None]
    assert reader.damage is not None
    assert reader.damage.startswith("damaged tar: ")
    assert read == keys[: len(read)]
    assert len(read) >= len(keys) - 1


def test_truncated_gzip(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar.gz", {f"{i:03}": pair(i) for i in range(50)}, "w:gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reader = ShardReader(Shard("0", str(path)))
    keys = [sample.key for sample in reader]
    assert keys == [f"{i:03}" for i in range(len(keys))]
    assert 0 < len(keys) < 50
    assert reader.damage is not None


keys = st.from_regex(r"([a-zé0-9_-]{1,8}/){0,2}[a-zA-Zé0-9_-]{1,90}", fullmatch=True)
members = st.dictionaries(
    st.sampled_from(["jpg", "png", "txt", "json", "cls", "seg.png"]), st.binary(max_size=1500), min_size=1
)
samples = st.lists(st.tuples(keys, members), max_size=8, unique_by=lambda one: one[0])


@given(samples=samples, mode=st.sampled_from(["w", "w:gz"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
def test_round_trip_with_tarfile(tar: Path, samples: list[tuple[str, dict[str, bytes]]], mode: str) -> None:
    write_tar(tar, samples, mode)
    reader = ShardReader(Shard("0", str(tar)))
    read = list(reader.members())
    assert [(one.key, list(one.members.items())) for one in read] == [(k, list(m.items())) for k, m in samples]
    assert [one.index for one in read] == list(range(len(samples)))
    assert all(one.fault is None for one in read)
    assert reader.damage is None


@given(samples=samples)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
def test_round_trip_with_webdataset(tar: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with webdataset.TarWriter(str(tar), encoder=False) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    assert [(one.key, one.members) for one in ShardReader(Shard("0", str(tar))).members()] == samples


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_damage_raises(tar: Path, data: st.DataObject) -> None:
    write_tar(tar, {key: {"png": IMAGE, "txt": b"a dog"} for key in ("a" * 120, "b", "é")})
    content = bytearray(tar.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[at] = data.draw(st.integers(0, 255))
    tar.write_bytes(content)
    for sample in ShardReader(Shard("0", str(tar))):
        assert sample.fault is not None or (sample.image and sample.caption)


def test_the_picture_is_the_plain_one(tmp_path: Path) -> None:
    members = {"depth.png": encode_image(1), "jpg": encode_image(2, image_format="JPEG"), "txt": b"a thing"}
    (sample,) = read_tar(write_tar(tmp_path / "0.tar", {"a": members}))
    assert sample.image == members["jpg"]
    (sample,) = read_tar(write_tar(tmp_path / "0.tar", {"a": {"img.png": members["depth.png"], "txt": b"a thing"}}))
    assert sample.image == members["depth.png"]


def test_a_fault_of_the_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples behind it may well be there: the command fails, and can be repeated."""
    path = write_tar(tmp_path / "0.tar", {f"{i}": pair(i) for i in range(50)})

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 20_000:
                raise ConnectionResetError(104, "connection reset")
            return super().read(size)

    monkeypatch.setattr("noisyclean.corpus.shards.open_shard", lambda shard: Broken(path.read_bytes()))
    with pytest.raises(NoisycleanError, match="reading failed"):
        list(ShardReader(Shard("0", str(path))))
