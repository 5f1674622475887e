"""Objects of stores that fail: whole, as they are, in bounded memory, or one line that says why not."""

from __future__ import annotations

import base64
import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from helpers import write_tar
from remote.conftest import SECRET
from remote.servers import KINDS, Answer, Faults, S3Server, web_server

from noisyclean.corpus import remote
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.remote import (
    list_remote,
    list_under,
    look_up,
    open_remote,
    put_remote,
    read_remote,
    refuse_changed,
    remove_under,
)
from noisyclean.corpus.shards import ShardReader
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


@pytest.mark.parametrize(("ranges", "blocks"), [(True, 4.5), (False, 10)])
def test_memory_is_bounded(tmp_path: Path, ranges: bool, blocks: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 2**20)  # beside which all else is small
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
    assert peak < blocks * remote.BLOCK


@pytest.mark.parametrize("ranges", [True, False])
def test_an_object_that_changes_is_refused(folder: Path, data: bytes, ranges: bool) -> None:
    with web_server(folder, ranges=ranges) as server, open_remote(f"{server.address}/a.tar") as stream:
        stream.read(10_240)
        (folder / "other").write_bytes(data[::-1])
        (folder / "other").replace(folder / "a.tar")
        with pytest.raises(NoisycleanError, match="changed while it was read"):
            refuse_changed(stream)


@pytest.mark.parametrize("size", [30_000, 51_000], ids=["ends earlier", "damaged where it goes on"])
def test_a_shard_that_is_replaced_meanwhile_is_not_called_damaged(tmp_path: Path, size: int) -> None:
    def fill(name: str, size: int) -> Path:
        return write_tar(tmp_path / name, {f"{n:03}": {"bin": random.Random(n).randbytes(size)} for n in range(40)})

    fill("a.tar", 50_000)
    with web_server(tmp_path) as server:
        reader = ShardReader(Shard("a", f"{server.address}/a.tar"))
        samples = reader.members()
        next(samples)
        fill("b.tar", size).replace(tmp_path / "a.tar")
        with pytest.raises(NoisycleanError, match=r"a\.tar: changed while it was read"):
            list(samples)


def test_a_hub_is_asked_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library would answer from what it has listed."""
    from huggingface_hub import HfApi, RepoFile

    versions = iter("ab")

    def file(version: str) -> list[RepoFile]:
        return [RepoFile(path="a.tar", size=3, oid=version)]

    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *_, **__: file("a"))
    monkeypatch.setattr(HfApi, "get_paths_info", lambda *_, **__: file(next(versions)))
    assert [look_up("hf://datasets/me/it/a.tar").version for _ in range(2)] == ["a", "b"]


def test_what_is_configured_for_one_web_protocol_holds_for_both(
    folder: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec import config

    header = f"Basic {base64.b64encode(f'me:{SECRET}'.encode()).decode()}"
    monkeypatch.setitem(config.conf, "https", {"client_kwargs": {"headers": {"Authorization": header}}})
    with web_server(folder, sign_in=f"me:{SECRET}") as server:
        assert read_remote(f"{server.address}/a.tar") == data


class TestLists:
    @pytest.fixture
    def bucket(self, tmp_path: Path, s3: S3Server) -> str:
        (tmp_path / "small").write_bytes(b"123")
        for name in ("exp[1]/a", "exp1/a", "exp1/b/c", "exp11/a"):
            put_remote(tmp_path / "small", f"s3://corpus/lists/{name}.tar")
        return "s3://corpus/lists"

    @pytest.mark.parametrize("pattern", ["/exp1/*/*.tar", "/*/*.tar", "/exp1/**"])
    def test_a_folder_that_cannot_be_listed_is_an_error(
        self, bucket: str, s3: S3Server, pattern: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = s3.answer

        def refuse(request: Any) -> Answer:
            refused = "list-type" in request.path and "exp1%2F" in request.path
            return Answer.of(403) if refused else answer(request)

        monkeypatch.setattr(s3, "answer", refuse)
        with pytest.raises(NoisycleanError, match=r"^s3://corpus/lists/.*no permission"):
            list_remote(f"{bucket}{pattern}")

    def test_what_is_under_a_name_is_not_what_it_matches(self, bucket: str) -> None:
        assert list_under(f"{bucket}/exp[1]") == {"a.tar": 3}
        assert list_under(f"{bucket}/exp1") == {"a.tar": 3, "b/c.tar": 3}
        remove_under(f"{bucket}/exp[1]")
        assert list_remote(f"{bucket}/**") == [f"{bucket}/{name}.tar" for name in ("exp1/a", "exp1/b/c", "exp11/a")]
        remove_under(f"{bucket}/exp1")
        remove_under(f"{bucket}/none")
        assert list_remote(f"{bucket}/**") == [f"{bucket}/exp11/a.tar"]


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
