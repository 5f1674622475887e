"""Labels of a sample: the draw is random, the intervals cover, and what is certified holds as often as it says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import simulate_scores, write_scores
from numpy.typing import NDArray
from scipy.stats import beta, binom

from noisyclean.cli import main
from noisyclean.errors import UsageError
from noisyclean.evaluation.labelling import (
    STRATA,
    Counts,
    calibrate,
    certify,
    draw_sample,
    labels_needed,
    stratified_rate,
    upper_bound,
)
from noisyclean.manifest.splitting import split

ROWS = 1500
SHARDS = ("00000", "lang=en/00001", "00002")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """OUT of 4,500 pairs at 40 % noise, 45 of them unreadable, and its rows with the truth in ``matched``."""
    out = tmp_path_factory.mktemp("labelling") / "out"
    parts, truth = {}, []
    for seed, shard in enumerate(SHARDS):
        matched, score, p = simulate_scores(ROWS, 0.4, seed, separation=3.0)
        fault = [None if i % 100 else "truncated PNG" for i in range(ROWS)]
        captions = [f'a "{i}",\n two lines' for i in range(ROWS)]
        parts[shard] = {"p_value": p, "match_score": score, "fault": fault, "caption": captions}
        truth.append(pd.DataFrame({"shard": shard, "key": [f"{i:05d}" for i in range(ROWS)], "matched": matched}))
    write_scores(out, parts)
    split(out)
    rows = pd.read_parquet(out / "manifest").astype({"split": str}).merge(pd.concat(truth), on=["shard", "key"])
    return out, rows[rows["split"] != "unreadable"]


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"shard": str, "key": str})


@pytest.fixture
def labelled(scored: tuple[Path, pd.DataFrame], tmp_path: Path) -> Callable[..., Path]:
    """A sample with the truth filled in, in the first ``rows`` of it; other columns as given."""

    def make(name: str = "labels.csv", *, pairs: int = 200, rows: int | None = None, **columns: Any) -> Path:
        out, truth = scored
        draw_sample(out, sample=tmp_path / "drawn.csv", pairs=pairs)
        table = read_csv(tmp_path / "drawn.csv").drop(columns="matched")
        (tmp_path / "drawn.csv").unlink()
        table = table.merge(truth[["shard", "key", "matched"]], how="left", on=["shard", "key"], validate="1:1")
        table = table.head(rows).assign(**columns) if rows else table.assign(**columns)
        path = tmp_path / name
        if path.suffix == ".csv":
            table.to_csv(path, index=False)
        elif path.suffix == ".jsonl":
            table.to_json(path, orient="records", lines=True)
        else:
            table.to_parquet(path)
        return path

    return make


class TestDraw:
    @pytest.mark.parametrize("name", ["sample.csv", "sample.parquet"])
    def test_rows_are_those_of_the_manifest_without_the_truth(
        self, scored: tuple[Path, pd.DataFrame], tmp_path: Path, name: str
    ) -> None:
        out, rows = scored
        path = tmp_path / name
        assert draw_sample(out, sample=path, pairs=50) == dict.fromkeys(STRATA, 50)
        sample = read_csv(path) if name.endswith("csv") else pd.read_parquet(path)
        columns = ["split", "shard", "key", "index", "caption", "url", "match_score", "rank"]
        assert list(sample) == [*columns, "matched"]
        assert sample["matched"].isna().all()
        joined = sample.merge(rows, on=["shard", "key"], validate="1:1", suffixes=("", "_there"))
        assert len(joined) == 150
        if path.suffix == ".csv":  # is opened in spreadsheets, and read line by line
            joined["caption_there"] = joined["caption_there"].str.replace(r"[\r\n]+", " ", regex=True)
            assert not joined["caption"].str.contains(r"[\r\n]").any()
        for column in ("split", "index", "caption", "rank"):
            assert (joined[column] == joined[f"{column}_there"]).all(), column
        np.testing.assert_allclose(joined["match_score"], joined["match_score_there"], rtol=1e-6)

    def test_same_seed_same_sample_and_the_larger_holds_the_smaller(
        self, scored: tuple[Path, pd.DataFrame], tmp_path: Path
    ) -> None:
        out, _ = scored
        for name, pairs, seed in (("a", 40, 0), ("b", 40, 0), ("c", 90, 0), ("d", 40, 1)):
            draw_sample(out, sample=tmp_path / f"{name}.csv", pairs=pairs, seed=seed)
        a, b, c = ((tmp_path / f"{name}.csv").read_text() for name in "abc")
        assert a == b
        assert c.startswith(a)
        of_seed_0, of_seed_1 = (set(read_csv(tmp_path / f"{name}.csv")["rank"]) for name in "ad")
        assert len(of_seed_0 & of_seed_1) < 30

    def test_any_beginning_holds_as_many_of_each_split(self, scored: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
        draw_sample(scored[0], sample=tmp_path / "a.csv", pairs=30)
        first = read_csv(tmp_path / "a.csv").head(33)
        assert first["split"].value_counts().to_dict() == dict.fromkeys(STRATA, 11)

    def test_every_pair_is_as_likely(self, scored: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
        out, rows = scored
        clean = rows[rows["split"] == "clean"]
        drawn = []
        for seed in range(30):
            draw_sample(out, sample=tmp_path / f"{seed}.parquet", pairs=100, seed=seed)
            sample = pd.read_parquet(tmp_path / f"{seed}.parquet", columns=["split", "shard", "key"])
            drawn.append(sample[sample["split"] == "clean"])
        times = (
            pd.concat(drawn).value_counts(["shard", "key"]).reindex(pd.MultiIndex.from_frame(clean[["shard", "key"]]))
        )
        times = times.fillna(0).to_numpy()
        # Draws of 100 of n without replacement: how often a pair is drawn in 30 is binomial.
        expected = binom(30, 100 / len(clean))
        assert times.var() == pytest.approx(expected.var(), rel=0.1)
        assert (times == 0).mean() == pytest.approx(expected.pmf(0), abs=0.03)
        ranks = clean["rank"].to_numpy()
        assert np.corrcoef(times, ranks)[0, 1] == pytest.approx(0, abs=3.5 / np.sqrt(len(clean)))

    def test_small_splits_are_taken_whole(self, tmp_path: Path) -> None:
        write_scores(tmp_path / "out", {"s": {"p_value": np.linspace(0.05, 0.95, 10)}})
        split(tmp_path / "out", keep=0.4)
        drawn = draw_sample(tmp_path / "out", sample=tmp_path / "a.csv", pairs=7)
        assert drawn["clean"] == 4
        assert sum(drawn.values()) == len(read_csv(tmp_path / "a.csv")) <= 10

    def test_files_that_are_there_stay(self, scored: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
        (tmp_path / "labels.csv").write_text("hours of work")
        with pytest.raises(UsageError, match=r"labels\.csv: is there already, perhaps with labels in it"):
            draw_sample(scored[0], sample=tmp_path / "labels.csv", pairs=5)
        assert (tmp_path / "labels.csv").read_text() == "hours of work"
        with pytest.raises(UsageError, match=r"as \.csv or \.parquet"):
            draw_sample(scored[0], sample=tmp_path / "labels.xlsx", pairs=5)

    def test_labels_are_taken_over_into_a_larger_sample(
        self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path], tmp_path: Path
    ) -> None:
        out, truth = scored
        known = labelled(pairs=20, rows=50)
        draw_sample(out, sample=tmp_path / "more.csv", pairs=40, labels=known)
        more = read_csv(tmp_path / "more.csv")
        assert len(more) == 120
        assert more["matched"].notna().tolist() == [True] * 50 + [False] * 70
        joined = more.head(50).merge(truth, on=["shard", "key"])
        assert (joined["matched_x"].astype(bool) == joined["matched_y"]).all()
        with pytest.raises(UsageError, match="not among the sample of 10 a split that seed 0 draws"):
            draw_sample(out, sample=tmp_path / "less.csv", pairs=10, labels=known)
        assert not (tmp_path / "less.csv").exists()


class TestFigures:
    def test_counts_rates_and_intervals(self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path]) -> None:
        out, rows = scored
        path = labelled()
        found = calibrate(out, labels=path)
        sample = read_csv(path)
        weights, rates = [], []
        for name in STRATA:
            matched = sample.loc[sample["split"] == name, "matched"]
            figures = found.splits[name]
            assert (figures.labelled, figures.matched) == (200, matched.sum())
            assert figures.pairs == (rows["split"] == name).sum()
            assert figures.precision == matched.mean()
            # Clopper and Pearson: the rates at which so few, or so many, have a probability of 2.5 %.
            assert figures.interval is not None
            low, high = figures.interval
            assert binom.sf(figures.matched - 1, 200, low) == pytest.approx(0.025 if figures.matched else 1)
            assert binom.cdf(figures.matched, 200, high) == pytest.approx(0.025 if figures.matched < 200 else 1)
            weights.append(figures.pairs / len(rows))
            rates.append(1 - matched.mean())
        assert found.mismatch_rate == pytest.approx(np.dot(weights, rates))
        assert found.mismatch_interval is not None
        assert found.mismatch_interval[0] < 1 - rows["matched"].mean() < found.mismatch_interval[1]
        summary = json.loads((out / "summary.json").read_text())
        assert found.estimated_noise == summary["estimated_noise"]
        assert (found.target_fdr, found.clean_as_asked) == (0.05, True)

    @pytest.mark.parametrize(("wrong", "allowed"), [(14, True), (24, False)])
    def test_whether_clean_is_as_asked(
        self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path], wrong: int, allowed: bool
    ) -> None:
        """Of 200 labels, 7 % mismatches may be chance at 5 %; 12 % are not."""
        path = labelled()
        table = read_csv(path)
        clean = table.index[table["split"] == "clean"]
        table.loc[clean, "matched"] = np.arange(200) >= wrong
        table.to_csv(path, index=False)
        assert calibrate(scored[0], labels=path).clean_as_asked is allowed

    def test_the_cutoff_is_what_split_keeps(
        self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path], tmp_path: Path
    ) -> None:
        out, rows = scored
        path = labelled()
        found = calibrate(out, labels=path, target=0.08)
        assert found.cutoff is not None
        assert found.labels_needed is None
        kept = rows["rank"] <= found.cutoff.rank
        assert 0.5 < kept.mean() < 0.7
        assert (~rows["matched"][kept]).mean() <= found.cutoff.at_most <= 0.08
        # The bound, by hand.
        sample = read_csv(path).query("rank <= @found.cutoff.rank")
        bound = 0.0
        for name in STRATA:
            share = (rows["split"][kept] == name).mean()
            matched = sample.loc[sample["split"] == name, "matched"]
            if share:
                bound += share * beta.ppf(1 - 0.05 * share, (~matched).sum() + 1, matched.sum())
        assert found.cutoff.at_most == pytest.approx(bound)
        shutil.copytree(out, tmp_path / "copy")
        assert split(tmp_path / "copy", keep=found.cutoff.keep).clean == found.cutoff.rank
        with pytest.raises(UsageError, match="now in another split than when the sample was drawn"):
            calibrate(tmp_path / "copy", labels=path)

    def test_too_few_labels_say_how_many_would_do(
        self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path]
    ) -> None:
        found = calibrate(scored[0], labels=labelled(rows=60), target=0.05)
        assert found.cutoff is None
        assert found.labels_needed is not None
        assert 60 < found.labels_needed < 400
        hopeless = calibrate(scored[0], labels=labelled(matched=False), target=0.05)
        assert (hopeless.cutoff, hopeless.labels_needed) == (None, None)

    def test_a_split_without_labels(self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path]) -> None:
        path = labelled()
        read_csv(path).query("split != 'noisy'").to_csv(path, index=False)
        found = calibrate(scored[0], labels=path, target=0.08)
        assert (found.mismatch_rate, found.mismatch_interval) == (None, None)
        assert (found.splits["noisy"].precision, found.splits["noisy"].interval) == (None, None)
        assert found.cutoff is not None


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("labels.csv", ("TRUE", "false")),
            ("labels.csv", ("Yes", "no ")),
            ("labels.csv", (1.0, 0.0)),
            ("labels.parquet", (True, False)),
            ("labels.parquet", (1, 0)),
            ("labels.jsonl", (True, False)),
            ("labels.jsonl", ("1", "0")),
        ],
    )
    def test_formats_and_words(
        self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path], name: str, words: tuple[Any, Any]
    ) -> None:
        plain = calibrate(scored[0], labels=labelled())
        spelt = read_csv(labelled())["matched"].map({True: words[0], False: words[1]})
        assert calibrate(scored[0], labels=labelled(name, matched=spelt)) == plain

    @pytest.mark.parametrize("name", ["labels.csv", "labels.parquet", "labels.jsonl"])
    def test_empty_is_not_labelled(
        self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path], name: str
    ) -> None:
        matched = read_csv(labelled())["matched"].astype("boolean")
        matched[90:] = pd.NA
        found = calibrate(scored[0], labels=labelled(name, matched=matched))
        assert [one.labelled for one in found.splits.values()] == [30, 30, 30]

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"matched": None}, "no pair is labelled"),
            ({"matched": "maybe"}, r"00\w+ and 11 more: matched is 'maybe'; write true, false or nothing"),
            ({"key": "9"}, "9 and 11 more: labelled more than once"),
            (
                {"key": [f"{i}" for i in range(12)]},
                r"/0 and 11 more: labelled, but not among the readable pairs .*zeros",
            ),
            ({"shard": "9"}, "labelled, but not among the readable pairs"),
            ({"split": "noisy"}, "and 7 more: now in another split than when the sample was drawn"),
        ],
    )
    def test_labels_that_do_not_fit(
        self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path], columns: dict[str, Any], message: str
    ) -> None:
        path = labelled(rows=12, **columns)
        with pytest.raises(UsageError, match=message) as error:
            calibrate(scored[0], labels=path)
        assert str(error.value).startswith(str(path))

    def test_labels_of_unreadable_samples(self, scored: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
        (tmp_path / "labels.csv").write_text("shard,key,matched\n00000,00100,yes\n")
        with pytest.raises(UsageError, match="00000/00100: labelled, but not among the readable pairs"):
            calibrate(scored[0], labels=tmp_path / "labels.csv")

    def test_a_key_that_two_rows_have(self, tmp_path: Path) -> None:
        write_scores(tmp_path / "out", {"s": {"p_value": [0.1, 0.2], "key": ["a", "a"]}})
        split(tmp_path / "out")
        (tmp_path / "labels.csv").write_text("shard,key,matched\ns,a,yes\n")
        with pytest.raises(UsageError, match="s/a: there more than once"):
            calibrate(tmp_path / "out", labels=tmp_path / "labels.csv")

    @pytest.mark.parametrize("name", ["labels.csv", "labels.parquet", "labels.jsonl"])
    def test_files_that_are_no_labels(self, scored: tuple[Path, pd.DataFrame], tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        with pytest.raises(UsageError, match="cannot read the labels"):
            calibrate(scored[0], labels=path)
        path.write_bytes(b"\xff\x00{")
        with pytest.raises(UsageError, match=name):
            calibrate(scored[0], labels=path)
        (tmp_path / "other.csv").write_text("shard,key\ns,a\n")
        with pytest.raises(UsageError, match="no column matched"):
            calibrate(scored[0], labels=tmp_path / "other.csv")

    @pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl"])
    def test_what_editors_of_other_systems_write(
        self, scored: tuple[Path, pd.DataFrame], labelled: Callable[..., Path], name: str
    ) -> None:
        path = labelled(name)
        plain = calibrate(scored[0], labels=path)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert calibrate(scored[0], labels=path) == plain

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "", "cannot read the labels"),
            ("a.csv", "shard,key,matched\n", "no pair is labelled"),
            ("a.csv", "shard;key;matched\ns;a;yes\n", "no column shard; .*with commas"),
            ("a.csv", "shard,key,matched,matched\ns,a,yes,no\n", "several columns matched; keep one"),
            ("a.csv", "shard,key,matched\ns,a,yes,b\n", r"cannot read the labels .*line 2, saw 4"),
            ("a.csv", "shard,key,matched\ns,,yes\n", "s/: key is missing or no text"),
            ("a.jsonl", "", "no pair is labelled"),
            ("a.jsonl", '{"shard": "s", "key": "a", "matched": true}\n[1]\n', "line 2 is no JSON object"),
            ("a.jsonl", '{"shard": "s", "key": "a", "matched": true}\n{"shard', "line 2 is no JSON object"),
            ("a.jsonl", '{"shard": "s", "key": ["a"], "matched": true}', r"s/\['a'\]: key is missing or no text"),
            ("a.jsonl", '{"shard": null, "key": "a", "matched": true}', "None/a: shard is missing or no text"),
            ("a.jsonl", '{"shard": "s", "key": "a", "matched": [true, false]}', r"s/a: matched is '\[true, false\]'"),
            ("a.jsonl", '{"shard": "s", "key": "a", "matched": {}}', "s/a: matched is '{}'; write true"),
            ("a.jsonl", '{"shard": "s", "key": "a", "matched": true, "split": {}}', "s/a: split is missing or no text"),
            ("a.jsonl", '{"shard": "s", "key": 12, "matched": true}', "s/12: labelled, but not among"),
        ],
    )
    def test_broken_rows(
        self, scored: tuple[Path, pd.DataFrame], tmp_path: Path, name: str, text: str, message: str
    ) -> None:
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(UsageError, match=message) as error:
            calibrate(scored[0], labels=path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"key": [["a"], ["b"]]}, r"s/\['a'\] and 1 more: key is missing or no text"),
            ({"shard": [b"s", b"s"]}, "b's'/a and 1 more: shard is missing or no text"),
            ({"matched": [[True], []]}, r"s/a and 1 more: matched is '\[true\]'"),
            ({"matched": [{"by": "me"}, None]}, "s/a: matched is "),
        ],
    )
    def test_nested_columns(
        self, scored: tuple[Path, pd.DataFrame], tmp_path: Path, columns: dict[str, Any], message: str
    ) -> None:
        table = pa.table({"shard": ["s", "s"], "key": ["a", "b"], "matched": [True, False], **columns})
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UsageError, match=message):
            calibrate(scored[0], labels=tmp_path / "a.parquet")
        twice = pa.Table.from_arrays([*table.columns, table["key"]], names=[*table.schema.names, "key"])
        pq.write_table(twice, tmp_path / "a.parquet")
        with pytest.raises(UsageError, match="several columns key; keep one"):
            calibrate(scored[0], labels=tmp_path / "a.parquet")


class TestStale:
    """The manifest is not the one that its summary is of."""

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        _, score, p = simulate_scores(300, 0.4, 0, separation=3.0)
        split(write_scores(tmp_path / "out", {"s": {"p_value": p, "match_score": score}}))
        (tmp_path / "labels.csv").write_text("shard,key,matched\ns,00000,yes\n")
        return tmp_path / "out"

    def test_another_summary(self, out: Path, tmp_path: Path) -> None:
        summary = json.loads((out / "summary.json").read_text())
        for count in (3, 9999, -400):
            (out / "summary.json").write_text(json.dumps({**summary, "clean": count}))
            message = (
                rf"summary\.json: says {count:,} clean pairs, and the manifest has {summary['clean']}; `noisyclean"
            )
            with pytest.raises(UsageError, match=message):
                calibrate(out, labels=tmp_path / "labels.csv")

    def test_a_file_that_is_gone_or_has_no_rows(self, out: Path, tmp_path: Path) -> None:
        path = out / "manifest" / "split=clean" / "s.parquet"
        rows = pq.read_table(path, partitioning=None)
        pq.write_table(rows.slice(0, 0), path)
        assert draw_sample(out, sample=tmp_path / "a.csv", pairs=2) == {"clean": 0, "uncertain": 2, "noisy": 2}
        with pytest.raises(UsageError, match="and the manifest has 0"):
            calibrate(out, labels=tmp_path / "labels.csv")
        path.unlink()
        with pytest.raises(UsageError, match="and the manifest has 0"):
            calibrate(out, labels=tmp_path / "labels.csv")

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("rank", None, "a rank is not from 1 to 300"),
            ("rank", 301, "a rank is not from 1 to 300"),
            ("rank", "first", "cannot read the manifest"),
            ("match_probability", None, "or a match probability not from 0 to 1"),
            ("match_probability", float("nan"), "or a match probability not from 0 to 1"),
        ],
    )
    def test_numbers_that_split_does_not_write(
        self, out: Path, tmp_path: Path, column: str, value: Any, message: str
    ) -> None:
        path = out / "manifest" / "split=noisy" / "s.parquet"
        rows = pq.read_table(path, partitioning=None)
        kind = rows.schema.field(column).type if value is None else None
        at = rows.schema.get_field_index(column)
        pq.write_table(rows.set_column(at, column, pa.array([value] * len(rows), kind)), path)
        with pytest.raises(UsageError, match=rf"split=noisy/s\.parquet: .*{message}"):
            calibrate(out, labels=tmp_path / "labels.csv")


CUTOFFS = 50


class Population:
    """Ranked pairs of known truth in three strata, and what samples of these say."""

    def __init__(
        self, mismatched: NDArray[np.bool_], expected: NDArray[np.float64], stratum: NDArray[np.int64]
    ) -> None:
        self.mismatched, self.expected, self.stratum = mismatched, expected, stratum
        pairs = len(mismatched)
        self.at = np.arange(pairs) * CUTOFFS // pairs
        self.rate = (mismatched.cumsum() / np.arange(1, pairs + 1))[pairs // CUTOFFS - 1 :: pairs // CUTOFFS]
        self.members = [np.flatnonzero(stratum == h) for h in range(3)]
        self.pairs, _ = self.tally(self.members)
        self.doubt = np.array([np.bincount(self.at[i], expected[i], CUTOFFS).cumsum() for i in self.members])

    def tally(self, chosen: list[NDArray[np.int64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        pairs = np.array([np.bincount(self.at[i], minlength=CUTOFFS) for i in chosen])
        wrong = np.array([np.bincount(self.at[i], self.mismatched[i], CUTOFFS) for i in chosen])
        return pairs.cumsum(axis=1).astype(np.float64), wrong.cumsum(axis=1)

    def draw(self, random: np.random.Generator, labels: int) -> Counts:
        chosen = [random.choice(i, min(labels, len(i)), replace=False) for i in self.members]
        return Counts(self.pairs, self.doubt, *self.tally(chosen))


def scored_population(
    *, doubt: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda known: known
) -> Population:
    """20,000 pairs at 40 % noise, split at 5 % as ``split`` does, 2 % of the clean being held back."""
    random = np.random.default_rng(0)
    wrong = random.random(20_000) < 0.4
    score = random.normal(size=20_000) + 3.0 * ~wrong
    order = np.argsort(-score)
    odds = 0.4 * np.exp(-(score[order] ** 2) / 2), 0.6 * np.exp(-((score[order] - 3) ** 2) / 2)
    known = odds[0] / (odds[0] + odds[1])
    clean = known.cumsum() / np.arange(1, 20_001) <= 0.05
    stratum = np.select([clean & (random.random(20_000) < 0.98), known < 0.95], [0, 1], 2)
    return Population(wrong[order], doubt(known), stratum)


def flat_population(rate: float) -> Population:
    """The same share of mismatches everywhere, so that no part is better than another; the scores think otherwise."""
    place = np.arange(20_000)
    wrong = np.random.default_rng(1).permutation(place < rate * 20_000)
    stratum = np.digitize(place, [10_000, 14_000])
    return Population(wrong, stratum / 2, stratum)


class TestScience:
    def test_the_corpus_interval_covers(self) -> None:
        """Rates from rare to certain, drawn with and without replacement; 95 % up to the noise of 600 draws."""
        random = np.random.default_rng(0)
        size = np.array([5000, 2000, 3000])
        for rates, replace in (((0.03, 0.6, 0.98), True), ((0.01, 0.3, 1.0), False), ((0.2, 0.4, 0.5), False)):
            wrong = np.round(size * rates).astype(np.int64)
            labelled = np.array([150, 80, 100])
            covered = 0
            for _ in range(600):
                drawn = (
                    random.binomial(labelled, wrong / size)
                    if replace
                    else random.hypergeometric(wrong, size - wrong, labelled)
                )
                _, interval = stratified_rate(size, labelled, drawn)
                assert interval is not None
                covered += interval[0] <= wrong.sum() / size.sum() <= interval[1]
            assert 0.935 <= covered / 600 <= 0.995

    @pytest.mark.parametrize("cutoff", [10, 28, 40])
    def test_a_bound_holds_across_strata(self, cutoff: int) -> None:
        population = scored_population()
        random = np.random.default_rng(cutoff)
        draws = [population.draw(random, 150) for _ in range(1000)]
        bounds = np.array([upper_bound(one.pairs, one.labelled, one.mismatched)[cutoff] for one in draws])
        assert (bounds < population.rate[cutoff]).mean() <= 0.05
        # A bound of 1 would hold too.
        assert np.median(bounds) < population.rate[cutoff] + 0.1

    @pytest.mark.parametrize(
        ("population", "labels", "target"),
        [
            (scored_population(), 300, 0.05),
            (scored_population(), 100, 0.08),
            (scored_population(doubt=lambda known: 1 - known), 300, 0.05),
            (flat_population(0.051), 300, 0.05),
            (flat_population(0.11), 120, 0.1),
        ],
    )
    def test_what_is_certified_exceeds_the_target_in_five_percent_at_most(
        self, population: Population, labels: int, target: float
    ) -> None:
        random = np.random.default_rng(0)
        exceeded = []
        for _ in range(800):
            found = certify(population.draw(random, labels), target)
            exceeded.append(found is not None and population.rate[found] > target)
        # Three standard errors above 5 % would be 7.3 %.
        assert np.mean(exceeded) <= 0.06

    def test_taking_the_best_of_all_bounds_would_exceed_it_more_often(self) -> None:
        """The simulation sees what a fixed order is for: the same bounds without one break their promise."""
        population = flat_population(0.051)
        random = np.random.default_rng(0)
        exceeded = []
        for _ in range(800):
            one = population.draw(random, 300)
            passed = upper_bound(one.pairs, one.labelled, one.mismatched) <= 0.05
            exceeded.append((passed & (population.rate > 0.05)).any())
        assert np.mean(exceeded) > 0.06

    def test_most_of_what_could_be_kept_is_found(self) -> None:
        population = scored_population()
        best = np.flatnonzero(population.rate <= 0.05).max()
        random = np.random.default_rng(0)
        found = [certify(population.draw(random, 500), 0.05) for _ in range(100)]
        assert np.mean([-1 if one is None else one for one in found]) > 0.85 * best

    def test_the_labels_said_to_be_needed_mostly_do(self) -> None:
        population = scored_population()
        random = np.random.default_rng(0)
        everything = population.draw(random, 20_000)
        few = Counts(population.pairs, population.doubt, everything.labelled / 200, everything.mismatched / 200)
        assert certify(few, 0.03) is None
        needed = labels_needed(few, 0.03)
        assert needed is not None
        enough = [certify(population.draw(random, 2 * needed), 0.03) is not None for _ in range(100)]
        scarce = [certify(population.draw(random, needed // 2), 0.03) is not None for _ in range(100)]
        assert np.mean(enough) > 0.7
        assert np.mean(scarce) < 0.3


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
        def call(*words: str | Path) -> tuple[str, str]:
            monkeypatch.setattr(sys, "argv", ["noisyclean", "calibrate", *map(str, words)])
            with pytest.raises(SystemExit):
                main()
            out, err = capfd.readouterr()
            return out, err

        return call

    def test_draw_then_read(
        self, scored: tuple[Path, pd.DataFrame], run: Callable[..., tuple[str, str]], tmp_path: Path
    ) -> None:
        out, truth = scored
        sample = tmp_path / "my labels.csv"
        text, _ = run(out, "--sample", "200", "-o", sample)
        assert f"noisyclean calibrate {out} --labels '{sample}'" in text
        table = read_csv(sample).drop(columns="matched").merge(truth[["shard", "key", "matched"]], on=["shard", "key"])
        table.to_csv(sample, index=False)
        text, err = run(out, "--labels", sample, "--target", "0.08")
        found = json.loads(run(out, "--labels", sample, "--target", "0.08", "--json")[0])
        assert found == json.loads(json.dumps(calibrate(out, labels=sample, target=0.08).to_dict()))
        assert f"rank ≤ {found['cutoff']['rank']:,}" in text
        assert f"  noisyclean split {out} --keep {found['cutoff']['keep']}\n" in text
        assert f"{found['mismatch_rate']:.1%}" in text
        assert "Traceback" not in err
        needed = json.loads(run(out, "--labels", sample, "--target", "0.03", "--json")[0])["labels_needed"]
        assert (
            f"--sample {needed} --labels '{sample}' -o more.csv" in run(out, "--labels", sample, "--target", "0.03")[0]
        )

    def test_options_that_do_not_fit(
        self, scored: tuple[Path, pd.DataFrame], run: Callable[..., tuple[str, str]], tmp_path: Path
    ) -> None:
        assert "give --sample N -o FILE" in run(scored[0])[1]
        assert "go together" in run(scored[0], "--sample", "5")[1]
        assert "go together" in run(scored[0], "--labels", "x.csv", "-o", tmp_path / "a.csv")[1]
        assert "--target 5.0: a share between 0 and 1" in run(scored[0], "--labels", "x.csv", "--target", "5")[1]
        assert "no manifest in it" in run(tmp_path, "--labels", "x.csv")[1]

    def test_help_has_examples(self, run: Callable[..., tuple[str, str]]) -> None:
        assert "  noisyclean calibrate --sample 300 -o labels.csv" in run("--help")[0]
