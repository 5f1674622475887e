"""The sample of a manifest and what was said of its pairs: one Parquet file, written anew at each word.

Its layout is that of ``calibrate --sample``, so that ``calibrate --labels`` reads it, with one column more: ``unsure``,
for the pairs of which a person could not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.evaluation.labelling import draw_rows
from noisyclean.files import read_record, replacing, with_record
from noisyclean.manifest.reading import Manifest
from noisyclean.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd

Verdict: TypeAlias = Literal["matches", "differs", "unsure"]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)
LABELS_FILE: Final = "labels.parquet"

_IDENTITY: Final = ["split", "shard", "key"]
_WORDS: Final = ["matched", "unsure"]


@dataclass(frozen=True)
class _Draw:
    """What a file of labels says of its sample."""

    seed: str


class Labels:
    """A sample in the order in which it is judged, with the verdicts.

    The splits take turns, as in ``draw_sample``, but in an order that differs from turn to turn: whoever knows which
    split is next is no impartial judge.

    Args:
        out: the OUT folder, whose labels are gone on with where there are any.
        pairs: from each split; a sample that is there already grows to it, and never shrinks.
        seed: of the draw; None: that of the labels in OUT, or else 0.
        progress: is told of the files read.

    Attributes:
        path: ``OUT/labels.parquet``.
        seed: of the draw.
        rows: the columns of ``draw_sample``, ``matched`` (boolean, null where nothing or ``unsure`` was said) and
            ``unsure`` (bool).

    Raises:
        UsageError: there is no manifest, or the labels in OUT are unreadable or of another sample.
    """

    def __init__(self, out: Path, *, pairs: int, seed: int | None, progress: Progress = SILENT) -> None:
        self.path = out / LABELS_FILE
        self._written = _modified(self.path)
        if self._written is None:
            self.seed = seed or 0
            self._save(_draw(out, pairs, self.seed, progress))
            return
        kept, self.seed = _read(self.path, seed)
        largest = int(kept["split"].value_counts().max()) if len(kept) else 0
        self.rows = _take_over(kept, _draw(out, max(pairs, largest), self.seed, progress), self.path)
        if len(self.rows) > len(kept):
            self._save(self.rows)

    def open_places(self) -> list[int]:
        """The places of the pairs of which nothing is said yet."""
        return np.flatnonzero(self.rows["matched"].isna() & ~self.rows["unsure"]).tolist()

    def last_place(self) -> int | None:
        """The place of the pair that was judged last."""
        judged = np.flatnonzero(self.rows["matched"].notna() | self.rows["unsure"])
        return int(judged[-1]) if len(judged) else None

    def counts(self, split: str) -> tuple[int, int]:
        """How many pairs of a split are labelled as matching, and how many are labelled."""
        matched = self.rows.loc[self.rows["split"] == split, "matched"].dropna()
        return int(matched.sum()), len(matched)

    def judge(self, place: int, verdict: Verdict | None) -> None:
        """Keep what is said of a pair, or None to take it back; it is in the file when this returns.

        Raises:
            NoisycleanError: the file was changed by someone else, or cannot be written.
        """
        rows = self.rows.copy()
        said = {"matches": True, "differs": False}
        rows.loc[place, "matched"] = None if verdict is None else said.get(verdict)
        rows.loc[place, "unsure"] = verdict == "unsure"
        self._save(rows)

    def put_away(self) -> Path:
        """Rename the file to one with the time in its name, and return that."""
        kept = self.path.with_stem(f"{self.path.stem}-{datetime.now().astimezone():%Y%m%d-%H%M%S}")
        self._see_that_it_is_ours()
        return self.path.rename(kept)

    def _save(self, rows: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(rows, preserve_index=False)
        self._see_that_it_is_ours()
        with replacing(self.path) as temporary:
            pq.write_table(with_record(table, _Draw(str(self.seed))), temporary)
        self._written = _modified(self.path)
        self.rows = rows

    def _see_that_it_is_ours(self) -> None:
        if _modified(self.path) != self._written:
            raise NoisycleanError(
                f"{self.path}: changed by another program; nothing was written over it: end this review and repeat the "
                "command to go on with what is there"
            )


def _modified(path: Path) -> int | None:
    """When a file was written, in nanoseconds; None: there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def _draw(out: Path, pairs: int, seed: int, progress: Progress) -> pd.DataFrame:
    rows = draw_rows(Manifest(out), pairs, seed, progress)
    # A larger sample begins with the smaller one, and so do the random numbers.
    turn, within = rows.groupby("split").cumcount().to_numpy(), np.random.default_rng(seed).random(len(rows))
    rows = rows.assign(matched=None, unsure=False).iloc[np.lexsort([within, turn])]
    return rows.astype({"matched": "boolean", "unsure": bool}).reset_index(drop=True)


def _read(path: Path, asked: int | None) -> tuple[pd.DataFrame, int]:
    """Identity and words of the pairs in a file, and the seed of their draw.

    Raises:
        UsageError: it is broken, or drawn with another seed than was asked for.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        if "unsure" in table.column_names:
            seed = int(read_record(table.schema.metadata, _Draw).seed)
        else:  # as `calibrate --sample` wrote it, which does not say its seed
            table = table.append_column("unsure", pa.repeat(False, len(table)))
            seed = asked or 0
        rows = table.select([*_IDENTITY, *_WORDS]).to_pandas().astype({"matched": "boolean", "unsure": bool})
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"{path}: cannot read the labels ({why}); rename the file to begin with none") from error
    if asked not in (None, seed):
        raise UsageError(f"{path}: drawn with --seed {seed}; leave --seed away to go on with it, or rename the file")
    return rows, seed


def _take_over(kept: pd.DataFrame, rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The rows with the words of those that are kept.

    Raises:
        UsageError: some of these are not among the rows, or there more than once.
    """
    bare = rows.drop(columns=_WORDS)
    if len(bare.merge(kept, how="outer", on=_IDENTITY)) != len(rows):
        raise UsageError(
            f"{path}: of another sample, or of another split than the present one; rename the file to draw a new sample"
        )
    joined = bare.merge(kept, how="left", on=_IDENTITY)
    return joined.assign(unsure=joined["unsure"].eq(True)).astype({"matched": "boolean", "unsure": bool})
