"""Scores of remote shards, and scores in a store, are those of local ones, whatever fails; and no secret is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
import torch
from helpers import Listener
from remote.conftest import SECRET
from remote.servers import Faults, S3Server, WebServer, web_server

import noisyclean as nc
from noisyclean.cli import main
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.remote import put_remote
from noisyclean.corpus.stream import stream_chunks
from noisyclean.encoders import DualEncoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import place, replacing, write_parquet
from noisyclean.manifest.parts import list_parts, read_part, read_part_info
from noisyclean.manifest.splitting import Summary

FITTING = ["encoder.name=pico", "optimiser.batch_size=32", "optimiser.epochs=2", "objective.warmup_epochs=1"]
FITTING += ["bank.size=64", "data.workers=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, encoder: DualEncoder) -> Path:
    """``shards/``, one of them damaged, ``model/``, and ``out/``, what it makes of them."""
    home = tmp_path_factory.mktemp("home")
    nc.generate_corpus(home / "shards", pairs=160, pairs_per_shard=20, image_size=32, seed=3)
    whole = home / "shards" / "00005.tar"
    whole.write_bytes(whole.read_bytes()[:30_000])
    encoder.save(home / "model")
    nc.score(home / "shards", model=f"local-dir:{home / 'model'}", out=home / "out", workers=0)
    return home


@pytest.fixture
def server(home: Path) -> Iterator[WebServer]:
    """The shards behind a name, a password and a token; one request in twenty fails."""
    faults = Faults(0.05, seed=4)
    with web_server(home / "shards", faults, sign_in=f"me:{SECRET}", query=f"token={SECRET}") as server:
        yield server


def signed(server: WebServer) -> str:
    return f"http://me:{SECRET}@127.0.0.1:{server.port}/{{00000..00007}}.tar?token={SECRET}"


def command(monkeypatch: pytest.MonkeyPatch, *words: str, code: int = 0) -> None:
    """Run a command in this process, which saves importing torch."""
    monkeypatch.setattr(sys, "argv", ["noisyclean", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code


def timeless(summary: Summary) -> dict[str, object]:
    return {**asdict(summary), "seconds": None, "pairs_per_second": None}


def rows(out: Path | str) -> pa.Table:
    return nc.Manifest(out).table().sort_by([("shard", "ascending"), ("index", "ascending")])


def assert_equal(out: Path | str, local: Path) -> None:
    """That both hold the same scores and the same manifest."""
    there = place(out)
    assert list_parts(there) == list_parts(local)
    for shard in list_parts(local):
        assert read_part(there, shard) == read_part(local, shard)
    assert rows(out) == rows(local)
    assert timeless(nc.Manifest(out).summary) == timeless(nc.Manifest(local).summary)


def assert_no_secret(folder: Path, *said: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if SECRET.encode() in path.read_bytes() or SECRET in str(path)] == []
    assert SECRET not in " ".join(said)


def test_shards_of_a_web_server_that_fails(
    home: Path, server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["score", signed(server), "-m", f"local-dir:{home / 'model'}", "-o", str(tmp_path / "out")]
    words += ["--workers", "0", "--debug"]
    command(monkeypatch, *words)
    assert server.faults.met
    assert_equal(tmp_path / "out", home / "out")
    assert_no_secret(tmp_path, *capfd.readouterr())

    command(monkeypatch, *words)
    assert "8 of 8 shards are scored already" in capfd.readouterr().err


def test_worker_processes_read_the_same(home: Path, server: WebServer, encoder: DualEncoder) -> None:
    def read(spec: str) -> dict[str, list[pa.Table | torch.Tensor]]:
        found: dict[str, list[pa.Table | torch.Tensor]] = {}
        for one in stream_chunks(find_shards(spec), encoder.preprocessor, chunk_size=8, workers=2):
            found.setdefault(one.shard, []).extend([one.rows, one.image, one.text])
        return found

    local, remote = read(str(home / "shards")), read(signed(server))
    assert local.keys() == remote.keys()
    for shard, parts in local.items():
        for one, other in zip(parts, remote[shard], strict=True):
            assert one.equals(other) if isinstance(one, pa.Table) else torch.equal(one, other)


def test_fitted_shards_must_be_named_again_where_a_secret_was_in_them(
    server: WebServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nc.fit(signed(server), out=tmp_path / "run", overrides=FITTING)
    with pytest.raises(UsageError, match="recorded without the secret in it; name SHARDS again"):
        nc.score(model=tmp_path / "run", out=tmp_path / "out", workers=0)
    nc.score(signed(server), model=tmp_path / "run", out=tmp_path / "out", workers=0)
    assert set(rows(tmp_path / "out")["fold"].drop_null().to_pylist()) == {0, 1}  # known for what was fitted
    with pytest.raises(NoisycleanError, match="recorded without the secret in it"):
        nc.export(tmp_path / "out", to=tmp_path / "uncertain", format="shards", splits=["uncertain"])
    assert_no_secret(tmp_path, *capfd.readouterr())


def parts_written(s3: S3Server) -> int:
    return len({path for method, path in s3.asked if method == "PUT" and "/out/scores/" in path})


@pytest.fixture(scope="module")
def in_store(home: Path, s3: S3Server) -> None:
    """``s3://corpus/shards``, and the scores in ``s3://corpus/out``: killed once, and finished by another run."""
    for shard in find_shards(home / "shards"):
        put_remote(Path(shard.path), f"s3://corpus/shards/{shard.name}.tar")
    model = f"local-dir:{home / 'model'}"
    words = ["score", "s3://corpus/shards", "-m", model, "-o", "s3://corpus/out", "--workers", "0", "--debug"]
    with s3.failing(Faults(0.05, seed=2)):
        killed = subprocess.Popen(
            [sys.executable, "-m", "noisyclean", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while killed.poll() is None and parts_written(s3) < 3:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        said = killed.communicate()
        assert killed.returncode == -signal.SIGKILL, said
        assert SECRET not in "".join(said)
        done = list_parts(place("s3://corpus/out"))
        assert 2 <= len(done) < 8

        s3.asked.clear()
        listener = Listener()
        nc.score("s3://corpus/shards", model=model, out="s3://corpus/out", workers=0, progress=listener)
        assert f"{len(done)} of 8 shards are scored already" in listener.said
        assert parts_written(s3) == 8 - len(done)


@pytest.mark.usefixtures("in_store")
class TestStore:
    def test_scores_and_manifest_are_those_of_a_local_run(self, home: Path) -> None:
        assert_equal("s3://corpus/out", home / "out")

    def test_no_secret_is_in_any_object(self, s3: S3Server, tmp_path: Path) -> None:
        fsspec.filesystem("s3", skip_instance_cache=True).get("corpus/out", str(tmp_path), recursive=True)
        assert len([*tmp_path.rglob("*.parquet")]) > 16
        assert_no_secret(tmp_path)

    def test_another_split_replaces_the_manifest(self, home: Path, s3: S3Server) -> None:
        with s3.failing(Faults(0.05, seed=3)):
            for out in ("s3://corpus/out", home / "out"):
                nc.split(out, keep=0.5, by="similarity")
        assert_equal("s3://corpus/out", home / "out")

    def test_an_interrupted_split_leaves_no_manifest(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from noisyclean.manifest import splitting

        def fail(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(splitting, "write_json", fail)
            with pytest.raises(KeyboardInterrupt):
                nc.split("s3://corpus/out")
        with pytest.raises(UsageError, match=r"no manifest in it; `noisyclean split s3://corpus/out` makes one"):
            nc.Manifest("s3://corpus/out")
        for out in ("s3://corpus/out", home / "out"):
            nc.split(out)
        assert_equal("s3://corpus/out", home / "out")

    def test_a_split_that_cannot_be_made_leaves_the_manifest(self, home: Path, s3: S3Server, tmp_path: Path) -> None:
        part = home / "out" / "scores" / "00003.parquet"
        footer = int.from_bytes(part.read_bytes()[-8:-4], "little") + 8
        (tmp_path / "broken").write_bytes(
            b"PAR1" + bytes(part.stat().st_size - footer - 4) + part.read_bytes()[-footer:]
        )
        put_remote(tmp_path / "broken", "s3://corpus/out/scores/00003.parquet")
        try:
            with pytest.raises(UsageError, match="not a score part"):
                nc.split("s3://corpus/out", keep=0.5)
            assert rows("s3://corpus/out") == rows(home / "out")
        finally:
            put_remote(part, "s3://corpus/out/scores/00003.parquet")

    def test_a_manifest_that_is_replaced_is_not_read_on(self, home: Path) -> None:
        opened = nc.Manifest("s3://corpus/out")
        file = opened.files()[0]
        nc.split("s3://corpus/out", keep=0.3)
        for read in (opened.table, lambda: opened.count(file), lambda: opened.summary):
            with pytest.raises(NoisycleanError, match=r"s3://corpus/out: its manifest was replaced while it was read"):
                read()
        nc.split("s3://corpus/out")
        assert_equal("s3://corpus/out", home / "out")

    def test_of_two_splits_at_once_the_last_one_is_refused(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from noisyclean.manifest import splitting

        def split_meanwhile(path: Path, table: pa.Table) -> int:
            size = write_parquet(path, table)
            if "00003" in path.name:
                patch.undo()
                nc.split("s3://corpus/out", keep=0.5, by="similarity")
            return size

        with monkeypatch.context() as patch:
            patch.setattr(splitting, "write_parquet", split_meanwhile)
            with pytest.raises(NoisycleanError, match="another process wrote there meanwhile; repeat the command"):
                nc.split("s3://corpus/out")
        with pytest.raises(UsageError, match="no manifest in it"):
            nc.Manifest("s3://corpus/out")
        nc.split("s3://corpus/out")
        assert_equal("s3://corpus/out", home / "out")

    def test_few_requests_tell_that_a_shard_is_done(self, s3: S3Server) -> None:
        s3.asked.clear()
        read_part_info(place("s3://corpus/out"), "00000")
        assert [method for method, path in s3.asked if "00000.parquet" in path] == ["HEAD", "HEAD", "GET"]

    def test_no_room_on_this_machine(self) -> None:
        with (
            pytest.raises(NoisycleanError, match=r"s3://corpus/x: cannot be written \(No space .*make room in /"),
            replacing(place("s3://corpus/x")),
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def test_what_reads_a_manifest_reads_it_there(self, home: Path, tmp_path: Path) -> None:
        truth = home / "shards" / "truth.parquet"
        assert nc.evaluate("s3://corpus/out", truth=truth) == nc.evaluate(home / "out", truth=truth)
        for out, to in (("s3://corpus/out", tmp_path / "from-store"), (home / "out", tmp_path / "from-here")):
            nc.export(out, to=to, format="shards", splits=["noisy", "uncertain"])
        for path in (tmp_path / "from-here").glob("*.tar"):
            assert (tmp_path / "from-store" / path.name).read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("name", ["show", "split", "evaluate"])
    def test_commands_take_the_address(
        self, home: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        extra = ["--truth", str(home / "shards" / "truth.parquet")] if name == "evaluate" else []
        said = []
        for out in ("s3://corpus/out", str(home / "out")):
            command(monkeypatch, name, out, *extra)
            said.append(capfd.readouterr().out.replace(out, "OUT"))
        assert [line for line in said[0].splitlines() if "Scored in" not in line] == [
            line for line in said[1].splitlines() if "Scored in" not in line
        ]

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["report", "s3://corpus/out"], "s3://corpus/out: a local path is needed here"),
            (["review", "s3://corpus/out"], "s3://corpus/out: a local path is needed here"),
            (["fit", "shards", "-o", "s3://corpus/run"], "s3://corpus/run: a local path is needed here"),
            (
                ["export", "out", "-o", "s3://corpus/x", "--format", "keys"],
                "s3://corpus/x: a local path is needed here",
            ),
            (["split", "https://example.com/out"], "https://example.com/out: cannot be written to"),
            (["split", "sftp://example.com/out"], "sftp://example.com/out: cannot be written to"),
            (["split", "s3://corpus/exp[1]"], "s3://corpus/exp[1]: a place in a store has no *, ? or [ in its name"),
            (["split", f"s3://me:{SECRET}@corpus/out"], "s3://***@corpus/out: leave the secret out"),
            (["split", "file:///no/such"], "/no/such: no scores in it"),
        ],
    )
    def test_where_an_address_cannot_be(
        self,
        home: Path,
        words: list[str],
        complaint: str,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(home)
        command(monkeypatch, *words, code=2)
        said = capfd.readouterr().err
        assert said.startswith(f"noisyclean: {complaint}")
        assert len(said.splitlines()) == 1
        assert not [path for path in home.iterdir() if path.name.startswith(("s3", "https"))]
