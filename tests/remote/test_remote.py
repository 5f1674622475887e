"""Objects of stores that fail: whole, as they are, in bounded memory, or one line that says why not."""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from remote.conftest import SECRET
from remote.servers import KINDS, Faults, S3Server, web_server

from noisyclean.corpus import remote
from noisyclean.corpus.remote import look_up, open_remote, put_remote, read_remote
from noisyclean.errors import NoisycleanError

SIZE = 5_000_003


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def folder(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "a.tar").write_bytes(data)
    return tmp_path


def pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """As tarfile reads."""
    return iter(lambda: stream.read(10_240), b"")


def read_all(address: str) -> bytes:
    with open_remote(address) as stream:
        return b"".join(pieces(stream))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_read_whole_from_a_web_server_that_fails(folder: Path, data: bytes, kind: str, ranges: bool) -> None:
    with web_server(folder, Faults(0.2, kinds=(kind,)), ranges=ranges) as server:
        assert read_all(f"{server.address}/a.tar") == data
        assert server.faults.met[kind]


def test_read_and_written_whole_in_an_s3_store_that_fails(folder: Path, data: bytes, s3: S3Server) -> None:
    with s3.failing(Faults(0.2)):
        put_remote(folder / "a.tar", "s3://corpus/put/a.tar")
        assert read_all("s3://corpus/put/a.tar") == data
        assert look_up("s3://corpus/put/a.tar").size == SIZE


def test_what_was_had_is_not_asked_for_again(folder: Path, data: bytes) -> None:
    with web_server(folder, Faults(0.3, kinds=("500", "drop"))) as server:
        assert read_all(f"{server.address}/a.tar") == data
        assert server.faults.met.total() > 5
        assert server.sent[206] == SIZE


def test_a_line_that_always_breaks_half_way_still_gets_on(folder: Path, data: bytes) -> None:
    """Of each body that is cut nothing is had, but less is asked for each time, until it fits."""
    with web_server(folder, longest=150_000) as server:
        assert read_all(f"{server.address}/a.tar") == data
        assert server.faults.met["cut"]


def test_seeks(folder: Path, data: bytes) -> None:
    with web_server(folder) as server, open_remote(f"{server.address}/a.tar") as stream:
        for at in (4_000_000, 17, SIZE - 10, 2**18 - 5):
            stream.seek(at)
            assert stream.read(10) == data[at : at + 10]


@pytest.mark.parametrize("ranges", [True, False])
def test_memory_is_bounded(tmp_path: Path, ranges: bool) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(40 * 2**20))
    with web_server(tmp_path, ranges=ranges) as server:
        read_remote(f"{server.address}/a.tar")  # whatever is loaded or made once
        tracemalloc.start()
        try:
            with open_remote(f"{server.address}/a.tar") as stream:
                assert sum(map(len, pieces(stream))) == 40 * 2**20
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 8 * 2**20


@pytest.mark.parametrize("ranges", [True, False])
def test_an_object_that_changes_is_refused(folder: Path, data: bytes, ranges: bool) -> None:
    with web_server(folder, ranges=ranges) as server, open_remote(f"{server.address}/a.tar") as stream:
        stream.read(10_240)
        (folder / "other").write_bytes(data[::-1])
        (folder / "other").replace(folder / "a.tar")
        with pytest.raises(NoisycleanError, match="changed while it was read"):
            list(pieces(stream))


def test_gives_up_after_some_tries(folder: Path) -> None:
    with web_server(folder, Faults(1.0, kinds=("503",))) as server:
        with pytest.raises(NoisycleanError, match="HTTP status 503"):
            look_up(f"{server.address}/a.tar")
        assert len(server.asked) == 2 * remote.TRIES  # HEAD, and where it fails, GET


def test_closing_does_not_wait_for_a_server_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server(folder) as server:
        stream = open_remote(f"{server.address}/a.tar")
        stream.read(10)
        server.faults = Faults(1.0, kinds=("500",))
        monkeypatch.setattr(remote, "FIRST_PAUSE", 30.0)
        stream.seek(3 * 2**18)
        time.sleep(0.2)  # the block that is read ahead has failed, and waits to be asked for again
        started = time.monotonic()
        stream.close()
        assert time.monotonic() - started < 5


def test_a_server_that_does_not_tell_sizes_is_refused(folder: Path) -> None:
    with web_server(folder) as server:
        server.tells_sizes = False
        with pytest.raises(NoisycleanError, match=r"a\.tar: the server does not say how large it is; download it"):
            read_remote(f"{server.address}/a.tar")


class TestWords:
    @pytest.mark.parametrize(
        ("address", "words"),
        [
            ("http://127.0.0.1:{port}/b.tar", "no such object; check the address"),
            ("s3://corpus/nothing.tar", "no such object; check the address"),
            ("s3://no-such-bucket/a.tar", "no such object; check the address"),
            ("nothing://corpus/a.tar", "no store is known by nothing://"),
        ],
    )
    def test_what_is_not_there(self, folder: Path, s3: S3Server, address: str, words: str) -> None:
        with web_server(folder) as server, pytest.raises(NoisycleanError, match=words):
            look_up(address.format(port=server.port))

    @pytest.mark.parametrize(
        ("address", "module", "remedy"),
        [
            ("s3://corpus/a.tar", "s3fs", r"pip install 'noisyclean\[s3\]'"),
            ("gs://corpus/a.tar", "gcsfs", r"pip install 'noisyclean\[gs\]'"),
            ("https://example.com/a.tar", "aiohttp", r"pip install 'noisyclean\[http\]'"),
        ],
    )
    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch, address: str, module: str, remedy: str) -> None:
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, address.partition(":")[0], raising=False)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(NoisycleanError, match=remedy):
            look_up(address)

    def test_no_permission(self, folder: Path) -> None:
        with web_server(folder, sign_in="somebody:else") as server:
            with pytest.raises(NoisycleanError, match="no permission") as error:
                look_up(f"http://somebody:{SECRET}@127.0.0.1:{server.port}/a.tar?token={SECRET}")
            assert str(error.value).startswith(f"http://***@127.0.0.1:{server.port}/a.tar?***: ")
            assert not error.value.__cause__
            assert error.value.__suppress_context__  # so that no traceback quotes the address

    def test_no_credentials(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import s3fs

        monkeypatch.setattr(s3fs.S3FileSystem, "_cache", {})
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        with pytest.raises(NoisycleanError, match="no credentials found"):
            look_up("s3://corpus/a.tar")

    def test_unreachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "TRIES", 2)
        with pytest.raises(NoisycleanError, match=r"127\.0\.0\.1:9/a\.tar: cannot be reached"):
            look_up("http://127.0.0.1:9/a.tar")


def test_state_tells_a_changed_object(folder: Path, s3: S3Server, data: bytes) -> None:
    put_remote(folder / "a.tar", "s3://corpus/state/a.tar")
    before = look_up("s3://corpus/state/a.tar")
    put_remote(folder / "a.tar", "s3://corpus/state/a.tar")
    assert look_up("s3://corpus/state/a.tar") == before
    (folder / "a.tar").write_bytes(data[::-1])
    put_remote(folder / "a.tar", "s3://corpus/state/a.tar")
    assert look_up("s3://corpus/state/a.tar") != before
