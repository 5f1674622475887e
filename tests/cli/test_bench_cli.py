"""``noisyclean bench``: what it takes, what it prints, and mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import encode_noise, write_tar

import noisyclean as nc
from noisyclean.cli import main
from noisyclean.corpus.index import index_corpus
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.source import StreamSource
from noisyclean.encoders import DualEncoder, create_encoder
from noisyclean.evaluation.bench import detection
from noisyclean.evaluation.bench.table import COLUMNS, Tables
from noisyclean.evaluation.embedding_bench import METHODS, PROTOCOLS, bench_embeddings
from noisyclean.evaluation.retrieval import Retrieval, five_fold, retrieval
from noisyclean.scoring.reference import embed
from noisyclean.scoring.run import load_run

Run = Callable[..., str]

pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process and returns its stdout, or with ``code`` the one line that it fails with."""

    def command(*words: str | Path, code: int = 0) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["noisyclean", "bench", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        assert (stop.value.code or 0) == code, err
        if not code:
            return out
        *progress, last = err.splitlines()
        assert out == ""
        assert last.startswith("noisyclean: ")
        assert not any(line.startswith(("noisyclean: ", "Traceback")) for line in progress)
        return last

    return command


def test_help_is_quick_because_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys, noisyclean.cli
from typer.testing import CliRunner
for words in ([], ["detection"], ["embeddings"], ["retrieval"]):
    result = CliRunner().invoke(noisyclean.cli.app, ["bench", *words, "--help"])
    assert result.exit_code == 0
    for word in words:
        assert f"  noisyclean bench {word}" in result.output
heavy = {"torch", "open_clip", "pandas", "pyarrow", "numpy", "sklearn", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


class TestDetection:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What the library is asked for; instead of a bench, there is a table of one row."""
        calls: list[dict[str, Any]] = []

        def pretend(shards: Any, *, out: Path, **named: Any) -> Tables:
            calls.append({"shards": shards, "out": out, **named})
            out.mkdir()
            (out / "table.md").write_text("# a [table]\n")
            row = {"method": "srem", "rate": 0.4, "auroc": 0.9, "auroc_sd": np.nan}
            return Tables(out / "table.md", out / "summary.parquet", [], pd.DataFrame([row]))

        monkeypatch.setattr(detection, "bench_detection", pretend)
        return calls

    def test_defaults_are_those_of_the_library(self, run: Run, asked: list[dict[str, Any]]) -> None:
        out = run("detection")
        (given,) = asked
        assert "# a [table]" in out
        assert "noisyclean-bench/summary.parquet" in out
        assert given["shards"] is None
        assert given["out"] == detection.DEFAULT_BENCH
        assert given["recipe"] == detection.DEFAULT_RECIPE
        assert tuple(given["methods"]) == detection.DEFAULT_METHODS
        assert tuple(given["rates"]) == detection.DEFAULT_RATES
        assert tuple(given["seeds"]) == detection.DEFAULT_SEEDS
        assert given["pairs"] == detection.EMBEDDED_PAIRS
        assert given["protocols"] == ["caption"]
        assert given["jobs"] is None

    def test_options(self, run: Run, asked: list[dict[str, Any]]) -> None:
        words = "detection a b -o out -r icons --set seed=1 --set folds=3 --methods srem,vse --noise .2,0.4 --jobs 3"
        out = run(*words.split(), "--protocol", "caption, hard", "--seeds", "4,7", "--json")
        (given,) = asked
        assert json.loads(out) == [{"method": "srem", "rate": 0.4, "auroc": 0.9, "auroc_sd": None}]
        assert (given["shards"], given["out"], given["recipe"]) == (["a", "b"], Path("out"), "icons")
        assert given["overrides"] == ["seed=1", "folds=3"]
        assert (given["methods"], given["protocols"]) == (["srem", "vse"], ["caption", "hard"])
        assert (given["rates"], given["seeds"], given["jobs"]) == ([0.2, 0.4], [4, 7], 3)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--methods magic", "--methods magic: no such method; there are srem, oracle"),
            ("--methods ,", "--methods: give at least one"),
            ("--protocol words", "--protocol words: no such protocol; there are caption, image, hard"),
            ("--protocol ,", "--protocol: give at least one"),
            ("--noise much", "--noise much: give numbers with commas between"),
            ("--noise ,", "--noise: give at least one number"),
            ("--noise 1.5", "--noise 1.5: a share of the pairs"),
            ("--seeds few", "--seeds few: give numbers"),
            ("--seeds 0", "--seeds 0: give at least one"),
            ("--seeds=-3", "--seeds -3: give at least one"),
            ("--seeds=-1,2", "seed: input should be greater than or equal to 0"),
            ("--recipe benhc", "benhc: no such recipe; did you mean bench?"),
            ("--set optimiser.epoch=3", "did you mean optimiser.epochs?"),
            ("--set objective.nam=ncr", "did you mean objective.name?"),
            ("nowhere/", "nowhere"),
            ("--device abacus", "abacus"),
        ],
    )
    def test_mistakes_are_one_line(self, words: str, message: str, run: Run, tmp_path: Path) -> None:
        assert message in run("detection", *words.split(), code=2)
        assert list(tmp_path.iterdir()) == []  # nothing is made before all is understood

    def test_headings_are_as_many_as_columns(self) -> None:
        assert all(heading and "|" not in heading for heading, _, _ in COLUMNS.values())


class TestEmbeddings:
    @pytest.fixture
    def pairs(self, tmp_path: Path) -> Path:
        random = np.random.default_rng(0)
        image = random.normal(size=(60, 8)).astype(np.float32)
        np.savez(tmp_path / "pairs.npz", img=image, txt=image + random.normal(size=(60, 8)).astype(np.float32))
        return tmp_path / "pairs.npz"

    def test_table_and_json(self, pairs: Path, run: Run) -> None:
        expected = bench_embeddings(pairs, rates=[0.25], seeds=[0, 1])
        found = json.loads(run("embeddings", pairs, "--noise", "0.25", "--seeds", "2", "--json"))
        assert pd.DataFrame(found["scores"]).equals(expected.scores)
        assert pd.DataFrame(found["splits"]).equals(expected.splits)
        assert set(expected.scores["protocol"]) <= set(PROTOCOLS)
        table = run("embeddings", pairs, "--noise", "0.25", "--seeds", "2")
        assert "random, AUROC, 2 seeds" in table
        assert all(f"| {method} |" in table for method in METHODS)
        assert "near, estimate and clean part in %, 2 seeds" in table

    def test_what_is_not_defined_is_null(self, pairs: Path, run: Run) -> None:
        found = json.loads(run("embeddings", pairs, "--noise", "0", "--seeds", "1", "--json"))
        assert {one["auroc"] for one in found["scores"]} == {None}
        assert {one["planted_noise"] for one in found["splits"]} == {0}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("missing.npz", "missing.npz: no such file"),
            ("odd.npz", "odd.npz: not an npz file"),
            ("pairs.npz --noise 1.5", "lies between 0 and 1"),
            ("pairs.npz --noise x", "--noise x: give numbers"),
            ("pairs.npz --seeds 0", "--seeds 0: give at least one"),
            ("pairs.npz --seeds=-1,0", "a seed is 0 or more"),
        ],
    )
    def test_mistakes_are_one_line(self, words: str, message: str, pairs: Path, run: Run) -> None:
        pairs.with_name("odd.npz").write_text("no npz")
        assert message in run("embeddings", *words.split(), code=2)


class TestRetrieval:
    @pytest.fixture(scope="class")
    @staticmethod
    def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """``shards/`` of 30 pictures with one to three captions, and ``model/``, an untrained open_clip model."""
        home = tmp_path_factory.mktemp("home")
        for shard in range(2):
            samples = {
                f"{shard}{image:02d}{caption}": {
                    "png": encode_noise(100 * shard + image),
                    "txt": f"caption {caption} of picture {image} in {shard}".encode(),
                }
                for image in range(15)
                for caption in range(1 + image % 3)
            }
            write_tar(home / "shards" / f"0000{shard}.tar", samples)
        torch.manual_seed(0)
        create_encoder("pico").save(home / "model")
        return home

    def embedded(self, encoder: DualEncoder, shards: Path) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Pictures in the order that they come in, captions, and whose they are."""
        index = index_corpus(find_shards(shards), workers=1)
        rows, image, text = embed(encoder, StreamSource(index, encoder.preprocessor, workers=0), np.arange(len(index)))
        assert rows.tolist() == list(range(len(index)))
        numbers: dict[int, int] = {}
        owner = [numbers.setdefault(one, len(numbers)) for one in index.image.tolist()]
        return image[[owner.index(number) for number in range(len(numbers))]], text, np.array(owner)

    def check(self, found: dict[str, Any], expected: Retrieval) -> None:
        for name in ("image_to_text", "text_to_image"):
            assert tuple(found[name]) == pytest.approx(getattr(expected, name))
        assert found["rsum"] == pytest.approx(expected.rsum)

    def test_an_open_clip_model(self, home: Path, run: Run) -> None:
        words = ("retrieval", home / "shards", "-m", home / "model")
        given = self.embedded(create_encoder(f"local-dir:{home / 'model'}"), home / "shards")
        assert (len(given[0]), len(given[1])) == (30, 60)
        expected = retrieval(*given)
        (found,) = json.loads(run(*words, "--json"))
        self.check(found, expected)
        line = run(*words)
        assert line.startswith("image → text R@1/5/10 ")
        assert line.rstrip().endswith(f"rSum {expected.rsum:.1f}")
        (found,) = json.loads(run(*words, "--five-fold", "--json"))
        self.check(found, five_fold(*given))

    def test_each_fold_of_a_run(self, home: Path, tmp_path: Path, run: Run) -> None:
        nc.generate_corpus(tmp_path / "corpus", pairs=80, image_size=32)
        tiny = ["encoder.name=pico", "optimiser.epochs=1", "objective.name=infonce", "data.workers=0"]
        nc.fit(tmp_path / "corpus", out=tmp_path / "run", overrides=tiny)
        found = json.loads(run("retrieval", home / "shards", "-m", tmp_path / "run", "--json"))
        models = load_run(tmp_path / "run").models
        assert len(found) == 2
        for one, model in zip(found, models, strict=True):
            self.check(one, retrieval(*self.embedded(model.encoder, home / "shards")))
        lines = run("retrieval", home / "shards", "-m", "run").splitlines()
        assert [line.partition(": image")[0] for line in lines] == ["fold 0", "fold 1"]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("nowhere/ -m model", "nowhere"),
            ("shards -m nomodel", "nomodel"),
            ("shards", "noisyclean-run"),
            ("few -m model --five-fold", "--five-fold: 4 different pictures in"),
        ],
    )
    def test_mistakes_are_one_line(self, words: str, message: str, home: Path, tmp_path: Path, run: Run) -> None:
        for name in ("shards", "model"):
            (tmp_path / name).symlink_to(home / name)
        write_tar(tmp_path / "few" / "0.tar", {f"{i}": {"png": encode_noise(i % 4), "txt": b"few"} for i in range(6)})
        assert message in run("retrieval", *words.split(), code=2)
