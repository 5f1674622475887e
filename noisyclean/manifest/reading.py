"""Reading what ``score`` and ``split`` wrote: the one way to the files of a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from noisyclean.corpus.remote import MissingObjectError
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import is_remote, open_parquet, parquet_files, place, read_bytes, state_in_store
from noisyclean.manifest.schema import MANIFEST_SCHEMA, SPLITS
from noisyclean.manifest.splitting import DEFAULT_OUT, MANIFEST, SUMMARY_FILE, Summary

if TYPE_CHECKING:
    import pandas as pd

ROW_SCHEMA = MANIFEST_SCHEMA.append(pa.field("split", pa.string(), nullable=False))
"""A row of the manifest as one table."""


@dataclass(frozen=True)
class SplitFile:
    """One Parquet file of a manifest: the rows of one shard that are in one split.

    Attributes:
        split: its name.
        shard: the file's path in the folder of the split, which is the same in each split.
        path: where it lies.
    """

    split: str
    shard: str
    path: Path


class Manifest:
    """The manifest in an OUT folder.

    >>> Manifest("noisyclean-out").pairs("clean")["key"]

    In a store, where a manifest is replaced file by file, all that is read is of the one that was opened.

    Raises:
        UsageError: there is no manifest in the folder.
        NoisycleanError: on reading, that it was replaced since.
    """

    def __init__(self, out: Path | str = DEFAULT_OUT) -> None:
        self.out = place(out)
        # In a store the manifest is replaced file by file: the summary goes first, and comes last.
        self._state = state_in_store(self.out / SUMMARY_FILE) if is_remote(self.out) else None
        is_whole = self._state is not None if is_remote(self.out) else (self.out / MANIFEST).is_dir()
        if not is_whole:
            raise UsageError(
                f"{self.out}: no manifest in it; `noisyclean split {self.out}` makes one of scores, "
                f"and `noisyclean score SHARDS -o {self.out}` makes both"
            )

    @property
    def summary(self) -> Summary:
        """``summary.json``.

        Raises:
            UsageError: it is missing or broken.
        """
        path = self.out / SUMMARY_FILE
        try:
            values = json.loads(read_bytes(path), parse_constant=_refuse_constant)
            self._refuse_replaced()
            return TypeAdapter(Summary).validate_python(values)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path}: missing or broken ({_explain(error)}); `noisyclean split {self.out}` writes it anew"
            ) from error

    def summary_of(self, sizes: Mapping[str, int]) -> Summary:
        """The summary, if it says these sizes of the splits: then it is of this manifest.

        Raises:
            UsageError: it is missing, broken or of another manifest.
        """
        summary = self.summary
        for split, there in sizes.items():
            said = getattr(summary, split)
            if said != there:
                raise UsageError(
                    f"{self.out / SUMMARY_FILE}: says {said:,} {split} pairs, and the manifest has {there:,}; "
                    f"`noisyclean split {self.out}` writes both anew"
                )
        return summary

    def files(self, *splits: str) -> list[SplitFile]:
        """The files of the named splits (none named: of all), each split's in order of path.

        Raises:
            UsageError: there is no such split.
        """
        found = []
        self._refuse_replaced()  # before too: no whole split takes less time than a list, but the end of one may
        for name in splits or SPLITS:
            if name not in SPLITS:
                raise UsageError(f"{name}: no such split; there are {', '.join(SPLITS)}")
            folder = self.out / MANIFEST / f"split={name}"
            found += [
                SplitFile(name, shard, path)
                for path, shard in sorted((folder / one, one) for one in parquet_files(folder))
            ]
        self._refuse_replaced()
        return found

    def count(self, file: SplitFile) -> int:
        """How many rows a file has.

        Raises:
            UsageError: it is no whole Parquet file, or lacks a column.
        """
        with self._open(file) as parquet:
            return int(parquet.metadata.num_rows)

    def read(self, file: SplitFile, columns: Sequence[str]) -> pa.Table:
        """These columns of a file, as :data:`ROW_SCHEMA` has them.

        Raises:
            UsageError: it is no whole Parquet file, lacks a column, or has other things in one.
        """
        with self._open(file) as parquet:
            table = parquet.read([name for name in columns if name != "split"])
            table = table.append_column("split", pa.repeat(file.split, parquet.metadata.num_rows))
            return table.select(columns).cast(_schema(columns))

    @contextmanager
    def _open(self, file: SplitFile) -> Iterator[pq.ParquetFile]:
        try:
            with open_parquet(file.path) as parquet:
                missing = set(MANIFEST_SCHEMA.names) - set(parquet.schema_arrow.names)
                if missing:
                    raise ValueError(f"no column {min(missing)}, as of another version of noisyclean")
                yield parquet
                self._refuse_replaced()
        except MissingObjectError:
            self._refuse_replaced()
            raise
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            why = " ".join(str(error).split())
            raise UsageError(
                f"{file.path}: cannot read the manifest ({why}); `noisyclean split {self.out}` writes it anew"
            ) from error

    def _refuse_replaced(self) -> None:
        if is_remote(self.out) and state_in_store(self.out / SUMMARY_FILE) != self._state:
            raise NoisycleanError(f"{self.out}: its manifest was replaced while it was read; repeat the command")

    def table(self, *splits: str, columns: list[str] | None = None) -> pa.Table:
        """The rows of the named splits (none named: of all) with a ``split`` column, in no particular order.

        Raises:
            UsageError: there is no such split or column, or a file of the manifest is broken.
        """
        for column in columns or []:
            if column not in ROW_SCHEMA.names:
                raise UsageError(f"{column}: no such column; there are {', '.join(ROW_SCHEMA.names)}")
        names = list(dict.fromkeys([*(MANIFEST_SCHEMA.names if columns is None else columns), "split"]))
        parts = [self.read(file, names) for file in self.files(*splits)]
        return pa.concat_tables([_schema(names).empty_table(), *parts])

    def pairs(self, *splits: str, columns: list[str] | None = None) -> pd.DataFrame:
        """The same as a pandas frame."""
        frame: pd.DataFrame = self.table(*splits, columns=columns).to_pandas()
        return frame


def _schema(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([ROW_SCHEMA.field(name) for name in columns])


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _explain(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])
