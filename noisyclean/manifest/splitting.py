"""``split``: from the scores of all shards to ranks, q-values and the clean / noisy / uncertain manifest. No model.

Two passes over the score parts. The first reads a few numbers of each pair, from which come the mismatch rate, the
q-values and the ranks; the second writes the rows, shard by shard. Memory does not grow with the corpus.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from noisyclean.calibration import STOREY_LAMBDA, NoiseRate, close_noise, noise_rate_of_tail
from noisyclean.corpus.parallel import THREADS, default_workers, map_in_threads
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import (
    is_file,
    is_remote,
    place,
    read_bytes,
    rebuilding,
    refuse_mixture,
    remove_leftovers,
    write_json,
    write_parquet,
)
from noisyclean.manifest.nulls import Nulls, read_nulls
from noisyclean.manifest.parts import list_parts, part_path, read_part, read_part_info
from noisyclean.manifest.ranking import PairTable
from noisyclean.manifest.rematch import BankNames
from noisyclean.manifest.rules import DEFAULT_FDR, Decision, SplitRule
from noisyclean.manifest.schema import CLEAN, MANIFEST_SCHEMA, MEASURED, NOISY, SPLITS, UNCERTAIN, UNREADABLE
from noisyclean.progress import SILENT, Progress

MANIFEST = "manifest"
SUMMARY_FILE = "summary.json"
OUT_FILE = "run.json"
DEFAULT_OUT = Path("noisyclean-out")

_READ_AT_ONCE = 2**20
"""Rows whose numbers are read before they are handed on: calls cost more than rows."""


@dataclass(frozen=True)
class Summary:
    """``summary.json``: what the corpus turned out to be.

    Attributes:
        pairs: all samples, readable or not.
        clean, noisy, uncertain, unreadable: how many in each split.
        estimated_noise: share of the readable pairs that are random mismatches, with its 95 % ``noise_interval``.
        close_noise: about the share of them that are mismatched, but close: as a caption that is like the right one is.
            With its ``close_interval``; None where too few pairs look true to make near misses of them.
        near_miss_pass_rate: share of such near misses that would be in ``clean``.
        in_sample: pairs that the model which scored them has trained on. ``estimated_noise`` is of the others.
        in_sample_noise: what the estimate would be of these, with its ``in_sample_interval``: as far as it is lower,
            mismatches are learned by heart, and the rates of the split are not what they are said to be. None where
            there are none.
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
    close_noise: float | None
    close_interval: tuple[float, float] | None
    near_miss_pass_rate: float | None
    in_sample: int
    in_sample_noise: float | None
    in_sample_interval: tuple[float, float] | None
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

    The new manifest replaces the old one at the end, so an interrupted split leaves the old one in place. But in a
    store, one that is interrupted while it writes leaves none: there ``summary.json``, which is written last, says that
    the manifest is whole.

    Args:
        out: the OUT folder that ``score`` wrote.
        fdr, keep, min_score, by: see :class:`SplitRule`; nothing given: ``fdr`` 0.05.

    Raises:
        UsageError: OUT holds no scores, or scores by different models, or the rule makes no sense, or goes by a column
            that no pair has a value in.
        NoisycleanError: the rows written do not add up to the samples scored, or another split wrote meanwhile.
    """
    out = place(out)
    rule = SplitRule(DEFAULT_FDR if fdr is keep is min_score is None else fdr, keep, min_score, by)
    run = read_out(out)
    shards = list_parts(out)
    damage = _check_parts(out, run, shards)
    nulls = read_nulls(out)
    if rule.by == "near_miss_p_value" and not len(nulls.near_miss_p):
        raise UsageError(
            f"--by {rule.by}: no pair of {out} has one, as no near misses could be made; take --by p_value"
        )
    bank = BankNames.read(out, shards, progress) if run.get("rematch") else BankNames.none()

    remove_leftovers(out)
    # A corpus of empty shards has a manifest too: an empty one.
    with PairTable(rule, scratch=None if is_remote(out) else out) as table:
        scan = _scan(out, shards, table, nulls, progress)
        # Pairs that a model has trained on say nothing of how many it would take for mismatches.
        noise = (scan.unseen if scan.unseen.pairs else scan.in_sample).noise_rate(run["null_pairs"])
        # A hold-out of few pairs tells the rate of all badly: the split goes by the upper end of what it may be.
        decision = table.decide(replace(noise, estimate=noise.high) if scan.in_sample.pairs else noise)
        # Only here, where all is read and decided: in a store, the old manifest goes at once.
        with rebuilding(out / MANIFEST, mark=out / SUMMARY_FILE) as building:
            written = _write_manifest(out, building, shards, scan, table.ranks(), decision, bank, progress)
            if (rows := sum(written.sizes.values())) != scan.samples:
                raise NoisycleanError(f"{out}: {scan.samples:,} samples were scored but {rows:,} rows came out")

    close = _close_noise(scan, noise, nulls)
    trained = scan.in_sample.noise_rate(run["null_pairs"]) if scan.in_sample.pairs else None
    seconds = run.get("seconds")
    summary = Summary(
        pairs=scan.samples,
        **{name: written.sizes[name] for name in SPLITS},
        estimated_noise=noise.estimate,
        noise_interval=(noise.low, noise.high),
        close_noise=None if close is None else close.estimate,
        close_interval=None if close is None else (close.low, close.high),
        near_miss_pass_rate=_near_miss_pass_rate(decision, nulls),
        in_sample=scan.in_sample.pairs,
        in_sample_noise=None if trained is None else trained.estimate,
        in_sample_interval=None if trained is None else (trained.low, trained.high),
        target_fdr=rule.fdr,
        expected_clean_noise=written.clean_noise / max(written.sizes[CLEAN], 1),
        rule={name: value for name, value in asdict(rule).items() if value is not None},
        reasons=dict(written.reasons.most_common()),
        damaged_shards=damage,
        seconds=seconds,
        pairs_per_second=round(scan.samples / seconds, 1) if seconds else None,
    )
    if is_remote(out):
        refuse_mixture(out / MANIFEST, out / SUMMARY_FILE, written.files)
    write_json(out / SUMMARY_FILE, asdict(summary))
    return summary


def read_out(out: Path) -> dict[str, Any]:
    """OUT's ``run.json``: which model scored which shards.

    Raises:
        UsageError: the folder holds no scores.
    """
    path = out / OUT_FILE
    if not is_file(path):
        raise UsageError(f"{out}: no scores in it (no {OUT_FILE}); `noisyclean score SHARDS -o {out}` makes them")
    try:
        values: dict[str, Any] = json.loads(read_bytes(path))
        values["shards"], values["null_pairs"], values["scorer"]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path}: not the record of a scored corpus; name the folder that `noisyclean score` wrote"
        ) from error
    return values


@dataclass
class _Tally:
    """How many pairs there are, how many score lower than half of the null, and how many are less similar."""

    pairs: int = 0
    low_scores: int = 0
    low_similarities: int = 0

    def add(self, low_score: NDArray[np.bool_], low_similarity: NDArray[np.bool_]) -> None:
        self.pairs += len(low_score)
        self.low_scores += int(low_score.sum())
        self.low_similarities += int(low_similarity.sum())

    def noise_rate(self, null_pairs: int) -> NoiseRate:
        """The smaller of two upper bounds: by the match score, and by the similarity alone.

        The match score tells more pairs from random ones. But a mismatched pair whose true partner is in the bank, as
        where a small corpus was permuted within itself, scores below the null, and is counted twice; its similarity
        knows nothing of partners.
        """
        smaller = min(self.low_scores, self.low_similarities)
        return noise_rate_of_tail(smaller, pairs=self.pairs, null_pairs=null_pairs)


@dataclass
class _Scan:
    """What the first pass found.

    Attributes:
        readable: of each shard, how many of its samples can be read.
        samples: how many there are in all.
        unseen, in_sample: the readable pairs that the model which scored them has not, or has, trained on.
        compared_with_near_misses: pairs of folds that have near misses.
        below_near_misses: of these, the pairs that score lower than half of the near misses.
    """

    readable: list[int] = field(default_factory=list)
    samples: int = 0
    unseen: _Tally = field(default_factory=_Tally)
    in_sample: _Tally = field(default_factory=_Tally)
    compared_with_near_misses: int = 0
    below_near_misses: int = 0

    @property
    def pairs(self) -> int:
        """The readable samples."""
        return self.unseen.pairs + self.in_sample.pairs


def _check_parts(out: Path, run: dict[str, Any], shards: Sequence[str]) -> dict[str, str]:
    """See that all shards are scored by one model; returns shard → what is wrong with its tar, where anything is."""
    missing = sorted(set(run["shards"]) - set(shards))
    if missing:
        raise UsageError(
            f"{out}: {len(missing)} of {len(run['shards'])} shards are not scored yet (the first: {missing[0]}); "
            "repeat the `noisyclean score` command to finish"
        )
    damage = {}
    for shard, info in zip(shards, map_in_threads(partial(read_part_info, out), shards), strict=True):
        if info.scorer != run["scorer"]:
            path = part_path(out, shard)
            raise UsageError(f"{path}: scored by another model than {out} is of; remove it and score the shard again")
        if info.damage:
            damage[shard] = info.damage
    return damage


def _scan(out: Path, shards: Sequence[str], table: PairTable, nulls: Nulls, progress: Progress) -> _Scan:
    """Read what ranks the pairs into ``table``, and count what the noise rates need."""
    scan = _Scan()
    waiting: list[pa.Table] = []

    def hand_on() -> None:
        if waiting:
            table.add(pa.concat_tables(waiting))
            waiting.clear()

    with progress.task("ranking the pairs", len(shards), "shards") as task:
        columns = ["fault", "fold", "in_sample", *MEASURED]
        for part in map_in_threads(partial(read_part, out, columns=columns), shards):
            scan.samples += part.num_rows
            part = part.filter(part["fault"].is_null())
            scan.readable.append(part.num_rows)
            low_score = part["p_value"].to_numpy() > STOREY_LAMBDA
            low_similarity = part["similarity"].to_numpy() < nulls.similarity_median[part["fold"].to_numpy()]
            trained = part["in_sample"].to_numpy()
            scan.in_sample.add(low_score[trained], low_similarity[trained])
            scan.unseen.add(low_score[~trained], low_similarity[~trained])
            near = part["near_miss_p_value"].drop_null().to_numpy()
            scan.compared_with_near_misses += len(near)
            scan.below_near_misses += int((near > STOREY_LAMBDA).sum())
            waiting.append(part)
            if scan.pairs - table.pairs >= _READ_AT_ONCE:
                hand_on()
            task.advance()
        hand_on()
    return scan


def _close_noise(scan: _Scan, random: NoiseRate, nulls: Nulls) -> NoiseRate | None:
    pairs = scan.compared_with_near_misses
    if not pairs:
        return None
    return close_noise(scan.below_near_misses / pairs, random, nulls.below_near_misses, pairs=pairs)


def _near_miss_pass_rate(decision: Decision, nulls: Nulls) -> float | None:
    """The share of near misses whose p-value is clean; their swapped entropies are not asked."""
    clean = decision.calibration.p[decision.clean_places]
    if decision.rule.fdr is None or not len(nulls.near_miss_p):
        return None
    return float(np.mean(nulls.near_miss_p <= clean[-1])) if len(clean) else 0.0


@dataclass
class _Written:
    """Rows by split and by reason, the bytes of each file, and the sum of 1 − match probability over the clean rows."""

    sizes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    files: dict[str, int] = field(default_factory=dict)
    clean_noise: float = 0.0

    def add(self, other: _Written) -> None:
        self.sizes += other.sizes
        self.reasons += other.reasons
        self.files |= other.files
        self.clean_noise += other.clean_noise


def _write_manifest(
    out: Path,
    building: Path,
    shards: Sequence[str],
    scan: _Scan,
    ranks: Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]],
    decision: Decision,
    bank: BankNames,
    progress: Progress,
) -> _Written:
    total = _Written()

    def write(one: tuple[str, tuple[NDArray[np.int64], NDArray[np.bool_]]]) -> _Written:
        shard, (rank, kept) = one
        return _write_shard(out, building, shard, rank, kept, decision, bank)

    with progress.task("writing the manifest", len(shards), "shards") as task:
        # Threads, as Arrow and zstd work outside Python's lock.
        todo = zip(shards, _by_shard(ranks, scan.readable), strict=True)
        for written in map_in_threads(write, todo, THREADS if is_remote(out) else default_workers()):
            total.add(written)
            task.advance()
    return total


def _by_shard(
    ranks: Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]], sizes: Sequence[int]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Cut a stream of (rank, kept) into pieces of the given sizes."""
    rank, kept = np.zeros(0, np.int64), np.zeros(0, np.bool_)
    for size in sizes:
        while len(rank) < size:
            more_rank, more_kept = next(ranks)
            rank, kept = np.concatenate([rank, more_rank]), np.concatenate([kept, more_kept])
        yield rank[:size], kept[:size]
        rank, kept = rank[size:], kept[size:]


def _write_shard(
    out: Path,
    building: Path,
    shard: str,
    rank: NDArray[np.int64],
    kept: NDArray[np.bool_],
    decision: Decision,
    bank: BankNames,
) -> _Written:
    """Write the rows of one shard, a file for each split that has any."""
    table = read_part(out, shard)
    fault = table["fault"]
    readable = table.filter(fault.is_null())
    verdict = decision.judge({name: readable[name].to_numpy() for name in MEASURED}, rank, kept)
    reasons = pa.array([why for _, why in verdict.reasons]).take(pa.array(verdict.code))
    readable = bank.suggest(readable, verdict.is_in(NOISY))
    readable = _with_conclusions(readable, verdict.q_value, verdict.match_probability, rank, reasons)
    rows = {name: readable.filter(pa.array(verdict.is_in(name))) for name in (CLEAN, NOISY, UNCERTAIN)}

    unreadable = table.filter(fault.is_valid())
    nothing = [pa.nulls(unreadable.num_rows)] * 3
    unreadable = bank.suggest(unreadable, np.zeros(unreadable.num_rows, np.bool_))
    rows[UNREADABLE] = _with_conclusions(unreadable, *nothing, unreadable["fault"])

    written = _Written()
    for name, part in rows.items():
        if part.num_rows == 0:
            continue
        written.sizes[name] = part.num_rows
        for why in part["reason"].value_counts().to_pylist():
            written.reasons[why["values"]] += why["counts"]
        part = part.select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA)
        file = f"split={name}/{_plain(shard)}.parquet"
        written.files[file] = write_parquet(building / file, part)
    clean = verdict.is_in(CLEAN)
    written.clean_noise = float((1 - verdict.match_probability[clean].astype(np.float64)).sum())
    return written


def _with_conclusions(table: pa.Table, *conclusions: Any) -> pa.Table:
    for name, values in zip(("q_value", "match_probability", "rank", "reason"), conclusions, strict=True):
        table = table.append_column(name, values if isinstance(values, pa.ChunkedArray) else pa.array(values))
    return table


def _plain(shard: str) -> str:
    # A folder called lang=en would be taken for one more column of the hive layout.
    return shard.replace("%", "%25").replace("=", "%3D")
