"""``split``: from the scores of all shards to ranks, q-values and the clean / noisy / uncertain manifest. No model.

The three-way rule, with α the mismatch rate that is asked for:

* **clean**: q-value ≤ α, not noisy, and a swapped entropy below the top 2 % of those;
* **noisy**: match probability ≤ α, that is a mismatch with probability ≥ 1 − α;
* **uncertain**: between the two, or held back from clean for its swapped entropy;
* **unreadable**: no usable image or caption; ``reason`` says what is wrong.

With ``keep`` or ``min_score`` the clean part is chosen by rank or by score instead; the rest is divided as above.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from noisyclean.calibration import NoiseRate, match_probability, noise_rate, q_values
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import replacing, write_json
from noisyclean.manifest.parts import list_parts, part_path, read_part, read_part_info
from noisyclean.manifest.schema import (
    CLEAN,
    HIGHER_IS_BETTER,
    MANIFEST_SCHEMA,
    NOISY,
    SPLITS,
    STATISTICS,
    UNCERTAIN,
    UNREADABLE,
)
from noisyclean.progress import SILENT, Progress

MANIFEST = "manifest"
SUMMARY_FILE = "summary.json"
OUT_FILE = "run.json"
DEFAULT_OUT = Path("noisyclean-out")
DEFAULT_FDR = 0.05

EXTREME_ENTROPY = 0.02
"""Share of the otherwise clean pairs held back for their swapped entropy."""


@dataclass(frozen=True)
class SplitRule:
    """What decides who is clean; exactly one of the three.

    Attributes:
        fdr: α, the mismatch rate of the clean part that is asked for.
        keep: the share of the readable pairs to keep, best first.
        min_score: the least value (largest, where lower is better) of ``by``.
        by: the column that ``keep`` and ``min_score`` go by; None: ``rank`` and ``match_score``.
    """

    fdr: float | None = None
    keep: float | None = None
    min_score: float | None = None
    by: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("fdr", "keep", "min_score") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(f"give one of --fdr, --keep and --min-score, not {' and '.join(given) or 'none'}")
        for name in ("fdr", "keep"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"--{name} {value}: a share between 0 and 1, such as 0.05")
        if self.by is not None and self.fdr is not None:
            raise UsageError("--by goes with --keep or --min-score; --fdr goes by the q-value")
        if self.by is not None and self.by not in HIGHER_IS_BETTER:
            raise UsageError(f"--by {self.by}: no such column; there are {', '.join(HIGHER_IS_BETTER)}")

    @property
    def alpha(self) -> float:
        """α of the noisy side."""
        return DEFAULT_FDR if self.fdr is None else self.fdr


@dataclass(frozen=True)
class Summary:
    """``summary.json``: what the corpus turned out to be.

    Attributes:
        pairs: all samples, readable or not.
        clean, noisy, uncertain, unreadable: how many in each split.
        estimated_noise: share of the readable pairs that are random mismatches, with its 95 % ``noise_interval``.
        target_fdr: the mismatch rate asked of ``clean``; None if it was chosen by rank or score.
        expected_clean_noise: the mismatch rate of ``clean`` by its match probabilities.
        rule: the :class:`SplitRule`.
        reasons: rows by reason.
        damaged_shards: shard → what is wrong with its tar.
        seconds, pairs_per_second: of the scoring that this OUT is from.
    """

    pairs: int
    clean: int
    noisy: int
    uncertain: int
    unreadable: int
    estimated_noise: float
    noise_interval: tuple[float, float]
    target_fdr: float | None
    expected_clean_noise: float
    rule: dict[str, Any]
    reasons: dict[str, int]
    damaged_shards: dict[str, str]
    seconds: float | None = None
    pairs_per_second: float | None = None


def split(
    out: Path | str = DEFAULT_OUT,
    *,
    fdr: float | None = None,
    keep: float | None = None,
    min_score: float | None = None,
    by: str | None = None,
    progress: Progress = SILENT,
) -> Summary:
    """Draw (or redraw) the split of scored pairs and write the manifest and ``summary.json``.

    The new manifest replaces the old one at the end, so an interrupted split leaves the old one in place.

    Args:
        out: the OUT folder that ``score`` wrote.
        fdr, keep, min_score, by: see :class:`SplitRule`; nothing given: ``fdr`` 0.05.

    Raises:
        UsageError: OUT holds no scores, or scores by different models, or the rule makes no sense.
        NoisycleanError: the rows written do not add up to the samples scored.
    """
    out = Path(out)
    rule = SplitRule(DEFAULT_FDR if fdr is keep is min_score is None else fdr, keep, min_score, by)
    run = read_out(out)
    shards = list_parts(out)
    missing = sorted(set(run["shards"]) - set(shards))
    if missing:
        raise UsageError(
            f"{out}: {len(missing)} of {len(run['shards'])} shards are not scored yet (the first: {missing[0]}); "
            "repeat the `noisyclean score` command to finish"
        )
    for shard in shards:
        if read_part_info(out, shard).scorer != run["scorer"]:
            path = part_path(out, shard)
            raise UsageError(f"{path}: scored by another model than {out} is of; remove it and score the shard again")
    columns = _read_columns(out, shards)
    noise = noise_rate(columns.p, null_pairs=run["null_pairs"])
    verdict = decide(columns, noise, rule)

    building = out / f".{MANIFEST}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    reasons: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    done = 0
    with progress.task("writing the manifest", len(shards), "shards") as task:
        for shard in shards:
            table = read_part(out, shard)
            readable = int(pc.sum(table["fault"].is_null()).as_py() or 0)
            rows = _manifest_rows(table, verdict, slice(done, done + readable))
            done += readable
            for name, part in rows.items():
                sizes[name] += part.num_rows
                reasons.update(part["reason"].to_pylist())
                with replacing(building / f"split={name}" / f"{_plain(shard)}.parquet") as temporary:
                    pq.write_table(part, temporary, compression="zstd")
            task.advance()
    total = columns.samples
    if sum(sizes.values()) != total:
        raise NoisycleanError(f"{out}: {total:,} samples were scored but {sum(sizes.values()):,} rows came out")
    building.mkdir(parents=True, exist_ok=True)  # a corpus of empty shards has a manifest too: an empty one
    shutil.rmtree(out / MANIFEST, ignore_errors=True)
    building.rename(out / MANIFEST)

    clean = verdict.split == CLEAN
    seconds = run.get("seconds")
    summary = Summary(
        pairs=total,
        **{name: sizes[name] for name in SPLITS},
        estimated_noise=noise.estimate,
        noise_interval=(noise.low, noise.high),
        target_fdr=rule.fdr,
        expected_clean_noise=float(1 - verdict.match_probability[clean].mean()) if clean.any() else 0.0,
        rule={name: value for name, value in asdict(rule).items() if value is not None},
        reasons=dict(reasons.most_common()),
        damaged_shards={shard: damage for shard in shards if (damage := read_part_info(out, shard).damage)},
        seconds=seconds,
        pairs_per_second=round(total / seconds, 1) if seconds else None,
    )
    write_json(out / SUMMARY_FILE, asdict(summary))
    return summary


def read_out(out: Path) -> dict[str, Any]:
    """OUT's ``run.json``: which model scored which shards.

    Raises:
        UsageError: the folder holds no scores.
    """
    path = out / OUT_FILE
    if not path.is_file():
        raise UsageError(f"{out}: no scores in it (no {OUT_FILE}); `noisyclean score SHARDS -o {out}` makes them")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values["shards"], values["null_pairs"], values["scorer"]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path}: not the record of a scored corpus; name the folder that `noisyclean score` wrote"
        ) from error
    return values


@dataclass(frozen=True)
class Columns:
    """What was measured of every readable pair, over the whole corpus in order of shard and position.

    Attributes:
        values: column → (N,) float32.
        samples: how many samples there are, unreadable ones included.
    """

    values: dict[str, NDArray[np.float32]]
    samples: int

    @property
    def p(self) -> NDArray[np.float32]:
        """The p-values."""
        return self.values["p_value"]


@dataclass(frozen=True)
class Verdict:
    """The conclusions on every readable pair; (N,) each.

    Attributes:
        q_value, match_probability: float32 in [0, 1].
        rank: int64, 1 = cleanest.
        split: object array of split names.
        reason: object array of words.
    """

    q_value: NDArray[np.float32]
    match_probability: NDArray[np.float32]
    rank: NDArray[np.int64]
    split: NDArray[np.object_]
    reason: NDArray[np.object_]


def decide(columns: Columns, noise: NoiseRate, rule: SplitRule) -> Verdict:
    """Apply the three-way rule to all readable pairs."""
    p = columns.p
    # In the precision they are written in, so that the rule can be checked (and redrawn) from the manifest.
    q = q_values(p, noise.estimate).astype(np.float32)
    probability = match_probability(p, noise.estimate).astype(np.float32)
    # Pairs above the whole null share the smallest p-value; their match scores still order them.
    order = np.lexsort((-columns.values["match_score"], p))
    rank = np.empty(len(p), np.int64)
    rank[order] = np.arange(1, len(p) + 1)

    alpha = rule.alpha
    split_ = np.full(len(p), UNCERTAIN, dtype=object)
    reason = np.full(len(p), "between the thresholds", dtype=object)
    noisy = probability <= alpha
    split_[noisy], reason[noisy] = NOISY, f"match probability ≤ {alpha:g}"
    known: dict[str, NDArray[Any]] = {**columns.values, "q_value": q, "match_probability": probability, "rank": rank}
    if rule.keep is not None:
        by = rule.by or "rank"
        key = np.asarray(known[by], np.float64) * (-1 if HIGHER_IS_BETTER[by] else 1)
        clean = np.zeros(len(p), np.bool_)
        clean[np.lexsort((rank, key))[: round(rule.keep * len(p))]] = True
        why = f"among the best {rule.keep:.4g} by {by}"
    elif rule.min_score is not None:
        by = rule.by or "match_score"
        higher = HIGHER_IS_BETTER[by]
        clean = np.asarray(known[by] >= rule.min_score if higher else known[by] <= rule.min_score)
        why = f"{by} {'≥' if higher else '≤'} {rule.min_score:g}"
    else:
        # The rate of a whole may leave room for pairs that are mismatches for certain: these are noisy nonetheless.
        clean = (q <= alpha) & ~noisy
        why = f"q ≤ {alpha:g}"
        entropy = columns.values["swapped_entropy"]
        if clean.any():
            extreme = clean & (entropy > np.quantile(entropy[clean], 1 - EXTREME_ENTROPY))
            split_[extreme], reason[extreme] = UNCERTAIN, f"swapped entropy in the top {EXTREME_ENTROPY:.0%}"
            clean &= ~extreme
    split_[clean], reason[clean] = CLEAN, why
    return Verdict(q, probability, rank, split_, reason)


def _plain(shard: str) -> str:
    # A folder called lang=en would be taken for one more column of the hive layout.
    return shard.replace("=", "%3D")


def _read_columns(out: Path, shards: list[str]) -> Columns:
    names = ["p_value", *STATISTICS]
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    samples = 0
    for shard in shards:
        table = read_part(out, shard, ["fault", *names])
        samples += table.num_rows
        readable = table.filter(table["fault"].is_null())
        for name in names:
            parts[name].append(readable[name].to_numpy())
    return Columns(
        {name: np.concatenate([np.zeros(0, np.float32), *values]) for name, values in parts.items()}, samples
    )


def _manifest_rows(table: pa.Table, verdict: Verdict, rows: slice) -> dict[str, pa.Table]:
    """The rows of one shard by split; ``rows`` are its readable pairs' places in the verdict."""
    fault = table["fault"]
    readable = table.filter(fault.is_null()).drop_columns("fault")
    for name, values, kind in (
        ("q_value", verdict.q_value, pa.float32()),
        ("match_probability", verdict.match_probability, pa.float32()),
        ("rank", verdict.rank, pa.int64()),
        ("reason", verdict.reason, pa.string()),
    ):
        readable = readable.append_column(name, pa.array(values[rows], kind))
    found = {name: readable.filter(pa.array(verdict.split[rows] == name)) for name in (CLEAN, NOISY, UNCERTAIN)}
    unreadable = table.filter(fault.is_valid())
    reasons = unreadable["fault"]
    unreadable = unreadable.drop_columns("fault")
    for name, kind in (("q_value", pa.float32()), ("match_probability", pa.float32()), ("rank", pa.int64())):
        unreadable = unreadable.append_column(name, pa.nulls(unreadable.num_rows, kind))
    found[UNREADABLE] = unreadable.append_column("reason", reasons)
    return {name: part.cast(MANIFEST_SCHEMA) for name, part in found.items() if part.num_rows}
