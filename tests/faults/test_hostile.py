"""Input made to hurt: it takes little time and memory, runs no code, and is one line or one row."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import add_member, encode_image, pair, write_scores, write_tar
from PIL import Image

import noisyclean as nc
from noisyclean.corpus.decoding import MAX_PIXELS, UndecodableError, decode_image, decode_reduced
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.pick import pick_pictures
from noisyclean.corpus.shards import MAX_HEADER_BYTES, MAX_MEMBER_BYTES, ShardReader
from noisyclean.encoders import load_encoder
from noisyclean.errors import UsageError
from noisyclean.recipe import load_recipe

SECONDS, MEGABYTES = 1.0, 500


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Fails if the block takes more processor time than that, or more memory than ``MEGABYTES``."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, started = _memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - started < seconds
    assert _memory("VmHWM") - before < MEGABYTES * 1024


def _memory(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


def png(width: int, height: int) -> bytes:
    """A header that promises so many pixels, and the first of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2**20)))
        + chunk(b"IEND", b"")
    )


def jpeg(width: int, height: int) -> bytes:
    """A small picture whose header says another size."""
    data = bytearray(encode_image(5, (64, 64), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    data = bytearray(zeros("WEBP", (64, 64), lossless=True))
    at = data.index(b"VP8L") + 9
    (bits,) = struct.unpack("<I", data[at : at + 4])
    data[at : at + 4] = struct.pack("<I", bits & ~0xFFFFFFF | width - 1 | height - 1 << 14)
    return bytes(data)


def gif(width: int, height: int) -> bytes:
    data = bytearray(encode_image(5, (64, 64), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def zeros(image_format: str, size: tuple[int, int], **options: object) -> bytes:
    """What it says, but of one colour, so that it is small."""
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, image_format, **options)
    return buffer.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG of 3.6 gigapixels": lambda: png(60_000, 60_000),
    "JPEG of 4.3 gigapixels": lambda: jpeg(65_500, 65_500),
    "GIF of 4.3 gigapixels": lambda: gif(65_535, 65_535),
    "TIFF of 400 megapixels": lambda: zeros("TIFF", (20_000, 20_000), compression="tiff_deflate"),
    "WebP of 268 megapixels": lambda: webp(16_383, 16_383),
    "PNG that ends early": lambda: png(5_000, 5_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs(name: str) -> None:
    data = BOMBS[name]()
    for decode in (decode_image, lambda data: decode_reduced(data, (224, 224))):
        with bounded(), pytest.raises(UndecodableError):
            decode(data)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_the_largest_picture_that_is_decoded(tmp_path: Path, mode: str) -> None:
    """In a process of its own: what others have left in this one would be used again, or have to be fetched again."""
    side = math.isqrt(MAX_PIXELS)
    Image.new(mode, (side, side)).save(tmp_path / "large.png")
    (tmp_path / "small.png").write_bytes(encode_image())
    done = subprocess.run([sys.executable, "-c", DECODE, tmp_path], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 10
    assert kilobytes < MEGABYTES * 1024


DECODE = """
import sys, time
from pathlib import Path
from noisyclean.corpus.decoding import decode_image, decode_reduced

def memory(what):
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))

def decode(name):
    data = (Path(sys.argv[1]) / name).read_bytes()
    decode_image(data)
    decode_reduced(data, (224, 224))

decode("small.png")  # which imports all that is needed
before, started = memory("VmRSS"), time.process_time()
decode("large.png")
print(time.process_time() - started, memory("VmHWM") - before)
"""


def sparse(tar: tarfile.TarFile, name: str, size: int, *, more: bool) -> None:
    """A member of that many bytes, all of them a hole; ``more``: the list of holes goes on."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:482] = bytes(96)
    header[482] = more
    header[483:495] = f"{size:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    assert tar.fileobj is not None
    tar.fileobj.write(bytes(header))
    tar.offset += len(header)


def read(path: Path) -> tuple[dict[str, str | None], str | None]:
    """Key → fault, and the damage."""
    reader = ShardReader(Shard("0", str(path)))
    return {one.key: one.fault for one in reader}, reader.damage


def test_a_sparse_member_of_ten_gigabytes_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        sparse(tar, "a.png", 8 * 2**30 - 1, more=False)
        add_member(tar, "a.txt", b"a dog")
        add_member(tar, "b.png", encode_image())
        add_member(tar, "b.txt", b"a cat")
    with bounded():
        assert read(path) == ({"a": "member over 256 MiB", "b": None}, None)


def test_a_sample_of_two_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        large = tarfile.TarInfo("a.png")
        large.size = 2 * 2**30
        tar.addfile(large)
        file.seek(large.size, io.SEEK_CUR)  # a hole, for the file system
        tar.offset += large.size
        add_member(tar, "b.png", encode_image())
        add_member(tar, "b.txt", b"a cat")
    with bounded(seconds=20):
        assert read(path) == ({"a": "member over 256 MiB", "b": None}, None)


def test_a_list_of_holes_without_end_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "0.tar.gz"
    with gzip.open(path, "wb", 1) as file, tarfile.open(fileobj=file, mode="w") as tar:
        add_member(tar, "a.txt", b"a dog")
        sparse(tar, "b.png", 1, more=True)
        file.write((bytes(504) + b"\1" + bytes(7)) * 100_000)
    with bounded():
        assert read(path) == ({"a": "no image"}, "damaged tar: sparse member in many parts")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_gigabytes_is_damage(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "0.tar.gz"
    with gzip.open(path, "wb", 1) as file, tarfile.open(fileobj=file, mode="w") as tar:
        add_member(tar, "a.txt", b"a dog")
        header = tarfile.TarInfo("header")
        header.type, header.size = kind, 4 * 2**30
        tar.addfile(header)
        file.write(bytes(100 * 2**20))
    with bounded():
        assert read(path) == ({"a": "no image"}, f"damaged tar: header over {MAX_HEADER_BYTES >> 20} MiB")


@pytest.mark.parametrize("size", [200 * 2**20, MAX_MEMBER_BYTES + 1])
def test_a_gzip_bomb_is_damage(tmp_path: Path, size: int) -> None:
    path = tmp_path / "0.tar.gz"
    with gzip.open(path, "wb", 1) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        add_member(tar, "a.png", encode_image())
        add_member(tar, "a.txt", b"a dog")
        for name in ("b.png", "c.png"):
            bomb = tarfile.TarInfo(name)
            bomb.size = size
            tar.addfile(bomb, _Zeros(bomb.size))
    with bounded():
        samples, damage = read(path)
    assert (samples["a"], damage) == (None, "damaged tar: inflates to over 100 times its size")
    assert samples["b"] in ("cut off with its shard", "member over 256 MiB")
    with bounded():
        assert {*pick_pictures(Shard("0", str(path)), ["a", "c"])} == {"a"}


def test_what_inflates_a_little_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "0.tar.gz"
    with gzip.open(path, "wb", 1) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        add_member(tar, "a.png", encode_image())
        add_member(tar, "a.txt", b"a dog")
        add_member(tar, "a.log", bytes(60 * 2**20))
    with bounded():
        assert read(path) == ({"a": None}, None)


class _Zeros(io.RawIOBase):
    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1) -> bytes:
        count = min(size, self.left)
        self.left -= count
        return bytes(count)


def test_a_member_of_exabytes_that_are_not_there(tmp_path: Path) -> None:
    """tarfile would count them to the end, as the fuzzer found."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add_member(tar, "a.txt", b"a dog")
        header = tarfile.TarInfo("b.png")
        header.size = 2**62
        tar.addfile(header)
    with bounded():
        samples, damage = read(path)
    assert samples == {"a": "no image", "b": "member over 256 MiB"}
    assert damage is not None


def test_a_header_of_gzip_that_ends_early_is_damage(tmp_path: Path) -> None:
    """tarfile raises a TypeError there, as the fuzzer found."""
    path = tmp_path / "0.tar.gz"
    path.write_bytes(b"\x1f\x8b\x08F\x82%)\x8d\xd7\xff\xef")
    samples, damage = read(path)
    assert samples == {}
    assert damage is not None


def test_nothing_is_unpacked_linked_or_made(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("not to be read")
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("a.txt")
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
        add_member(tar, "../../b.png", encode_image())
        add_member(tar, "/c.txt", b"a dog")
    before = sorted(tmp_path.rglob("*"))
    assert read(path) == ({"../../b": "no caption", "/c": "no image"}, None)
    assert sorted(tmp_path.rglob("*")) == before


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))])
def test_weights_run_no_code(tmp_path: Path, write: Callable[[object, Path], object]) -> None:
    mark = tmp_path / "ran"
    write({"state_dict": Malicious(mark)}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match="cannot load the weights"):
        load_encoder(f"noisyclean-nano/{tmp_path}/model.pt")
    assert not mark.exists()


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    from noisyclean.training.checkpoint import Checkpoint

    mark = tmp_path / "ran"
    torch.save({"key": "k", "state": Malicious(mark)}, tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="cannot be read; remove it"):
        Checkpoint(tmp_path, "k").load()
    assert not mark.exists()


@pytest.mark.parametrize(
    "text", ["seed: !!python/object/apply:os.mkdir [ran]", "!!python/name:os.system", "a: &a [*a]", "[" * 500]
)
def test_recipes_run_no_code(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"mine\.yaml"):
        load_recipe("mine.yaml")
    assert not Path("ran").exists()


def test_a_recipe_that_unfolds_is_one_short_line(tmp_path: Path) -> None:
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 9)]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*lists, "seed: *a8"]))
    with bounded(), pytest.raises(UsageError, match=r"mine\.yaml: ") as refused:
        load_recipe(path)
    assert len(str(refused.value)) < 1000


def test_parquet_that_lies(tmp_path: Path) -> None:
    out = write_scores(tmp_path / "out", {"00000": {"p_value": np.linspace(0, 1, 5000)}})
    part = out / "scores" / "00000.parquet"
    whole = part.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    footer = int.from_bytes(whole[-8:-4], "little")
    for _ in range(60):
        data = bytearray(whole)
        for at in random.integers(len(data) - footer - 8, len(data), 8):
            data[at] ^= int(random.integers(1, 256))
        part.write_bytes(data)
        try:
            nc.split(out)
        except UsageError as error:
            refused += "scores/00000.parquet" in str(error)
    assert refused > 30  # what else was changed is of no consequence
    pq.write_table(pa.table({"key": [1]}), part)
    with pytest.raises(UsageError, match="remove it and score again"):
        nc.split(out)


def test_names_and_captions_do_not_reach_the_terminal_or_a_spreadsheet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from noisyclean.cli import main

    write_tar(tmp_path / "\x1b[2J.tar", {"\x1b]0;title\x07": pair(1, "\x1b[31mred")})
    for words in (["inspect", str(tmp_path)], ["inspect", str(tmp_path / "\x1b[2J-none.tar")]):
        monkeypatch.setattr(sys, "argv", ["noisyclean", *words])
        with pytest.raises(SystemExit):
            main()
        out, err = capfd.readouterr()
        assert "\x1b" not in out + err
        assert "\x07" not in out + err
