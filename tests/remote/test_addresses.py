"""Which shards addresses name, and that no secret in them is ever shown or recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import pair, write_tar
from remote.conftest import SECRET
from remote.servers import Faults, S3Server, WebServer, web_server

from noisyclean.corpus.locate import ShardSpec, absolute_paths, find_shards, without_secrets
from noisyclean.corpus.noise import corrupt
from noisyclean.corpus.remote import put_remote
from noisyclean.corpus.shards import ShardReader
from noisyclean.errors import NoisycleanError, UsageError

FILES = ["en/00000.tar", "en/00001.tar", "fr/00000.tar", "fr/deep/00002.tgz", "fr/00000.parquet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name in FILES:
        write_tar(folder / name, {"k": pair(0)})
    (folder / "list.txt").write_text("# some\nen/{00000..00001}.tar\nfr/deep/00002.tgz\n")
    return folder


def read_all(spec: ShardSpec) -> list[list[str]]:
    """The keys of all samples, shard by shard."""
    return [[sample.key for sample in ShardReader(shard)] for shard in find_shards(spec)]


@pytest.fixture(scope="module", params=["web", "s3"])
def base(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """The address of the folder in a store."""
    if request.param == "web":
        with web_server(folder) as server:
            yield server.address
        return
    request.getfixturevalue("s3")
    for name in [*FILES, "list.txt"]:
        put_remote(folder / name, f"s3://corpus/listed/{name}")
    yield "s3://corpus/listed"


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("{}", ["00001", "00002", "en/00000", "fr/00000"]),
        ("{}/", ["00001", "00002", "en/00000", "fr/00000"]),
        ("{}/fr", ["00000", "00002"]),
        ("{}/en/*.tar", ["00000", "00001"]),
        ("{}/*/00000.tar", ["en/00000", "fr/00000"]),
        ("{}/en/0000[1-5].tar", ["00001"]),
        ("{}/en/{{00000..00001}}.tar", ["00000", "00001"]),
        ("@{}/list.txt", ["00000", "00001", "00002"]),
    ],
)
def test_spec(base: str, spec: str, names: list[str]) -> None:
    assert [shard.name for shard in find_shards(spec.format(base))] == names
    assert read_all(spec.format(base)) == [["k"]] * len(names)


@pytest.mark.parametrize("spec", ["{}/none", "{}/en/*.zip", "@{}/none.txt"])
def test_nothing_there(base: str, spec: str) -> None:
    with pytest.raises(NoisycleanError, match=r"no such object|matches no \.tar shards"):
        find_shards(spec.format(base))


def test_a_local_list_may_name_addresses(folder: Path, tmp_path: Path) -> None:
    with web_server(folder) as server:
        (tmp_path / "list.txt").write_text(f"{server.address}/en/*.tar\n{server.address}/fr/deep/00002.tgz\n")
        assert [shard.name for shard in find_shards(f"@{tmp_path / 'list.txt'}")] == ["00000", "00001", "00002"]


def test_no_shard_is_lost_in_a_list_by_a_server_that_fails(folder: Path) -> None:
    with web_server(folder) as server:
        whole = find_shards(server.address)
        for seed in range(5):
            with server.failing(Faults(0.4, seed=seed)):
                assert find_shards(server.address) == whole


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://host/a.tar", "https://host/a.tar"),
        (f"https://me:{SECRET}@host/a.tar", "https://***@host/a.tar"),
        (f"https://{SECRET}@host/a.tar", "https://***@host/a.tar"),
        (f"https://host/a.tar?X-Amz-Signature={SECRET}&b=c", "https://host/a.tar?***"),
        (f"https://host/a.tar?{SECRET}", "https://host/a.tar?***"),
        (f"ftp://me:{SECRET}@host/a@b.tar", "ftp://***@host/a@b.tar"),
        (f"simplecache::https://me:{SECRET}@host/a.tar?token={SECRET}", "simplecache::https://***@host/a.tar?***"),
        (f"s3://bucket/a.tar?token={SECRET}", "s3://bucket/a.tar?***"),
        ("s3://bucket/0000?.tar", "s3://bucket/0000?.tar"),
        ("abfs://container@account/a.tar", "abfs://container@account/a.tar"),
        ("hf://datasets/me/it@main/a.tar", "hf://datasets/me/it@main/a.tar"),
        ("/mnt/a:b@c?d=e/a.tar", "/mnt/a:b@c?d=e/a.tar"),
    ],
)
def test_secrets_are_not_shown(address: str, shown: str) -> None:
    assert without_secrets(address) == shown


class TestSecretsInSpecs:
    @pytest.fixture
    def server(self, folder: Path) -> Iterator[WebServer]:
        with web_server(folder, sign_in=f"me:{SECRET}", query=f"token={SECRET}") as server:
            yield server

    def address(self, server: WebServer, name: str) -> str:
        return f"http://me:{SECRET}@127.0.0.1:{server.port}/{name}?token={SECRET}"

    def test_shards_are_read_and_named_without(self, server: WebServer) -> None:
        spec = [self.address(server, f"{name}/00000.tar") for name in ("en", "fr")]
        assert read_all(spec) == [["k"], ["k"]]
        found = find_shards(spec)
        assert [shard.name for shard in found] == ["en/00000", "fr/00000"]
        assert SECRET not in " ".join(map(str, found))

    def test_hosts_tell_names_apart(self) -> None:
        spec = [f"https://me:{SECRET}@{host}.example/00000.tar" for host in "ab"]
        assert [shard.name for shard in find_shards(spec)] == ["a.example/00000", "b.example/00000"]

    def test_no_truth_is_looked_for_beside_what_is_signed(self, server: WebServer, tmp_path: Path) -> None:
        corrupt(self.address(server, "en/00000.tar"), tmp_path, rate=0.0, workers=0)
        assert (tmp_path / "truth.parquet").is_file()

    def test_a_record_of_them_is_refused(self, server: WebServer) -> None:
        recorded = absolute_paths(find_shards(self.address(server, "en/00000.tar")))
        assert recorded == [f"http://***@127.0.0.1:{server.port}/en/00000.tar?***"]
        with pytest.raises(UsageError, match="recorded without the secret in it; name SHARDS again"):
            find_shards(recorded)

    @pytest.mark.parametrize(
        "spec",
        [
            *("{0} {0}", "{1}", "@{1}", "{1}/*.tar", "@{2}", "{3}"),
            "http://me:{secret}@127.0.0.1:9/{{a.tar?token={secret}",
            "{{{0},nothere.tar}}",
            "{{nothere.tar,http:{{//me:{secret}@127.0.0.1:9/a.tar,//127.0.0.1:9/b.tar}}}}",
        ],
    )
    def test_complaints_do_not_tell_them(self, server: WebServer, spec: str) -> None:
        addresses = [self.address(server, name) for name in ("en/00000.tar", "none", "en/00000.tar", "en/none.tar")]
        with pytest.raises(NoisycleanError) as error:
            read_all(spec.format(*addresses, secret=SECRET).split())
        assert SECRET not in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_recorded_addresses_without_secrets_are_found_again(s3: S3Server, folder: Path) -> None:
    put_remote(folder / "en/00000.tar", "s3://corpus/again/00000.tar")
    found = find_shards("s3://corpus/again")
    assert find_shards(absolute_paths(found)) == found
