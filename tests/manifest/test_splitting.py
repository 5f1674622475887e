"""Splitting: every sample in exactly one split, by a rule that anyone can check from the manifest's own columns."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pytest
from helpers import simulate_nulls, simulate_scores, write_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from noisyclean.errors import UsageError
from noisyclean.manifest.nulls import write_nulls
from noisyclean.manifest.parts import PartInfo, part_path, read_part, write_part
from noisyclean.manifest.schema import MANIFEST_SCHEMA, SPLITS, STATISTICS
from noisyclean.manifest.splitting import split

SIZES = {"00000": 900, "00001": 0, "shard=2/00002": 600, "00003": 3}
"""The third lies in a folder that looks like a column of the hive layout."""
NOT_EMPTY = {name: size for name, size in SIZES.items() if size}
FAULTS = {"00000": {5: "truncated PNG", 17: "no caption"}, "00003": dict.fromkeys(range(3), "no image")}
READABLE = 1498
MEASURED = [*STATISTICS, "fold", "in_sample", "p_value", "near_miss_p_value", "q_value", "match_probability", "rank"]
COLUMNS = {
    "key": "string",
    "shard": "string",
    "index": "int64",
    "uid": "string",
    "url": "string",
    "caption": "string",
    "width": "int32",
    "height": "int32",
    "fold": "int32",
    "in_sample": "bool",
    "similarity": "float",
    "energy_image": "float",
    "energy_text": "float",
    "energy": "float",
    "swapped_entropy": "float",
    "match_score": "float",
    "p_value": "float",
    "near_miss_p_value": "float",
    "q_value": "float",
    "match_probability": "float",
    "rank": "int64",
    "best_text_key": "string",
    "best_text_similarity": "float",
    "best_image_key": "string",
    "best_image_similarity": "float",
    "reason": "string",
    "split": "string",
}
HIGHER_IS_CLEANER = ["similarity", "match_score", "match_probability"]
LOWER_IS_CLEANER = [
    "energy_image",
    "energy_text",
    "energy",
    "swapped_entropy",
    "p_value",
    "near_miss_p_value",
    "q_value",
    "rank",
]
REQUIRED = ["key", "shard", "index", "reason", "split"]


def simulate(seed: int = 0, noise: float = 0.4) -> dict[str, dict[str, Any]]:
    """Shards of mixed pairs; matching pairs have the lower entropy, as real ones do."""
    parts = {}
    for at, (shard, size) in enumerate(SIZES.items()):
        matched, score, p = simulate_scores(size, noise, seed * 100 + at, separation=3.0)
        entropy = np.random.default_rng(seed * 100 + at).gamma(4.0, size=size) + 2 * ~matched
        faults = [FAULTS.get(shard, {}).get(i) for i in range(size)]
        parts[shard] = {"p_value": p, "match_score": score, "swapped_entropy": entropy, "fault": faults}
    return parts


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_scores(tmp_path / "out", simulate())


def read(out: Path) -> pd.DataFrame:
    """All rows, in order of shard and position."""
    frame = pd.read_parquet(out / "manifest")
    frame["split"] = frame["split"].astype(str)
    return frame.sort_values(["shard", "index"], ignore_index=True)


def readable(out: Path) -> pd.DataFrame:
    frame = read(out)
    return frame[frame["split"] != "unreadable"].reset_index(drop=True)


class TestRows:
    def test_every_sample_has_one_row_with_what_was_measured(self, out: Path) -> None:
        summary = split(out)
        rows = read(out)
        measured = pa.concat_tables([read_part(out, shard) for shard in sorted(SIZES)]).to_pandas()
        shared = [name for name in measured if name in MANIFEST_SCHEMA.names]
        pd.testing.assert_frame_equal(rows[shared], measured[shared], check_dtype=False)
        assert rows.groupby("shard").size().to_dict() == NOT_EMPTY
        assert summary.pairs == sum(SIZES.values()) == len(rows)
        assert {name: getattr(summary, name) for name in SPLITS} == Counter(rows["split"])
        assert min(Counter(rows["split"]).values()) > 0
        assert summary.reasons == Counter(rows["reason"])
        assert rows[[name for name in rows if name.startswith("best_")]].isna().all(axis=None)  # of --rematch alone

    def test_unreadable_rows(self, out: Path) -> None:
        split(out)
        rows = read(out)
        broken = rows[rows["split"] == "unreadable"]
        reasons = dict(zip(zip(broken["shard"], broken["index"], strict=True), broken["reason"], strict=True))
        assert reasons == {(shard, at): fault for shard, known in FAULTS.items() for at, fault in known.items()}
        assert broken[MEASURED].isna().all(axis=None)
        assert rows[rows["split"] != "unreadable"][MEASURED].notna().all(axis=None)
        assert rows[REQUIRED].notna().all(axis=None)

    @settings(max_examples=25)
    @given(
        st.lists(
            st.lists(
                st.tuples(st.sampled_from([None, None, None, "no image", "truncated JPEG"]), st.floats(0.001, 1)),
                max_size=12,
            ),
            min_size=1,
            max_size=4,
        ),
        st.sampled_from([{}, {"fdr": 0.0}, {"fdr": 1.0}, {"keep": 0.3}, {"min_score": -0.2}]),
    )
    def test_splits_add_up_whatever_the_faults(
        self, shards: list[list[tuple[str | None, float]]], rule: dict[str, float]
    ) -> None:
        parts = {
            f"{number:05d}": {"p_value": np.array([p for _, p in rows]), "fault": [fault for fault, _ in rows]}
            for number, rows in enumerate(shards)
        }
        with tempfile.TemporaryDirectory() as folder:
            out = write_scores(Path(folder), parts)
            summary = split(out, **rule)
            files = list((out / "manifest").rglob("*.parquet"))
            rows = read(out) if files else pd.DataFrame(columns=[*REQUIRED, *MEASURED])
        expected = [(name, at) for name, part in parts.items() for at in range(len(part["fault"]))]
        assert list(zip(rows["shard"], rows["index"], strict=True)) == expected
        assert summary.clean + summary.noisy + summary.uncertain + summary.unreadable == len(expected)
        faults = [fault for part in parts.values() for fault in part["fault"]]
        assert list(rows["split"] == "unreadable") == [fault is not None for fault in faults]
        ranks = rows["rank"].dropna()
        assert sorted(ranks) == list(range(1, len(ranks) + 1))


class TestRule:
    @pytest.mark.parametrize("fdr", [0.01, 0.05, 0.2])
    def test_recomputed_from_the_columns(self, out: Path, fdr: float) -> None:
        summary = split(out, fdr=fdr)
        rows = readable(out)
        noisy = rows["match_probability"] <= np.float32(fdr)
        accepted = (rows["q_value"] <= np.float32(fdr)) & ~noisy
        # 2 % of the accepted are held back: those above the interpolated 98 % quantile of their entropies.
        ordered = np.sort(rows.loc[accepted, "swapped_entropy"])
        held_back = accepted & (rows["swapped_entropy"] > ordered[int(0.98 * (len(ordered) - 1))])
        expected = np.select(
            [held_back, accepted, noisy],
            ["uncertain", "clean", "noisy"],
            "uncertain",
        )
        np.testing.assert_array_equal(rows["split"], expected)
        reasons = {
            "clean": f"q ≤ {fdr:g}",
            "noisy": f"match probability ≤ {fdr:g}",
            "uncertain": "between the thresholds",
        }
        expected_reasons = np.where(held_back, "swapped entropy in the top 2%", pd.Series(expected).map(reasons))
        assert Counter(rows["reason"]) == Counter(expected_reasons)
        assert summary.target_fdr == fdr
        assert summary.expected_clean_noise < fdr
        assert held_back.any()

    def test_q_values_are_benjamini_hochberg_times_the_estimate(self, out: Path) -> None:
        summary = split(out)
        rows = readable(out)
        p = rows["p_value"].to_numpy(np.float64)
        assert summary.estimated_noise == pytest.approx(np.mean(p > 0.5) / 0.5)
        assert summary.noise_interval[0] < summary.estimated_noise < summary.noise_interval[1]
        expected = summary.estimated_noise * false_discovery_control(p)
        np.testing.assert_allclose(rows["q_value"], expected, rtol=1e-6)

    def test_rank_goes_by_p_value_then_match_score(self, out: Path) -> None:
        split(out)
        rows = readable(out).sort_values("rank")
        assert rows["rank"].tolist() == list(range(1, READABLE + 1))
        order = list(zip(rows["p_value"], -rows["match_score"], strict=True))
        assert order == sorted(order)
        assert rows["p_value"].duplicated().any()  # so that the second key decided somewhere

    def test_simulated_mismatches_are_kept_out(self, out: Path) -> None:
        """The whole path from scores to splits, against the truth of the simulation."""
        summary = split(out, fdr=0.05)
        matched = np.concatenate(
            [simulate_scores(SIZES[name], 0.4, list(SIZES).index(name), separation=3.0)[0] for name in sorted(SIZES)]
        )
        rows = read(out)
        assert np.mean(~matched[rows["split"] == "clean"]) <= 0.06
        assert np.mean(~matched[rows["split"] == "noisy"]) >= 0.94
        assert summary.estimated_noise == pytest.approx(0.4, abs=0.06)

    @pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 1.0])
    def test_keep_is_an_exact_count_of_the_best(self, out: Path, keep: float) -> None:
        summary = split(out, keep=keep)
        rows = readable(out)
        count = round(keep * READABLE)
        assert summary.clean == count
        assert summary.target_fdr is None
        np.testing.assert_array_equal(rows["split"] == "clean", rows["rank"] <= count)

    @pytest.mark.parametrize("by", [*HIGHER_IS_CLEANER, *LOWER_IS_CLEANER])
    def test_keep_and_min_score_by_any_column(self, out: Path, by: str) -> None:
        split(out, keep=0.25, by=by)
        rows = readable(out)
        better = rows[by] if by in HIGHER_IS_CLEANER else -rows[by]
        clean = rows["split"] == "clean"
        assert clean.sum() == round(0.25 * READABLE)
        assert better[clean].min() >= better[~clean].max()

        threshold = float(rows[by][rows["rank"] == 300].iloc[0])
        summary = split(out, min_score=threshold, by=by)
        expected = rows[by] >= threshold if by in HIGHER_IS_CLEANER else rows[by] <= threshold
        np.testing.assert_array_equal(readable(out)["split"] == "clean", expected)
        assert summary.rule == {"min_score": threshold, "by": by}
        assert 0 < summary.clean < READABLE

    def test_min_score_goes_by_the_match_score(self, out: Path) -> None:
        split(out, min_score=2.0)
        rows = readable(out)
        np.testing.assert_array_equal(rows["split"] == "clean", rows["match_score"] >= 2.0)

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ({"fdr": 0.1, "keep": 0.1}, "fdr and keep"),
            ({"keep": 0.1, "min_score": 0.1}, "keep and min_score"),
            ({"fdr": 0.1, "by": "similarity"}, "--by goes with"),
            ({"by": "similarity"}, "--by goes with"),
            ({"keep": 0.1, "by": "beauty"}, "no such column"),
            ({"fdr": 1.5}, "between 0 and 1"),
            ({"fdr": -0.1}, "between 0 and 1"),
            ({"keep": 30.0}, "between 0 and 1"),
            ({"keep": float("nan")}, "between 0 and 1"),
            ({"fdr": float("nan")}, "between 0 and 1"),
            ({"min_score": float("nan")}, "--min-score nan: a number"),
            ({"min_score": float("inf")}, "--min-score inf: a number"),
            ({"min_score": float("-inf"), "by": "rank"}, "--min-score -inf: a number, .* --keep 1 takes all"),
        ],
    )
    def test_conflicting_options(self, out: Path, rule: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            split(out, **rule)
        assert not (out / "manifest").exists()

    @pytest.mark.parametrize("rule", [{"keep": 0.5}, {"min_score": 0.5}])
    def test_a_column_that_no_pair_has(self, out: Path, rule: dict[str, float]) -> None:
        """Where no near misses could be made, all ranks would be kept, and be said to go by them."""
        split(out)
        before = read(out)
        for shard in SIZES:
            part = read_part(out, shard)
            at = part.schema.get_field_index("near_miss_p_value")
            part = part.set_column(at, part.schema.field(at), pa.nulls(len(part), pa.float32()))
            write_part(out, shard, part, PartInfo("scorer", "source"))
        write_nulls(out, simulate_nulls(near_misses=0))
        with pytest.raises(UsageError, match=r"--by near_miss_p_value: no pair of .*out has one, .*--by p_value"):
            split(out, by="near_miss_p_value", **rule)
        pd.testing.assert_frame_equal(read(out), before)
        assert split(out, keep=0.5, by="p_value").clean == READABLE // 2


class TestFiles:
    def test_rerun_replaces_the_old_manifest_and_is_identical(self, out: Path) -> None:
        def content() -> dict[str, bytes]:
            return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

        split(out, fdr=0.05)
        first = content()
        split(out, keep=1.0)
        assert {path.parent.name for path in (out / "manifest").glob("*/*.parquet")} == {
            "split=clean",
            "split=unreadable",
        }
        split(out, fdr=0.05)
        assert content() == first

    def test_interrupted_split_leaves_the_old_manifest(self, out: Path) -> None:
        class Interrupt:
            @contextmanager
            def task(self, name: str, total: int | None, unit: str) -> Any:
                yield self

            def advance(self, amount: int = 1, note: str | None = None) -> None:
                raise KeyboardInterrupt

            def say(self, text: str) -> None:
                pass

        split(out)
        before = read(out)
        with pytest.raises(KeyboardInterrupt):
            split(out, keep=0.1, progress=Interrupt())
        pd.testing.assert_frame_equal(read(out), before)
        assert split(out, keep=0.1).clean == round(0.1 * READABLE)
        assert sorted(path.name for path in out.iterdir()) == [
            "manifest",
            "nulls.parquet",
            "run.json",
            "scores",
            "summary.json",
        ]

    def test_summary_file_is_the_summary(self, out: Path) -> None:
        summary = split(out)
        values = json.loads((out / "summary.json").read_text())
        for name in ("noise_interval", "close_interval"):
            assert tuple(values.pop(name)) == getattr(summary, name)
        assert values == {name: getattr(summary, name) for name in values}
        assert set(values) > {"pairs", *SPLITS, "estimated_noise", "target_fdr", "reasons", "seconds"}

    def test_damage_and_speed_are_in_the_summary(self, out: Path) -> None:
        run = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**run, "seconds": 10.0}))
        write_part(out, "00001", read_part(out, "00001"), PartInfo("scorer", "source", "damaged tar: cut off"))
        summary = split(out)
        assert summary.damaged_shards == {"00001": "damaged tar: cut off"}
        assert summary.pairs_per_second == pytest.approx(150.3)

    def test_missing_part_is_named(self, out: Path) -> None:
        part_path(out, "shard=2/00002").unlink()
        with pytest.raises(UsageError, match=r"1 of 4 shards are not scored yet \(the first: shard=2/00002\)"):
            split(out)

    def test_part_of_another_model_is_refused(self, out: Path) -> None:
        write_part(out, "00003", read_part(out, "00003"), PartInfo("another", "source"))
        with pytest.raises(UsageError, match=r"00003\.parquet: scored by another model"):
            split(out)

    @pytest.mark.parametrize("record", [None, "{", "[]", "{}"])
    def test_what_is_no_out_is_refused(self, out: Path, record: str | None) -> None:
        (out / "run.json").unlink()
        if record is not None:
            (out / "run.json").write_text(record)
        with pytest.raises(UsageError, match="out"):
            split(out)

    def test_corpus_without_samples(self, tmp_path: Path) -> None:
        summary = split(write_scores(tmp_path, {"s": {"p_value": []}}))
        assert (summary.pairs, summary.clean, summary.noise_interval) == (0, 0, (0.0, 1.0))
        assert (tmp_path / "manifest").is_dir()


class TestReaders:
    """The manifest is one table to whatever opens it."""

    @pytest.fixture
    def sizes(self, out: Path) -> dict[str, int]:
        summary = split(out)
        return {name: getattr(summary, name) for name in SPLITS}

    def test_pyarrow(self, out: Path, sizes: dict[str, int]) -> None:
        dataset = pyarrow.dataset.dataset(out / "manifest", partitioning="hive")
        assert {field.name: str(field.type) for field in dataset.schema} == COLUMNS
        table = dataset.to_table(columns=["split", "shard"])
        assert Counter(table["split"].to_pylist()) == sizes
        assert Counter(table["shard"].to_pylist()) == NOT_EMPTY

    def test_pandas(self, out: Path, sizes: dict[str, int]) -> None:
        frame = pd.read_parquet(out / "manifest")
        assert list(frame.columns) == list(COLUMNS)
        assert frame["split"].value_counts().to_dict() == sizes
        assert frame["shard"].value_counts().to_dict() == NOT_EMPTY

    def test_duckdb(self, out: Path, sizes: dict[str, int]) -> None:
        query = f"from read_parquet('{out}/manifest/**/*.parquet', hive_partitioning = true)"
        for column, expected in (("split", sizes), ("shard", NOT_EMPTY)):
            assert dict(duckdb.sql(f"select {column}, count(*) {query} group by {column}").fetchall()) == expected
        accepted = duckdb.sql(f"select count(*) {query} where split = 'clean' and q_value <= 0.0501").fetchall()
        assert accepted == [(sizes["clean"],)]
