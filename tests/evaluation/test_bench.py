"""The bench: noise planted as asked, methods that differ in nothing else, and runs that are not lost nor repeated."""

from __future__ import annotations

import inspect
import json
import math
import random
import shutil
import statistics
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Listener, encode_noise, simulate_scores, write_scores, write_tar
from numpy.typing import NDArray

import noisyclean as nc
from noisyclean.calibration import p_values
from noisyclean.corpus import donors
from noisyclean.corpus.identity import caption_id
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.noise import NoiseProtocol
from noisyclean.corpus.source import Batch, PairSource
from noisyclean.encoders import create_encoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.evaluation.bench import detection as detection_module
from noisyclean.evaluation.bench import run as run_module
from noisyclean.evaluation.bench.corpus import BenchCorpus, PlantedCorpus
from noisyclean.evaluation.bench.detection import bench_detection, read_results
from noisyclean.evaluation.bench.methods import METHODS
from noisyclean.evaluation.bench.run import TRAINING_FREE, RunKey, method_recipe
from noisyclean.evaluation.bench.table import COLUMNS, Tables
from noisyclean.evaluation.detection import evaluate
from noisyclean.manifest.schema import STATISTICS
from noisyclean.manifest.splitting import split
from noisyclean.recipe import OBJECTIVES
from noisyclean.scoring.reference import ReferenceBank
from noisyclean.srem import PairStatistics
from noisyclean.training.crossfit import CrossFit
from noisyclean.training.filtration import Judged

TINY = [
    "encoder.name=pico",
    "optimiser.epochs=2",
    "optimiser.batch_size=32",
    "objective.warmup_epochs=1",
    "bank.size=64",
]
LONGER = [*TINY, "optimiser.epochs=5"]
"""Long enough for every method's warm-up."""
PAIRS = 300
PROTOCOLS = get_args(NoiseProtocol)
ONCE: dict[str, Any] = {"overrides": TINY, "rates": [0.4], "seeds": [0], "pairs": PAIRS, "jobs": 1, "device": "cpu"}
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(scope="module")
def benched(one_tokenizer: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tables]:
    """A bench of three methods on the embedded corpus."""
    out = tmp_path_factory.mktemp("bench") / "out"
    return out, bench_detection(out=out, methods=["srem", "oracle", "infonce"], **ONCE)


@pytest.fixture
def out(benched: tuple[Path, Tables], tmp_path: Path) -> Path:
    """A copy of that bench."""
    return Path(shutil.copytree(benched[0], tmp_path / "out"))


@pytest.fixture
def asked_for(benched: tuple[Path, Tables], monkeypatch: pytest.MonkeyPatch) -> list[RunKey]:
    """The runs that are asked for; instead of doing them, figures are made up."""
    template = {**read_results(benched[0] / "results.jsonl")[-1], "training_free": {}}
    keys: list[RunKey] = []

    def pretend(job: Any) -> dict[str, Any]:
        keys.append(job.key)
        made_up = random.Random(repr(job.key))
        return {**template, **vars(job.key), **{name: made_up.random() for name in COLUMNS}}

    monkeypatch.setattr(detection_module, "_run_job", pretend)
    return keys


def methods_of(out: Path) -> list[str]:
    return [one["method"] for one in read_results(out / "results.jsonl")]


def without_clock(result: dict[str, Any]) -> dict[str, Any]:
    clock = {"seconds", "seconds_per_epoch", "peak_memory", "threads"}
    epochs = [{name: value for name, value in row.items() if name not in clock} for row in result["epochs"]]
    return {**{name: value for name, value in result.items() if name not in clock}, "epochs": epochs}


class TestRuns:
    def test_one_row_a_run_with_every_figure(self, benched: tuple[Path, Tables]) -> None:
        out, _ = benched
        results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [one["method"] for one in results] == ["srem", "oracle", "infonce"]
        for one in results:
            assert (one["protocol"], one["rate"], one["seed"], one["device"]) == ("caption", 0.4, 0, "cpu")
            assert one["planted_noise"] == pytest.approx(0.4, abs=0.05)
            assert set(COLUMNS) <= set(one)
            for name, value in one.items():
                if isinstance(value, float):
                    most = 600 if "rsum" in name else 100 if "_to_" in name else math.inf if "seconds" in name else 1
                    assert 0 <= value <= most, name
            assert 200 < one["pairs"] < PAIRS
            assert one["noise_low"] <= one["estimated_noise"] <= one["noise_high"]
            for when in ("last", "best"):
                recalls = [value for name, value in one.items() if "_to_" in name and name.endswith(when)]
                assert len(recalls) == 6
                assert one[f"rsum_{when}"] == pytest.approx(sum(recalls))
            assert [row["epoch"] for row in one["epochs"]] == [0, 1]
            for row in one["epochs"]:
                assert np.isfinite(row["loss"])
                assert row["seconds"] > 0
                assert 0 <= row["validation_rsum"] <= 600
            watched = [row["auroc"] for row in one["epochs"]]
            assert all(0 < auroc < 1 for auroc in watched)
            # So few pairs are all watched.
            assert watched[-1] == pytest.approx(one["auroc"])
            assert one["auroc_fall"] == pytest.approx(max(watched) - watched[-1])
            filtered = one["method"] == "srem"
            assert ["filter_recall" in row for row in one["epochs"]] == [False, filtered]
            assert set(one["training_free"]) == (set(TRAINING_FREE) if one["method"] == "infonce" else set())
            for figures in one["training_free"].values():
                assert 0 <= figures["auroc"] <= 1

    def test_equal_keys_give_equal_figures(self, benched: tuple[Path, Tables], tmp_path: Path) -> None:
        """Elsewhere, in another order, and named by their shards."""
        out, _ = benched
        bench_detection(out / "corpus", out=tmp_path, methods=["infonce", "srem"], **ONCE)
        first = {one["method"]: one for one in read_results(out / "results.jsonl")}
        again = read_results(tmp_path / "results.jsonl")
        assert [one["method"] for one in again] == ["infonce", "srem"]
        for one in again:
            assert without_clock(one) == without_clock(first[one["method"]])

    def test_what_is_done_is_not_done_again(self, out: Path, asked_for: list[RunKey]) -> None:
        listener = Listener()
        before = (out / "results.jsonl").read_bytes()
        bench_detection(out=out, methods=["srem", "infonce"], progress=listener, **ONCE)
        assert asked_for == []
        assert "2 of 2 runs are done already" in listener.said
        assert (out / "results.jsonl").read_bytes() == before

    def test_a_wider_grid_runs_what_is_new(self, out: Path, asked_for: list[RunKey]) -> None:
        listener = Listener()
        bench_detection(out=out, methods=["srem", "vse", "vse"], progress=listener, **ONCE)
        assert asked_for == [RunKey("vse", "caption", 0.4, 0)]
        assert methods_of(out) == ["srem", "oracle", "infonce", "vse"]
        assert any(note is not None and note.startswith("vse at 40%, seed 0: AUROC 0.") for note in listener.notes)
        wider = {**ONCE, "rates": [0.2, 0.4], "seeds": [0, 1]}
        bench_detection(out=out, methods=["srem"], protocols=["caption", "hard"], **wider)
        assert len(asked_for) == len(set(asked_for)) == 1 + 7
        assert len(read_results(out / "results.jsonl")) == 4 + 7

    @pytest.mark.parametrize("cut", [1, 40])
    def test_a_line_that_was_cut_short_is_run_again(self, cut: int, out: Path, asked_for: list[RunKey]) -> None:
        path = out / "results.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        bench_detection(out=out, methods=["srem", "oracle", "infonce"], **ONCE)
        assert asked_for == [RunKey("infonce", "caption", 0.4, 0)]
        assert methods_of(out) == ["srem", "oracle", "infonce"]

    @pytest.mark.parametrize("garbage", ["{", "[1]", "3", '{"method": "srem"}'])
    def test_a_line_that_is_no_run_is_refused(self, garbage: str, out: Path, asked_for: list[RunKey]) -> None:
        path = out / "results.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], garbage, *lines[1:], ""]))
        with pytest.raises(UsageError, match="line 2 is no run") as caught:
            bench_detection(out=out, methods=["srem"], **ONCE)
        assert str(path) in str(caught.value)
        assert asked_for == []

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"overrides": [*TINY, "optimiser.learning_rate=0.1"]}, "another corpus or recipe"),
            ({"pairs": PAIRS + 1}, "an embedded corpus of 300 pairs, not 301"),
            ({"methods": ["srem", "magic"]}, "--methods magic: no such method; there are srem, oracle"),
            ({"methods": []}, "--methods: give at least one"),
            ({"protocols": ["captions"]}, "--protocol captions: no such protocol; there are caption, image"),
            ({"protocols": []}, "--protocol: give at least one"),
            ({"rates": [0.2, 1.0]}, "--noise 1.0: a share of the pairs"),
            ({"rates": [math.nan]}, "--noise nan: a share of the pairs"),
            ({"seeds": []}, "--seeds: give at least one"),
            ({"seeds": [0, -1]}, "seed: input should be greater"),
            ({"overrides": [*TINY, "optimiser.epoch=3"]}, "did you mean optimiser.epochs"),
            ({"recipe": "benhc"}, "did you mean bench"),
        ],
    )
    def test_what_makes_no_sense_is_refused(
        self, changed: dict[str, Any], message: str, out: Path, asked_for: list[RunKey]
    ) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            bench_detection(out=out, **{**ONCE, "methods": ["vse"], **changed})
        assert "\n" not in str(caught.value)
        assert asked_for == []

    def test_another_corpus_of_equal_shard_names_is_refused(self, out: Path, tmp_path: Path) -> None:
        nc.generate_corpus(tmp_path / "other", pairs=PAIRS, image_size=16, seed=1)
        with pytest.raises(UsageError, match="another corpus or recipe"):
            bench_detection(tmp_path / "other", out=out, methods=["srem"], **ONCE)

    @pytest.mark.parametrize("record", [None, "{", "[]"])
    def test_results_of_unknown_origin_are_refused(self, record: str | None, out: Path) -> None:
        (out / "bench.json").unlink()
        if record is not None:
            (out / "bench.json").write_text(record)
        with pytest.raises(UsageError, match="another folder with -o"):
            bench_detection(out=out, methods=["srem"], **ONCE)

    def test_without_noise_there_is_no_auroc(
        self, out: Path, asked_for: list[RunKey], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made_up = detection_module._run_job
        monkeypatch.setattr(detection_module, "_run_job", lambda job: {**made_up(job), "auroc": None})
        listener = Listener()
        tables = bench_detection(out=out, methods=["srem"], progress=listener, **{**ONCE, "rates": [0.0]})
        assert listener.notes[-1] == "srem at 0%, seed 0"
        assert tables.summary.set_index(["rate", "method"])["auroc"].isna()[0.0, "srem"]
        assert "| SREM | – |" in tables.markdown.read_text()


class TestTables:
    def test_they_are_the_results(self, benched: tuple[Path, Tables]) -> None:
        out, tables = benched
        assert [path.name for path in tables.figures] == ["auroc.svg", "filter.svg"]
        for path in tables.figures:
            assert path.read_text().lstrip().startswith("<?xml")
        summary = pd.read_parquet(tables.parquet)
        pd.testing.assert_frame_equal(summary, tables.summary)
        assert summary["method"].tolist() == ["srem", "oracle", "infonce", *TRAINING_FREE]
        rows = summary.set_index("method")
        for one in read_results(out / "results.jsonl"):
            for name in COLUMNS:
                value = rows.loc[one["method"], name]
                assert math.isnan(value) if one[name] is None else value == pytest.approx(one[name])
        assert (summary["runs"] == 1).all()
        markdown = tables.markdown.read_text()
        assert markdown.startswith("# embedded corpus, 300 pairs\n")
        assert "## 40% noise, protocol caption, 1 seed\n" in markdown
        assert f"| SREM | {rows.loc['srem', 'auroc']:.3f} |" in markdown
        assert "| CLIP score |" in markdown

    def test_means_and_deviations_over_seeds(self, out: Path, asked_for: list[RunKey]) -> None:
        grid: dict[str, Any] = {**ONCE, "seeds": [1, 2, 3], "rates": [0.2, 0.6]}
        tables = bench_detection(out=out, methods=["srem", "rince"], protocols=["hard", "image"], **grid)
        results = read_results(out / "results.jsonl")
        summary = tables.summary.set_index(["protocol", "rate", "method"])
        assert tables.summary["protocol"].tolist() == sorted(tables.summary["protocol"])
        for protocol in ("hard", "image"):
            for rate in (0.2, 0.6):
                for method in ("srem", "rince"):
                    row = summary.loc[(protocol, rate, method)]
                    cell = (method, protocol, rate)
                    runs = [one for one in results if (one["method"], one["protocol"], one["rate"]) == cell]
                    assert row["runs"] == len(runs) == 3
                    for name in COLUMNS:
                        values = [one[name] for one in runs]
                        assert row[name] == pytest.approx(statistics.mean(values))
                        assert row[f"{name}_sd"] == pytest.approx(statistics.stdev(values))
        for name in ("auroc", "recall_5", "rsum_last"):
            by_seed = {
                (one["method"], one["seed"]): one[name]
                for one in results
                if (one["protocol"], one["rate"]) == ("image", 0.2)
            }
            leads = [by_seed["srem", seed] - by_seed["rince", seed] for seed in (1, 2, 3)]
            row = summary.loc[("image", 0.2, "rince")]
            assert row[f"{name}_lead"] == pytest.approx(statistics.mean(leads))
            assert row[f"{name}_lead_sd"] == pytest.approx(statistics.stdev(leads))
            assert math.isnan(summary.loc[("image", 0.2, "srem"), f"{name}_lead"])
        values = [
            one["f1"] for one in results if (one["method"], one["protocol"], one["rate"]) == ("rince", "hard", 0.6)
        ]
        (line,) = [
            line
            for part in tables.markdown.read_text().split("\n## ")
            if part.startswith("60% noise, protocol hard, 3 seeds")
            for line in part.partition("SREM's lead")[0].splitlines()
            if line.startswith("| RINCE |")
        ]
        assert line.split("|")[5].strip() == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


class Stopped(Exception):
    """Enough was seen of a run."""


class TestFairness:
    @pytest.mark.parametrize("method", ["oracle", "srem", "infonce", "ncr-co"])
    def test_nobody_but_the_oracle_is_told_the_truth(
        self, method: str, corpora: dict[str, BenchCorpus], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepared = corpora["embedded"]
        made: list[tuple[CrossFit, tuple[Any, ...], dict[str, Any]]] = []

        def watched(*given: Any, **named: Any) -> CrossFit:
            made.append((CrossFit(*given, **named), given, named))
            raise Stopped

        monkeypatch.setattr(run_module, "CrossFit", watched)
        key = RunKey(method, "caption", 0.4, 3)
        recipe = method_recipe("bench", LONGER, key)
        with pytest.raises(Stopped):
            run_module.run(prepared, recipe, key, CPU)
        ((crossfit, given, named),) = made
        planted = prepared.plant("caption", 0.4, 3)
        assert [type(one).__name__ for one in given] == ["Recipe", "MemorySource", "device"]
        assert set(vars(given[1])) == set(vars(prepared.source))  # the pairs and nothing beside them
        assert set(named) == {"rows", "trainable", "progress"}
        np.testing.assert_array_equal(named["rows"], planted.rows)
        trained = np.unique(np.concatenate([rows for rows, _ in crossfit.weights]))
        # Whoever trains on what, all pairs are scored.
        assert sorted(np.concatenate(crossfit.judged)) == sorted(planted.rows)
        if method == "oracle":
            assert planted.matched[trained].all()
            assert len(trained) > 0.9 * planted.matched[planted.rows].sum()
        else:
            assert named["trainable"] is None
            assert 0.3 < np.mean(~planted.matched[trained]) < 0.5

    def test_crossfit_cannot_be_given_a_truth(self) -> None:
        parameters = set(inspect.signature(CrossFit.__init__).parameters)
        assert parameters == {
            "self",
            "recipe",
            "source",
            "device",
            "rows",
            "trainable",
            "encoders",
            "progress",
            "world",
        }

    def test_methods_differ_in_their_objective_only(self) -> None:
        recipes = {name: method_recipe("bench", LONGER, RunKey(name, "caption", 0.4, 5)) for name in METHODS}
        for recipe in recipes.values():
            assert recipe.model_copy(update={"objective": recipes["srem"].objective}) == recipes["srem"]
            assert recipe.seed == 5
        assert {recipe.objective.name for recipe in recipes.values()} == set(OBJECTIVES)
        assert recipes["infonce"] == recipes["oracle"]

    def test_a_base_recipe_of_another_objective_makes_the_same_methods(self) -> None:
        for name in METHODS:
            key = RunKey(name, "caption", 0.4, 0)
            changed = method_recipe("bench", ["objective.name=rince"], key)
            assert changed.objective.name == method_recipe("bench", [], key).objective.name


def open_corpus(shards: Path) -> BenchCorpus:
    return BenchCorpus(find_shards(shards), create_encoder("pico").preprocessor, workers=1)


@pytest.fixture(scope="module")
def corpora(benched: tuple[Path, Tables], tmp_path_factory: pytest.TempPathFactory) -> dict[str, BenchCorpus]:
    """The embedded one, of which some pairs are wrong from the start, and one with four captions an image."""
    captioned = tmp_path_factory.mktemp("captioned")
    for shard in range(2):
        samples = {
            f"{shard}{image:02d}{caption}": {
                "png": encode_noise(100 * shard + image),
                "txt": f"{caption} {('cat', 'dog', 'cow')[image % 3]}s of kind {shard} and {image}".encode(),
            }
            for image in range(40)
            for caption in range(4)
        }
        write_tar(captioned / f"0000{shard}.tar", samples)
    return {"embedded": open_corpus(benched[0] / "corpus"), "captioned": open_corpus(captioned)}


@pytest.fixture(params=["embedded", "captioned"])
def corpus(request: pytest.FixtureRequest, corpora: dict[str, BenchCorpus]) -> BenchCorpus:
    return corpora[request.param]


def everything(source: PairSource) -> Batch:
    (batch,) = source.batches(np.flatnonzero(source.index.usable), 10_000)
    return batch


class TestCorpus:
    def test_what_is_kept_for_retrieval(self, corpus: BenchCorpus) -> None:
        index = corpus.source.index
        images = [
            set(index.image[rows]) for rows in (corpus.test, corpus.validation, corpus.plant("caption", 0, 0).rows)
        ]
        assert all(images)
        assert sum(map(len, images)) == len(set(index.image[index.usable]))  # all captions of an image together
        true = len(set(index.image[index.usable & corpus.plant("caption", 0, 0).matched]))
        assert [len(one) for one in images[:2]] == [int(0.1 * true), int(0.03 * true)]
        matched = corpus.plant("caption", 0.8, 4).matched
        assert matched[corpus.test].all()
        assert matched[corpus.validation].all()

    def test_it_is_the_same_for_every_seed_and_opening(
        self, corpora: dict[str, BenchCorpus], benched: tuple[Path, Tables]
    ) -> None:
        corpus = corpora["embedded"]
        again = open_corpus(benched[0] / "corpus")
        np.testing.assert_array_equal(again.test, corpus.test)
        np.testing.assert_array_equal(again.validation, corpus.validation)
        assert again.fingerprint() == corpus.fingerprint()
        plantings = [corpus.plant("caption", 0.4, seed) for seed in (0, 1, 0)]
        for one in plantings:
            np.testing.assert_array_equal(one.rows, plantings[0].rows)
        assert (plantings[0].matched != plantings[1].matched).any()
        np.testing.assert_array_equal(plantings[0].matched, plantings[2].matched)
        assert plantings[0].source.index.fingerprint() == plantings[2].source.index.fingerprint()

    def test_pairs_that_the_truth_calls_wrong_stay_so(
        self, corpora: dict[str, BenchCorpus], benched: tuple[Path, Tables]
    ) -> None:
        kind = pd.read_parquet(benched[0] / "corpus" / "truth.parquet")["kind"].to_numpy()
        true = np.isin(kind, ["match", "near_duplicate"])
        assert 0 < np.sum(~true) < 50
        plain = corpora["embedded"].plant("caption", 0.0, 0)
        np.testing.assert_array_equal(plain.matched, true)
        np.testing.assert_array_equal(plain.headline, true)
        hard = corpora["embedded"].plant("hard", 0.2, 0)
        assert not hard.matched[~true].any()
        np.testing.assert_array_equal(hard.headline, true)
        silent = corpora["embedded"].plant("uninformative", 0.2, 0)
        np.testing.assert_array_equal(silent.headline, true | (kind == "uninformative"))

    @pytest.mark.parametrize("rate", [0.0, 0.25, 0.8])
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_so_many_are_wrong_and_no_others(self, protocol: NoiseProtocol, rate: float, corpus: BenchCorpus) -> None:
        index = corpus.source.index
        before = index.caption.copy(), index.image.copy()
        true = corpus.plant(protocol, 0.0, 0).matched
        planted = corpus.plant(protocol, rate, 7)
        wrong = np.flatnonzero(true & ~planted.matched)
        assert set(wrong) <= set(planted.rows)
        # Images are passed on with all their captions.
        assert abs(len(wrong) - rate * len(planted.rows)) <= (3.5 if protocol == "image" else 0.5)
        if len(set(index.image)) == len(index):
            assert len(wrong) == round(rate * len(planted.rows))
        known = set(zip(index.image[index.usable], index.caption[index.usable], strict=True))
        now = planted.source.index
        assert not known & set(zip(now.image[wrong], now.caption[wrong], strict=True))
        same = np.setdiff1d(np.arange(len(index)), wrong)
        for array, changed in ((index.caption, now.caption), (index.image, now.image)):
            np.testing.assert_array_equal(array[same], changed[same])
        # What is planted is planted in a copy.
        np.testing.assert_array_equal(before[0], index.caption)
        np.testing.assert_array_equal(before[1], index.image)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_batches_hold_what_was_planted(
        self, protocol: NoiseProtocol, corpus: BenchCorpus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written: dict[int, str] = {}

        write = donors.uninformative_captions

        def remembered(*given: Any) -> list[str]:
            captions = write(*given)
            written.update((caption_id(one), one) for one in captions)
            return captions

        monkeypatch.setattr(donors, "uninformative_captions", remembered)
        planted = corpus.plant(protocol, 0.4, 2)
        true = corpus.plant(protocol, 0.0, 2).matched
        old, new = corpus.source.index, planted.source.index
        before, after = everything(corpus.source), everything(planted.source)
        assert torch.equal(before.rows, after.rows)
        place = {row: at for at, row in enumerate(before.rows.tolist())}
        tokens_of = dict(zip(old.caption[before.rows.numpy()].tolist(), before.tokens, strict=True))
        pixels_of = dict(zip(old.image[before.rows.numpy()].tolist(), before.pixels, strict=True))
        preprocessor = create_encoder("pico").preprocessor
        changed = 0
        for row, at in place.items():
            wrong = bool(true[row] and not planted.matched[row])
            changed += wrong
            assert torch.equal(after.pixels[at], pixels_of[int(new.image[row])])
            assert (new.image[row] != old.image[row]) == (wrong and protocol == "image")
            assert (new.caption[row] != old.caption[row]) == (wrong and protocol != "image")
            if wrong and protocol == "uninformative":
                assert torch.equal(after.tokens[at].long(), preprocessor.tokens([written[int(new.caption[row])]])[0])
            else:
                assert torch.equal(after.tokens[at], tokens_of[int(new.caption[row])])
        assert changed > 50
        # Read-only of what the corpus holds: the next run finds it as it was.
        untouched = everything(corpus.source)
        assert torch.equal(untouched.pixels, before.pixels)
        assert torch.equal(untouched.tokens, before.tokens)

    def test_a_caption_that_says_nothing_is_new_to_its_image(self, tmp_path: Path) -> None:
        """Where true captions are of that kind, no pair is made wrong by giving it its own."""
        captions = donors.uninformative_captions(210, np.random.default_rng(3))
        write_tar(
            tmp_path / "0.tar",
            {f"{i:03d}": {"png": encode_noise(i), "txt": one.encode()} for i, one in enumerate(captions)},
        )
        corpus = open_corpus(tmp_path)
        known = set(zip(corpus.source.index.image, corpus.source.index.caption, strict=True))
        for seed in range(10):
            planted = corpus.plant("uninformative", 0.9, seed)
            wrong, index = ~planted.matched, planted.source.index
            assert not known & set(zip(index.image[wrong], index.caption[wrong], strict=True))

    def test_too_little_is_refused(self, tmp_path: Path) -> None:
        def write(name: str, pairs: int, images: int) -> Path:
            samples = {
                f"{i:03d}": {"png": encode_noise(i % images), "txt": f"number {i}".encode()} for i in range(pairs)
            }
            write_tar(tmp_path / name / "0.tar", samples)
            return tmp_path / name

        with pytest.raises(NoisycleanError, match=r"30 readable pairs in .*; a bench needs 200"):
            open_corpus(write("few", 30, 30))
        with pytest.raises(NoisycleanError, match="20 different pictures in"):
            open_corpus(write("same", 200, 20))


def judged_pairs(
    rows: NDArray[np.int64], scores: NDArray[Any], null: NDArray[Any], bank: int, **statistics: Any
) -> Judged:
    values = {name: np.zeros(len(rows)) for name in STATISTICS} | {"match_score": scores} | statistics
    found = PairStatistics(**{name: torch.from_numpy(value).float() for name, value in values.items()})
    # Its pairs are more alike than those that are judged: the similarities, all 0, have no say in the noise rate.
    reference = ReferenceBank(
        np.arange(bank), *torch.ones(2, bank, 2), 0.1, null.astype(np.float32), np.ones(1, np.float32)
    )
    return Judged(rows, found, reference, reference.p_values(found.match_score.numpy()))


def planted_pairs(matched: NDArray[np.bool_], headline: NDArray[np.bool_] | None = None) -> PlantedCorpus:
    everyone = np.ones(len(matched), np.bool_) if headline is None else headline
    return PlantedCorpus(None, np.arange(len(matched)), matched, everyone)  # type: ignore[arg-type]


class TestFigures:
    def test_counted_by_hand(self) -> None:
        null = np.linspace(-1, 1, 999)
        # Two folds; rows 0–7 score above the whole null, two of the rest as random pairs do, and one does not count.
        first = judged_pairs(np.array([3, 1, 8, 0, 2]), np.array([5.0, 7.0, -0.6, 8.0, 6.0]), null, 20)
        second = judged_pairs(np.array([9, 4, 10, 5, 6, 7]), np.array([-0.8, 4.0, 9.0, 3.0, 2.0, 1.5]), null, 20)
        matched = np.array([False] + [True] * 7 + [False] * 3)
        headline = np.array([True] * 10 + [False])
        found = run_module._detection_figures([first, second], planted_pairs(matched, headline))
        assert found["pairs"] == 11
        assert found["planted_noise"] == pytest.approx(3 / 10)
        assert found["estimated_noise"] == pytest.approx(2 * 2 / 11)
        for asked in ("1", "5", "10"):
            assert found[f"realised_{asked}"] == pytest.approx(1 / 8)
            assert found[f"recall_{asked}"] == 1.0
        assert found["f1"] == pytest.approx(2 * 7 / (8 + 7))
        assert found["noisy_precision"] == 1.0
        assert found["noisy_recall"] == pytest.approx(2 / 3)
        assert found["auroc"] == pytest.approx(14 / 21)  # row 0 is above all seven true pairs
        assert found["average_precision"] == pytest.approx((1 + 1 + 3 / 10) / 3)

    def test_they_are_those_of_evaluate(self, tmp_path: Path) -> None:
        """Of the same scores written as a manifest, two folds with nulls of their own."""
        random = np.random.default_rng(0)
        judged, p, columns = [], [], []
        matched, score, _ = simulate_scores(1200, 0.4, 0, separation=2.5)
        kind = np.where(matched, "match", "random")
        kind[::17] = "hard"
        matched = matched & (kind == "match")
        others = {name: random.normal(size=1200) for name in STATISTICS if name != "match_score"}
        for fold in range(2):
            rows = random.permutation(np.arange(fold, 1200, 2))
            null = np.sort(random.normal(size=3000)).astype(np.float32)
            judged.append(judged_pairs(rows, score[rows], null, 150, **{n: one[rows] for n, one in others.items()}))
            p.append(p_values(score[rows].astype(np.float32), null))
            columns.append(rows)
        rows = np.concatenate(columns)
        given = {
            "p_value": np.concatenate(p),
            "match_score": score[rows],
            **{n: one[rows] for n, one in others.items()},
        }
        write_scores(tmp_path, {"s": given}, null_pairs=300)
        truth = pd.DataFrame(
            {"shard": "s", "key": [f"{i:05d}" for i in range(1200)], "matched": matched[rows], "kind": kind[rows]}
        )
        truth.to_parquet(tmp_path / "truth.parquet")
        found = run_module._detection_figures(judged, planted_pairs(matched, kind != "hard"))
        for asked in (0.01, 0.05, 0.1):
            split(tmp_path, fdr=asked)
            expected = evaluate(tmp_path, truth=tmp_path / "truth.parquet")
            assert found[f"realised_{asked * 100:g}"] == pytest.approx(expected.clean.realised_noise)
            assert found[f"recall_{asked * 100:g}"] == pytest.approx(expected.clean.recall)
            if asked == 0.05:
                assert found["f1"] == pytest.approx(expected.f1)
                assert found["noisy_precision"] == pytest.approx(expected.noisy.precision)
                assert found["noisy_recall"] == pytest.approx(expected.noisy.recall)
        assert found["auroc"] == pytest.approx(expected.auroc)
        assert found["average_precision"] == pytest.approx(expected.average_precision)
        assert found["planted_noise"] == pytest.approx(expected.planted_noise)
        assert found["estimated_noise"] == pytest.approx(expected.estimated_noise)
        assert (found["noise_low"], found["noise_high"]) == pytest.approx(expected.noise_interval)

    def test_nothing_clean_and_nothing_wrong(self) -> None:
        null = np.linspace(-1, 1, 99)
        lost = judged_pairs(np.arange(20), np.full(20, -2.0), null, 20)
        found = run_module._detection_figures([lost], planted_pairs(np.arange(20) % 2 == 0))
        assert (found["realised_5"], found["recall_5"], found["f1"]) == (None, 0.0, 0.0)
        assert found["noisy_recall"] == 1.0
        sure = judged_pairs(np.arange(20), np.full(20, 2.0), null, 20)
        found = run_module._detection_figures([sure], planted_pairs(np.ones(20, np.bool_)))
        assert (found["auroc"], found["average_precision"], found["noisy_recall"]) == (None, None, None)
        assert (found["realised_5"], found["f1"], found["planted_noise"]) == (0.0, 1.0, 0.0)
        assert json.loads(json.dumps(found)) == found

    def test_the_filter_is_held_to_the_pairs_that_it_weighs(self) -> None:
        class Weighed:
            weights = (
                (np.array([0, 1, 2, 3]), torch.tensor([1.0, 0.5, 0.5, 0.0, 9.0])),
                (np.array([1, 4]), torch.tensor([9.0, 0.25, 9.0, 9.0, 0.75])),
            )

        planted = planted_pairs(np.array([True, True, False, False, False]))
        found = run_module._filter_figures(Weighed(), planted)  # type: ignore[arg-type]
        assert found["filter_precision"] == pytest.approx((1.5 / 2 + 0.25 / 1) / 2)
        assert found["filter_recall"] == pytest.approx((1.5 / 2 + 0.25 / 1) / 2)
        Weighed.weights = ((np.array([0]), None),)  # type: ignore[assignment]
        assert run_module._filter_figures(Weighed(), planted) == {}  # type: ignore[arg-type]
