"""``evaluate``: a manifest against a known truth, which neither fit nor score nor split ever reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from noisyclean.corpus.truth import RANDOM, TRUE_KINDS
from noisyclean.errors import UsageError
from noisyclean.manifest.reading import Manifest
from noisyclean.manifest.schema import CLEAN, NOISY, UNCERTAIN, UNREADABLE
from noisyclean.manifest.splitting import DEFAULT_OUT

if TYPE_CHECKING:
    import pandas as pd

CALIBRATION_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class CleanFigures:
    """``size`` of the split; share of mismatches in it; share of all true pairs that it holds."""

    size: int
    realised_noise: float | None
    recall: float | None


@dataclass(frozen=True)
class NoisyFigures:
    """``size`` of the split; share of mismatches in it; share of all mismatches that it holds."""

    size: int
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class UncertainFigures:
    """``size`` of the split."""

    size: int


@dataclass(frozen=True)
class KindFigures:
    """Pairs of one kind: how well they are told from true pairs (mismatches only), and where they ended."""

    pairs: int
    auroc: float | None
    clean: int
    noisy: int
    uncertain: int


@dataclass(frozen=True)
class CalibrationPoint:
    """All pairs with q ≤ ``asked``: how many, the share of mismatches among them, the share of true pairs kept."""

    asked: float
    size: int
    realised_noise: float | None
    recall: float | None


@dataclass(frozen=True)
class Evaluation:
    """How good a manifest is.

    Rates are over the headline pairs: readable, and either true or mismatched at random. Harder kinds of fault, where
    the truth names them, are in ``kinds`` only. Without kinds, or without random mismatches, all readable pairs count.

    Attributes:
        auroc: of finding mismatches by ``rank``; None without both mismatches and true pairs.
        average_precision: the same, mismatches being what is sought.
        f1: of the clean split as the set of true pairs.
        planted_noise: share of mismatches.
        estimated_noise, noise_interval, target_fdr: what the summary says, over all readable pairs.
        clean, noisy, uncertain: sizes count all pairs of the split; rates are over the headline pairs.
        unreadable: how many samples.
        headline_pairs: how many pairs the rates are over.
        calibration: asked and realised mismatch rates.
        kinds: by kind of pair, if the truth has kinds.
    """

    auroc: float | None
    average_precision: float | None
    f1: float | None
    planted_noise: float | None
    estimated_noise: float
    noise_interval: tuple[float, float]
    target_fdr: float | None
    clean: CleanFigures
    noisy: NoisyFigures
    uncertain: UncertainFigures
    unreadable: int
    headline_pairs: int
    calibration: list[CalibrationPoint]
    kinds: dict[str, KindFigures]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def evaluate(out: Path | str = DEFAULT_OUT, *, truth: Path | str) -> Evaluation:
    """Compare the manifest in ``out`` with a truth.

    Args:
        out: the OUT folder.
        truth: Parquet with ``shard``, ``key`` and ``matched`` (bool), one row a pair, maybe ``kind``.

    Raises:
        UsageError: there is no manifest, or the truth is unreadable or lacks pairs of the manifest.
    """
    manifest = Manifest(out)
    summary = manifest.summary
    rows = _join(manifest, Path(truth))
    readable = rows[rows["split"] != UNREADABLE]
    kind = readable["kind"].to_numpy()
    headline = np.ones(len(readable), np.bool_)
    if (kind == RANDOM).any():
        headline = np.isin(kind, [*TRUE_KINDS, RANDOM])
    judged = readable[headline]
    matched = judged["matched"].to_numpy(np.bool_)
    clean = (judged["split"] == CLEAN).to_numpy()
    noisy = (judged["split"] == NOISY).to_numpy()
    sizes = rows["split"].value_counts()
    auroc, precision = detection(matched, judged["rank"].to_numpy(np.float64))
    return Evaluation(
        auroc=auroc,
        average_precision=precision,
        f1=ratio(2 * (matched & clean), matched.astype(np.int64) + clean),
        planted_noise=share(~matched),
        estimated_noise=summary.estimated_noise,
        noise_interval=summary.noise_interval,
        target_fdr=summary.target_fdr,
        clean=CleanFigures(int(sizes.get(CLEAN, 0)), share(~matched[clean]), ratio(matched & clean, matched)),
        noisy=NoisyFigures(int(sizes.get(NOISY, 0)), share(~matched[noisy]), ratio(~matched & noisy, ~matched)),
        uncertain=UncertainFigures(int(sizes.get(UNCERTAIN, 0))),
        unreadable=int(sizes.get(UNREADABLE, 0)),
        headline_pairs=len(judged),
        calibration=[_calibration(matched, judged["q_value"].to_numpy(), asked) for asked in CALIBRATION_RATES],
        kinds=_by_kind(readable) if readable["kind"].notna().any() else {},
    )


def _join(manifest: Manifest, truth: Path) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        known = pq.read_table(truth, partitioning=None).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{truth}: cannot read the truth ({error})") from error
    for column in ("shard", "key", "matched"):
        if column not in known:
            raise UsageError(f"{truth}: no column {column}; the truth has shard, key and matched")
    if not set(known["matched"].dropna().unique()) <= {False, True}:
        raise UsageError(f"{truth}: column matched holds something else than true and false")
    if "kind" not in known:
        known["kind"] = None
    known = known[["shard", "key", "matched", "kind"]].drop_duplicates(["shard", "key"])
    rows = manifest.pairs(columns=["shard", "key", "rank", "q_value", "split"])
    joined: pd.DataFrame = rows.merge(known, on=["shard", "key"], how="left", validate="many_to_one")
    unknown = joined["matched"].isna() & (joined["split"] != UNREADABLE)
    if unknown.any():
        first = joined[unknown].iloc[0]
        raise UsageError(
            f"{truth}: knows nothing of {int(unknown.sum()):,} pairs of {manifest.out}, the first being "
            f"{first['shard']}/{first['key']}; give the truth of the shards that were scored"
        )
    return joined


def _by_kind(readable: pd.DataFrame) -> dict[str, KindFigures]:
    figures = {}
    true_ranks = readable.loc[readable["kind"].isin(TRUE_KINDS), "rank"].to_numpy(np.float64)
    for kind, rows in readable.groupby("kind"):
        auroc = None
        if not rows["matched"].to_numpy(np.bool_).any() and len(true_ranks):
            ranks = rows["rank"].to_numpy(np.float64)
            matched = np.repeat([True, False], [len(true_ranks), len(ranks)])
            auroc, _ = detection(matched, np.concatenate([true_ranks, ranks]))
        sizes = rows["split"].value_counts()
        figures[str(kind)] = KindFigures(
            len(rows), auroc, *(int(sizes.get(one, 0)) for one in (CLEAN, NOISY, UNCERTAIN))
        )
    return figures


def detection(matched: np.ndarray[Any, Any], rank: np.ndarray[Any, Any]) -> tuple[float | None, float | None]:
    """AUROC and average precision of finding mismatches, which should rank last; None where there is but one kind.

    Args:
        matched: (N,) bool.
        rank: (N,) numbers, lower is better matched.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if matched.all() or not matched.any():
        return None, None
    return float(roc_auc_score(~matched, rank)), float(average_precision_score(~matched, rank))


def _calibration(matched: np.ndarray[Any, Any], q: np.ndarray[Any, Any], asked: float) -> CalibrationPoint:
    kept = q <= asked
    return CalibrationPoint(asked, int(kept.sum()), share(~matched[kept]), ratio(matched & kept, matched))


def share(of: np.ndarray[Any, Any]) -> float | None:
    """The share that is true; None of nothing."""
    return float(of.mean()) if len(of) else None


def ratio(part: np.ndarray[Any, Any], whole: np.ndarray[Any, Any]) -> float | None:
    """The sum of one over that of the other; None where that is nothing."""
    return float(part.sum() / whole.sum()) if whole.any() else None
