"""``calibrate``: what human labels of a random sample say of a manifest. Fit, score and split never read a label.

The splits are strata: from each, pairs are drawn at random without replacement, in numbers that need not suit its size.
What follows from the labels, if they are right:

* **per split**: the share that matches, with Clopper and Pearson's interval. It is exact for draws with replacement and
  errs on the safe side for those without.
* **the corpus**: the splits' mismatch rates, weighted by their sizes. Its interval is put together from theirs as
  independent errors add, in squares (Zou and Donner's MOVER), which is an approximation.
* **a cut-off**: the largest part ``rank ≤ R`` certified to hold at most ``target`` mismatches. Fixed-sequence testing
  (as in Learn then Test, Angelopoulos et al. 2021): the cut-offs are gone through upwards, each is tested by an upper
  bound of its own that holds with 95 %, and the last before the first failure is taken. Where to begin depends on the
  scores and on how many pairs of each split are labelled, never on what the labels say. So, over the draw of the
  sample, the part named holds more mismatches than ``target`` with a probability of at most 5 %, whether or not the
  scores are any good. What a bad score costs is the size of the part.

The bound of one cut-off: those labelled pairs of a split that lie above the cut-off are a random sample of all that do,
so that each split has a Clopper–Pearson bound there; their weighted sum holds if all of them do. The 5 % are divided
among the splits by their sizes above the cut-off.

The 5 % are those of one look. Whoever looks, labels more and looks again spends them again. And a sample from which the
pairs that are hard to judge were left out is no longer random.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from noisyclean.errors import UsageError
from noisyclean.files import replacing
from noisyclean.manifest.exporting.tables import harmless
from noisyclean.manifest.reading import Manifest, SplitFile
from noisyclean.manifest.schema import CLEAN, NOISY, UNCERTAIN
from noisyclean.manifest.splitting import DEFAULT_OUT
from noisyclean.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd

    FloatArray = NDArray[np.float64]

STRATA: Final = (CLEAN, UNCERTAIN, NOISY)
CONFIDENCE: Final = 0.95
STEPS: Final = 1000
"""Cut-offs: every 1/STEPS of the readable pairs."""

SHOWN: Final = ["shard", "key", "index", "caption", "url", "match_score", "rank"]
"""What the sample tells of a pair, besides its split."""

_WORDS: Final = {
    **dict.fromkeys(("true", "yes", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "0", "0.0"), False),
}


@dataclass(frozen=True)
class LabelledSplit:
    """What the labels say of one split.

    Attributes:
        pairs: its size.
        labelled, matched: how many pairs are labelled, and how many of these as matching.
        precision: the share that matches, with its 95 % ``interval``; None without labels.
    """

    pairs: int
    labelled: int
    matched: int
    precision: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Cutoff:
    """The largest part that is certified.

    Attributes:
        keep: its share of the readable pairs, for ``split --keep``.
        rank: of its last pair, that is its size.
        at_most: the upper bound of its mismatch rate.
    """

    keep: float
    rank: int
    at_most: float


@dataclass(frozen=True)
class Calibration:
    """What the labels say of a manifest.

    Attributes:
        splits: by name: clean, uncertain and noisy.
        mismatch_rate: of all readable pairs by the labels, with its 95 % ``mismatch_interval``; None if a split that
            is not empty has no labels.
        estimated_noise, noise_interval, target_fdr: what the summary says, without labels.
        clean_as_asked: whether the labels allow that the clean part holds no more mismatches than ``target_fdr``; None
            if nothing was asked or no clean pair is labelled.
        target: the mismatch rate that ``cutoff`` is certified not to exceed.
        cutoff: None if no part can be certified.
        labels_needed: a split, for a part to be certified if the rates stay as observed; None if ``cutoff`` is there,
            or if labels will not help.
    """

    splits: dict[str, LabelledSplit]
    mismatch_rate: float | None
    mismatch_interval: tuple[float, float] | None
    estimated_noise: float
    noise_interval: tuple[float, float]
    target_fdr: float | None
    clean_as_asked: bool | None
    target: float
    cutoff: Cutoff | None
    labels_needed: int | None

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class Counts:
    """Pairs at or above each of G cut-offs, by split; (3, G) float64 each, in the order of ``STRATA``.

    Attributes:
        pairs: all of them.
        expected: how many of these are mismatched by their match probabilities.
        labelled: how many are labelled.
        mismatched: how many of these as mismatched.
    """

    pairs: FloatArray
    expected: FloatArray
    labelled: FloatArray
    mismatched: FloatArray


def draw_sample(
    out: Path | str = DEFAULT_OUT,
    *,
    sample: Path | str,
    pairs: int,
    seed: int = 0,
    labels: Path | str | None = None,
    progress: Progress = SILENT,
) -> dict[str, int]:
    """Draw ``pairs`` pairs from each of clean, uncertain and noisy, and write them with an empty column ``matched``.

    A pair's place in the draw is a hash of its identity: the same seed gives the same sample, and a larger sample holds
    the smaller one. The splits take turns, in the order of the draw, so that whoever stops labelling early has labelled
    a random sample as well.

    Args:
        out: the OUT folder.
        sample: the file to write, .csv or .parquet.
        pairs: from each split; a smaller split is taken whole.
        seed: another seed, another sample.
        labels: an earlier, smaller sample of the same split and seed, whose labels are taken over.

    Returns:
        Pairs drawn by split.

    Raises:
        UsageError: there is no manifest, the file is there already or of another kind, or the labels do not fit.
    """
    sample = Path(sample)
    if sample.suffix not in (".csv", ".parquet"):
        raise UsageError(f"{sample}: samples are written as .csv or .parquet")
    if sample.exists():
        raise UsageError(f"{sample}: is there already, perhaps with labels in it; give another name with -o")
    rows = draw_rows(Manifest(out), pairs, seed, progress)
    if labels is None:
        rows["matched"] = None
    else:
        whole = f"the sample of {pairs:,} a split that seed {seed} draws"
        found = _match(_read_labels(Path(labels)), rows, Path(labels), whole)
        rows = rows.merge(found[["shard", "key", "matched"]], how="left", on=["shard", "key"])
    rows = rows.astype({"matched": "boolean"})
    with replacing(sample) as temporary:
        if sample.suffix == ".csv":
            for name in ("caption", "url"):
                rows[name] = harmless(pa.array(rows[name], pa.string(), from_pandas=True)).to_pandas()
            rows.to_csv(temporary, index=False)
        else:
            rows.to_parquet(temporary, index=False)
    return {split: int((rows["split"] == split).sum()) for split in STRATA}


def draw_rows(manifest: Manifest, pairs: int, seed: int, progress: Progress = SILENT) -> pd.DataFrame:
    """The sample of :func:`draw_sample`: ``split`` and the columns ``SHOWN``, the splits taking turns.

    Raises:
        UsageError: a file of the manifest is broken.
    """
    import pandas as pd

    drawn = []
    for split in STRATA:
        rows = _draw(manifest, split, pairs, seed, progress)
        drawn.append(rows.assign(split=split, turn=range(len(rows))))
    return pd.concat(drawn).sort_values("turn", kind="stable", ignore_index=True)[["split", *SHOWN]]


def calibrate(
    out: Path | str = DEFAULT_OUT,
    *,
    labels: Path | str,
    target: float = 0.05,
    progress: Progress = SILENT,
) -> Calibration:
    """Say what the labels of a random sample of each split tell of the manifest; changes nothing.

    Args:
        out: the OUT folder.
        labels: Parquet, CSV or JSON lines with ``shard``, ``key`` and ``matched`` (true, false, yes, no, 1, 0, or
            empty: not labelled). If it has a column ``split``, this must be the present one.
        target: the mismatch rate that a part is to be certified not to exceed.
        progress: is told of the files read.

    Raises:
        UsageError: there is no manifest, or ``summary.json`` is of another one, or the labels are unreadable,
            contradict one another or are of other pairs.
    """
    if not 0 < target < 1:
        raise UsageError(f"--target {target}: a share between 0 and 1, such as 0.05")
    manifest = Manifest(out)
    summary = manifest.summary_of({split: sum(map(manifest.count, manifest.files(split))) for split in STRATA})
    known = _read_labels(Path(labels))
    readable = sum(getattr(summary, split) for split in STRATA)
    # As `split --keep` counts them. A part without pairs is none.
    ranks = {step / STEPS: round(step / STEPS * readable) for step in range(1, STEPS + 1)}
    ranks = {keep: rank for keep, rank in ranks.items() if rank}
    counts = _count(manifest, known, Path(labels), np.array([*ranks.values()]), progress)
    size, labelled, mismatched = (
        values[:, -1].astype(np.int64) for values in (counts.pairs, counts.labelled, counts.mismatched)
    )
    splits = {
        split: _labelled_split(int(size[i]), int(labelled[i]), int(mismatched[i])) for i, split in enumerate(STRATA)
    }
    clean = splits[CLEAN].interval
    rate, interval = stratified_rate(size, labelled, mismatched)
    cutoff = None
    if (at := certify(counts, target)) is not None:
        keep, rank = list(ranks.items())[at]
        cutoff = Cutoff(keep, rank, float(upper_bound(counts.pairs, counts.labelled, counts.mismatched)[at]))
    return Calibration(
        splits=splits,
        mismatch_rate=rate,
        mismatch_interval=interval,
        estimated_noise=summary.estimated_noise,
        noise_interval=summary.noise_interval,
        target_fdr=summary.target_fdr,
        clean_as_asked=None if clean is None or summary.target_fdr is None else 1 - clean[1] <= summary.target_fdr,
        target=target,
        cutoff=cutoff,
        labels_needed=None if cutoff else labels_needed(counts, target),
    )


def stratified_rate(
    size: NDArray[np.int64], labelled: NDArray[np.int64], mismatched: NDArray[np.int64]
) -> tuple[float | None, tuple[float, float] | None]:
    """The mismatch rate of all strata together and its 95 % interval; None if one that is not empty has no labels.

    Args:
        size, labelled, mismatched: (H,) counts by stratum.
    """
    there = size > 0
    if not there.any() or (labelled[there] == 0).any():
        return None, None
    weight = size[there] / size.sum()
    low, high = proportion_interval(mismatched[there], labelled[there])
    rate = mismatched[there] / labelled[there]
    whole = float(weight @ rate)
    below, above = (float(np.linalg.norm(weight * reach)) for reach in (rate - low, high - rate))
    return whole, (max(0.0, whole - below), min(1.0, whole + above))


def proportion_interval(successes: ArrayLike, trials: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Clopper and Pearson's 95 % limits of a proportion, as arrays; 0 and 1 without trials."""
    successes, trials = np.asarray(successes), np.asarray(trials)
    risk = (1 - CONFIDENCE) / 2
    return 1 - _upper_limit(trials - successes, trials, risk), _upper_limit(successes, trials, risk)


def upper_bound(pairs: FloatArray, labelled: FloatArray, mismatched: FloatArray) -> FloatArray:
    """What the mismatch rate above a cut-off exceeds with a probability of 5 % at most; each cut-off by itself.

    Args:
        pairs, labelled, mismatched: (H, G) by stratum and cut-off, the last two not necessarily whole.

    Returns:
        (G,) bounds.
    """
    weight = pairs / pairs.sum(axis=0)
    bound: FloatArray = (weight * _upper_limit(mismatched, labelled, (1 - CONFIDENCE) * weight)).sum(axis=0)
    return bound


def _upper_limit(successes: NDArray[Any], trials: NDArray[Any], risk: ArrayLike) -> FloatArray:
    """Clopper and Pearson's one-sided limit: the proportion at which so few successes have the probability ``risk``."""
    from scipy.stats import beta

    failures = trials - successes
    return np.where(failures > 0, beta.isf(risk, successes + 1, failures), 1.0)


def certify(counts: Counts, target: float) -> int | None:
    """The largest cut-off whose mismatch rate is certified to be ``target`` at most: its place, or None.

    The first to be tested is the one that would have the lowest bound, were the sample spread as the pairs are and the
    labels as the match probabilities say.
    """
    size = np.maximum(counts.pairs[:, -1:], 1)
    rate = counts.labelled[:, -1:] / size
    first = int(np.argmin(upper_bound(counts.pairs, rate * counts.pairs, rate * counts.expected)))
    fails = upper_bound(counts.pairs, counts.labelled, counts.mismatched)[first:] > target
    passed = int(np.argmax(fails)) if fails.any() else len(fails)
    return first + passed - 1 if passed else None


def labels_needed(counts: Counts, target: float) -> int | None:
    """How many labels a split it would take to certify a part, if the rates stay as observed; None: more than pairs.

    No more than a guide: further labels may turn out better or worse than those that there are.
    """
    now = np.maximum(counts.labelled[:, -1:], 1)
    size = counts.pairs[:, -1:]
    for wanted in _growing(int(now.max()), int(size.max())):
        more = np.minimum(wanted, size) / now
        grown = Counts(counts.pairs, counts.expected, more * counts.labelled, more * counts.mismatched)
        if certify(grown, target) is not None:
            return wanted
    return None


def _growing(start: int, stop: int) -> Iterator[int]:
    while start < stop:
        start = min(stop, start + max(1, start // 10))
        yield start


def _labelled_split(pairs: int, labelled: int, mismatched: int) -> LabelledSplit:
    matched = labelled - mismatched
    if not labelled:
        return LabelledSplit(pairs, 0, 0, None, None)
    low, high = proportion_interval(matched, labelled)
    return LabelledSplit(pairs, labelled, matched, matched / labelled, (float(low), float(high)))


def _tables(
    manifest: Manifest, files: Sequence[SplitFile], columns: list[str], what: str, progress: Progress
) -> Iterator[tuple[SplitFile, pa.Table]]:
    """These columns of each file that has rows; a file holds rows of one shard."""
    with progress.task(what, len(files), "files") as task:
        for file in files:
            table = manifest.read(file, columns)
            if table.num_rows:
                yield file, table
            task.advance()


def _count(
    manifest: Manifest, known: pd.DataFrame, labels: Path, ranks: NDArray[np.int64], progress: Progress
) -> Counts:
    """Go through the manifest once, file by file, to count pairs and find those that are labelled."""
    import pandas as pd

    keys = {str(shard): pa.array(rows["key"], pa.string()) for shard, rows in known.groupby("shard")}
    pairs, expected, labelled, mismatched = np.zeros((4, len(STRATA), len(ranks)))
    found = [pd.DataFrame({"split": [], "shard": [], "key": [], "at": []})]
    columns = ["split", "shard", "key", "rank", "match_probability"]
    for file, table in _tables(manifest, manifest.files(*STRATA), columns, "reading the manifest", progress):
        rank, probability = (table[name].to_numpy() for name in ("rank", "match_probability"))
        # A null is NaN here, and in no range.
        if not ((rank >= 1) & (rank <= ranks[-1]) & (probability >= 0) & (probability <= 1)).all():
            raise UsageError(
                f"{file.path}: a rank is not from 1 to {ranks[-1]}, or a match probability not from 0 to 1; "
                f"`noisyclean split {manifest.out}` writes them anew"
            )
        i = STRATA.index(file.split)
        at = np.searchsorted(ranks, rank)
        pairs[i] += np.bincount(at, minlength=len(ranks))
        expected[i] += np.bincount(at, 1 - probability.astype(np.float64), minlength=len(ranks))
        shard = table["shard"][0].as_py()
        if shard in keys:
            named = table.select(["split", "shard", "key"]).append_column("at", pa.array(at))
            found.append(named.filter(pc.is_in(table["key"], keys[shard])).to_pandas())
    judged = _match(known, pd.concat(found), labels, f"the readable pairs of {manifest.out}")
    for i, split in enumerate(STRATA):
        rows = judged[judged["split"] == split]
        labelled[i], mismatched[i] = (
            np.bincount(some["at"].astype(np.int64), minlength=len(ranks)) for some in (rows, rows[~rows["matched"]])
        )
    return Counts(*(values.cumsum(axis=1) for values in (pairs, expected, labelled, mismatched)))


def _match(known: pd.DataFrame, rows: pd.DataFrame, labels: Path, whole: str) -> pd.DataFrame:
    """The row of each label.

    Raises:
        UsageError: a label has no row or several, or was drawn from another split.
    """
    joined = known.merge(rows, how="left", on=["shard", "key"], suffixes=("_drawn", ""))
    _refuse(
        joined,
        joined["split"].isna(),
        labels,
        f"labelled, but not among {whole} (a spreadsheet may have taken the zeros from the front of a key)",
    )
    several = joined.duplicated(["shard", "key"])
    _refuse(joined, several, labels, f"there more than once among {whole}; leave its label out")
    if "split_drawn" in joined:
        _refuse(
            joined,
            joined["split_drawn"] != joined["split"],
            labels,
            "now in another split than when the sample was drawn, which says nothing of the present ones; draw a new "
            "sample, or go back to the old split with `noisyclean split`",
        )
    return joined


def _refuse(rows: pd.DataFrame, wrong: pd.Series[bool], labels: Path, what: str) -> None:
    if wrong.any():
        first = rows[wrong].iloc[0]
        more = f" and {int(wrong.sum()) - 1:,} more" if wrong.sum() > 1 else ""
        raise UsageError(f"{labels}: {first['shard']}/{first['key']}{more}: {what}")


def _read_labels(path: Path) -> pd.DataFrame:
    """``shard``, ``key``, ``matched`` (bool) and maybe ``split`` of the pairs that are labelled."""
    table = _read_table(path)
    if len(table):
        for column in ("shard", "key", "matched"):
            if column not in table:
                raise UsageError(f"{path}: no column {column}; labels have shard, key, matched (with commas in a .csv)")
        if not table.columns.is_unique:
            column = table.columns[table.columns.duplicated()][0]
            raise UsageError(f"{path}: has several columns {column}; keep one")
        table = table.assign(matched=table["matched"].map(_word))
        table = table[table["matched"] != ""]
    if table.empty:
        raise UsageError(f"{path}: no pair is labelled; write true or false in the column matched")
    for column in table.columns.drop("matched"):
        _refuse(table, ~table[column].map(_is_name), path, f"{column} is missing or no text; write it as drawn")
    unknown = ~table["matched"].isin(_WORDS)
    if unknown.any():
        word = table["matched"][unknown].iloc[0]
        _refuse(table, unknown, path, f"matched is {word!r}; write true, false or nothing")
    table = table.astype(str)
    table = table.assign(matched=table["matched"].map(_WORDS).astype(bool))
    twice = table.duplicated(["shard", "key"], keep=False)
    _refuse(table, twice, path, "labelled more than once; keep one label a pair")
    return table


def _read_table(path: Path) -> pd.DataFrame:
    """Those of the four columns that are there, as Python objects; a column may come twice."""
    import pandas as pd

    columns = ["shard", "key", "matched", "split"]
    try:
        if path.suffix.lower() == ".csv":
            # Without a header, or pandas would rename a second column of the same name, and shift rows that are longer.
            cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            table = cells[1:].set_axis(cells.iloc[0], axis=1)
        elif path.suffix.lower() in (".jsonl", ".json"):
            table = pd.DataFrame(_read_lines(path), dtype=object)
        else:
            with pq.ParquetFile(path) as file:
                found = file.read(columns)
            table = pd.DataFrame(dict(enumerate(one.to_pylist() for one in found.columns)), dtype=object)
            table = table.set_axis(found.schema.names, axis=1)
    except (OSError, ValueError, pa.ArrowException) as error:  # the parsers' errors are of these kinds too
        why = " ".join(str(error).split())
        raise UsageError(f"{path}: cannot read the labels ({why}); give .parquet, .csv or .jsonl in UTF-8") from error
    return table.loc[:, table.columns.isin(columns)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    return rows


def _word(value: object) -> str:
    return "" if value is None or value != value else str(value).strip().lower()


def _is_name(value: object) -> bool:
    # Numbers too: some tools make them of keys like 12, and what is lost of 012 is noticed when no pair has that key.
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _draw(manifest: Manifest, split: str, pairs: int, seed: int, progress: Progress) -> pd.DataFrame:
    """The ``pairs`` rows of a split with the smallest hashes, in their order."""
    import pandas as pd

    files = manifest.files(split)
    best = pd.DataFrame({"hash": [], "file": [], "row": []}).astype({"hash": np.uint64, "file": str, "row": int})
    for file, table in _tables(manifest, files, ["shard", "key"], f"drawing from {split}", progress):
        keys = table["key"].to_numpy(zero_copy_only=False).astype(object)
        within = hashlib.blake2b(f"{seed}\0{table['shard'][0].as_py()}".encode(), digest_size=8).hexdigest()
        hashes = pd.util.hash_array(keys, hash_key=within, categorize=False)
        new = pd.DataFrame({"hash": hashes, "file": file.shard, "row": range(len(keys))})
        best = pd.concat([best, new]).sort_values("hash", kind="stable").head(pairs)
    rows = [
        manifest.read(file, SHOWN).take(pa.array(chosen["row"])).to_pandas().assign(hash=chosen["hash"].to_numpy())
        for file in files
        if len(chosen := best[best["file"] == file.shard])
    ]
    if not rows:
        return pd.DataFrame(columns=SHOWN)
    drawn: pd.DataFrame = pd.concat(rows).sort_values("hash", kind="stable")[SHOWN]
    return drawn
