"""The numbers of the page: what a manifest says of its corpus, counted by DuckDB. No picture is looked at.

Everything is the manifest's own, or follows from it by the formulas that ``split`` and ``evaluate`` use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from noisyclean.calibration import STOREY_LAMBDA, NoiseRate, noise_rate_of_tail
from noisyclean.corpus.truth import RANDOM as RANDOM_KIND
from noisyclean.corpus.truth import TRUE_KINDS, TRUTH_NAME
from noisyclean.errors import UsageError
from noisyclean.evaluation.detection import Evaluation, evaluate
from noisyclean.manifest.nulls import RANDOM, read_null_table, read_nulls
from noisyclean.manifest.reading import Manifest
from noisyclean.manifest.rules import EXTREME_ENTROPY
from noisyclean.manifest.schema import CLEAN, NOISY, SPLITS, UNCERTAIN
from noisyclean.manifest.splitting import Summary, read_out

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Int64: TypeAlias = NDArray[np.int64]
Float64: TypeAlias = NDArray[np.float64]

READABLE = (CLEAN, UNCERTAIN, NOISY)
"""The splits that have scores, from the best to the worst."""

NUMBERS = [
    "shard", "split", "fold", "in_sample", "similarity", "energy", "swapped_entropy",
    "match_score", "p_value", "q_value", "match_probability", "rank",
]  # fmt: skip
"""The columns of ``rows`` that the numbers come from."""

ASKED = np.linspace(0.0, 0.3, 121)
"""The mismatch rates of the curves."""
_BY_SCORE = (None, "match_score", "rank", "p_value", "q_value", "match_probability")
"""What a split may go by for its ends to be match scores."""
_BINS = 80
_CELLS = 48
_TAIL = 0.001
"""Share of the pairs at either end of an axis that is counted in its last bin."""
_POINTS = 400
"""More points than this a curve does not need."""


@dataclass(frozen=True)
class ScoreHistogram:
    """Match scores of the readable pairs, and what random pairings would look like.

    Attributes:
        edges: (B + 1,) of the bins; what lies beyond is counted in the first and the last.
        pairs: split → (B,) pairs.
        null: (B,) as many pairs as are estimated to be random mismatches, distributed as the known ones of their fold.
        clean_from: the lowest score of a clean pair, of each fold; empty where the split goes by something else.
        noisy_to: the highest score of a noisy pair, of each fold.
    """

    edges: Float64
    pairs: dict[str, Int64]
    null: Float64
    clean_from: list[float]
    noisy_to: list[float]


@dataclass(frozen=True)
class Density:
    """Pairs by energy and swapped entropy.

    Attributes:
        energy, entropy: (C + 1,) edges of the cells.
        pairs: split → (C, C), rows by energy.
    """

    energy: Float64
    entropy: Float64
    pairs: dict[str, Int64]


@dataclass(frozen=True)
class Kept:
    """What a stricter or a more lenient question would leave.

    Attributes:
        pairs: (len(ASKED),) clean pairs at each asked rate, as ``split`` would have them.
    """

    pairs: Int64

    def at(self, asked: float) -> int:
        """The pairs at one of the rates of ``ASKED``."""
        return int(self.pairs[np.searchsorted(ASKED, asked - 1e-9)])


@dataclass(frozen=True)
class ShardFigures:
    """One shard.

    Attributes:
        sizes: split → rows.
        mismatch: its estimated mismatch rate, as the corpus has one; None where nothing was readable.
        damage: what is wrong with its tar.
    """

    name: str
    sizes: dict[str, int]
    mismatch: NoiseRate | None
    damage: str | None

    @property
    def pairs(self) -> int:
        """All rows."""
        return sum(self.sizes.values())

    @property
    def unreadable_share(self) -> float:
        """Of all rows."""
        return self.sizes["unreadable"] / self.pairs if self.pairs else 0.0


@dataclass(frozen=True)
class TruthCurves:
    """The manifest against the truth beside the shards: to be read, never used.

    Attributes:
        evaluation: what ``evaluate`` says.
        false_alarm, found: of finding mismatches from the worst rank upwards: (K,) share of the true pairs and of the
            mismatches that are met.
        precision: (K,) share of mismatches among all that are met.
        realised: (len(ASKED),) share of mismatches among the pairs with q ≤ the asked rate; NaN where there are none.
    """

    evaluation: Evaluation
    false_alarm: Float64
    found: Float64
    precision: Float64
    realised: Float64


@dataclass(frozen=True)
class Digest:
    """All numbers of a page.

    Attributes:
        scores, density, kept: None where no pair can be read.
        shards: the surest mismatched first.
        truth: None where none lies beside the shards.
        truth_refused: why the truth that lies there cannot be used.
    """

    summary: Summary
    run: dict[str, Any]
    scores: ScoreHistogram | None
    density: Density | None
    kept: Kept | None
    shards: list[ShardFigures]
    truth: TruthCurves | None
    truth_refused: str | None


def digest(manifest: Manifest, db: DuckDBPyConnection) -> Digest:
    """Count what the page says.

    Args:
        manifest: of an OUT folder.
        db: its ``rows``, with the columns of ``NUMBERS`` and ``key``.

    Raises:
        UsageError: OUT's summary, nulls or run.json are missing, broken or of another split.
    """
    there = dict(db.execute("select split, count(*) from rows group by split").fetchall())
    summary, run = manifest.summary_of({split: there.get(split, 0) for split in SPLITS}), read_out(manifest.out)
    readable = summary.pairs - summary.unreadable > 0
    truth, refused = _read_truth(manifest, run, db)
    return Digest(
        summary=summary,
        run=run,
        scores=score_histogram(manifest, db, bins=_BINS) if readable else None,
        density=_density(db) if readable else None,
        kept=_kept(db) if readable else None,
        shards=_by_shard(manifest, summary, run, db),
        truth=truth,
        truth_refused=refused,
    )


def score_histogram(manifest: Manifest, db: DuckDBPyConnection, *, bins: int) -> ScoreHistogram:
    """The match scores of at least one readable pair.

    Args:
        manifest: of an OUT folder.
        db: its ``rows`` with ``split``, ``fold`` and ``match_score``.
        bins: how many.

    Raises:
        UsageError: OUT's summary or nulls are missing or broken.
    """
    summary = manifest.summary
    known = read_null_table(manifest.out).to_pandas()
    known = known[known["kind"] == RANDOM]
    edges = _edges(db, "match_score", bins)
    counts = {split: np.zeros(bins, np.int64) for split in READABLE}
    place = _place("match_score", edges)
    for split, at, pairs in db.execute(
        f"select split, {place}, count(*) from rows where match_score is not null group by all"
    ).fetchall():
        counts[split][at] = pairs
    folds = db.execute("""
        select fold, count(*), min(match_score) filter (split = 'clean'), max(match_score) filter (split = 'noisy')
        from rows where match_score is not null group by fold order by fold
    """).fetchall()
    null = np.zeros(bins)
    for fold, pairs, *_ in folds:
        scores = known.loc[known["fold"] == fold, "match_score"].to_numpy(np.float64)
        shape, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
        null += summary.estimated_noise * pairs * shape / max(len(scores), 1)
    by_score = summary.rule.get("by") in _BY_SCORE
    return ScoreHistogram(
        edges=edges,
        pairs=counts,
        null=null,
        clean_from=[low for *_, low, _ in folds if low is not None and by_score],
        noisy_to=[high for *_, high in folds if high is not None],
    )


def _edges(db: DuckDBPyConnection, column: str, bins: int) -> Float64:
    """Even bins over all but the very ends of a column."""
    query = f"select quantile_cont({column}, [?, ?]) from rows where {column} is not null"
    ((ends,),) = db.execute(query, [_TAIL, 1 - _TAIL]).fetchall()
    low, high = map(float, ends)
    if not low < high:  # one value, or nearly
        low, high = low - 0.5, low + 0.5
    margin = 0.02 * (high - low)
    return np.linspace(low - margin, high + margin, bins + 1)


def _place(column: str, edges: Float64) -> str:
    """SQL for the bin of a value."""
    bins = len(edges) - 1
    low, width = float(edges[0]), float(edges[-1] - edges[0]) / bins
    scaled = f"floor(({column} - {low!r}) / {width!r})"
    return f"cast(least(greatest({scaled}, 0), {bins - 1}) as integer)"


def _density(db: DuckDBPyConnection) -> Density:
    energy, entropy = (_edges(db, column, _CELLS) for column in ("energy", "swapped_entropy"))
    pairs = {split: np.zeros((_CELLS, _CELLS), np.int64) for split in READABLE}
    cells = f"{_place('energy', energy)}, {_place('swapped_entropy', entropy)}"
    query = f"select split, {cells}, count(*) from rows where energy is not null group by all"
    for split, row, column, count in db.execute(query).fetchall():
        pairs[split][row, column] = count
    return Density(energy, entropy, pairs)


def _kept(db: DuckDBPyConnection) -> Kept:
    query = "select q_value, match_probability, count(*) as pairs from rows where q_value is not null group by all"
    found = db.execute(query).fetchnumpy()
    # Compared as the split compares them: in float32.
    q, probability = (np.asarray(found[name], np.float32) for name in ("q_value", "match_probability"))
    pairs = np.asarray(found["pairs"], np.int64)
    candidates = np.array([pairs[(q <= asked) & (probability > asked)].sum() for asked in ASKED.tolist()], np.int64)
    # Of n of them, those beyond a quantile of their swapped entropies are held back (see rules.py).
    return Kept(np.where(candidates > 0, np.floor((candidates - 1) * (1 - EXTREME_ENTROPY)) + 1, 0).astype(np.int64))


def _by_shard(
    manifest: Manifest, summary: Summary, run: Mapping[str, Any], db: DuckDBPyConnection
) -> list[ShardFigures]:
    """The shards, those first whose mismatch rate is the highest for certain (by the lower end of its interval).

    The rate is Storey's, of the statistic that gave the corpus its rate, and of the pairs that did: the shards' rates,
    weighted by their pairs, are the corpus's.
    """
    medians = read_nulls(manifest.out).similarity_median
    median = "case fold " + " ".join(f"when {k} then {value!r}::float" for k, value in enumerate(medians.tolist()))
    counted = db.execute(f"""
        select shard,
            count(*) filter (seen) as judged,
            count(*) filter (seen and p_value > {STOREY_LAMBDA}) as low_scores,
            count(*) filter (seen and similarity < {median} end) as low_similarities,
            {", ".join(f"count(*) filter (split = '{split}') as {split}" for split in SPLITS)}
        from (
            select *, match_score is not null
                and (not in_sample or not exists (from rows where not in_sample)) as seen from rows
        ) group by shard order by shard
    """).fetchall()
    tails = [sum(row[column] for row in counted) for column in (2, 3)]
    tail = 2 if tails[0] <= tails[1] else 3
    figures = [
        ShardFigures(
            name=row[0],
            sizes=dict(zip(SPLITS, row[4:], strict=True)),
            mismatch=noise_rate_of_tail(row[tail], pairs=row[1], null_pairs=run["null_pairs"]) if row[1] else None,
            damage=summary.damaged_shards.get(row[0]),
        )
        for row in counted
    ]
    return sorted(figures, key=lambda one: -1.0 if one.mismatch is None else one.mismatch.low, reverse=True)


def _read_truth(
    manifest: Manifest, run: Mapping[str, Any], db: DuckDBPyConnection
) -> tuple[TruthCurves | None, str | None]:
    """What the truth beside the shards says, or why it cannot say anything."""
    folders = {Path(path).parent for path in run.get("paths", ()) if "://" not in path}
    found = sorted(path for path in (folder / TRUTH_NAME for folder in folders) if path.is_file())
    if len(found) != 1:
        return None, None
    try:
        evaluation = evaluate(manifest.out, truth=found[0])
    except UsageError as error:
        return None, str(error)
    return _curves(evaluation, found[0], db), None


def _curves(evaluation: Evaluation, path: Path, db: DuckDBPyConnection) -> TruthCurves:
    known = pq.read_table(path, partitioning=None)  # noqa: F841 - DuckDB finds it by its name
    kinds = ", ".join(f"'{kind}'" for kind in (*TRUE_KINDS, RANDOM_KIND)) if RANDOM_KIND in evaluation.kinds else ""
    judged = db.execute(f"""
        select matched, q_value from rows join (select distinct on (shard, key) * from known) using (shard, key)
        where match_score is not null {f"and kind in ({kinds})" if kinds else ""} order by rank desc
    """).fetchnumpy()
    mismatched, q = ~np.asarray(judged["matched"], np.bool_), np.asarray(judged["q_value"], np.float32)
    met = np.cumsum(mismatched)
    looked_at = np.arange(1, len(met) + 1)
    at = np.unique(np.linspace(0, len(met) - 1, min(_POINTS, len(met))).astype(np.int64))
    realised = [float(mismatched[kept].mean()) if (kept := q <= asked).any() else np.nan for asked in ASKED.tolist()]
    return TruthCurves(
        evaluation=evaluation,
        false_alarm=((looked_at - met) / max(int((~mismatched).sum()), 1))[at],
        found=(met / max(int(met[-1]) if len(met) else 0, 1))[at],
        precision=(met / looked_at)[at],
        realised=np.array(realised),
    )
