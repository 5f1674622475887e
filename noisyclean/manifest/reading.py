"""Reading what ``score`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from noisyclean.errors import UsageError
from noisyclean.manifest.schema import MANIFEST_SCHEMA, SPLITS
from noisyclean.manifest.splitting import DEFAULT_OUT, MANIFEST, SUMMARY_FILE, Summary

if TYPE_CHECKING:
    import pandas as pd


class Manifest:
    """The manifest in an OUT folder.

    >>> Manifest("noisyclean-out").pairs("clean")["key"]

    Raises:
        UsageError: there is no manifest in the folder.
    """

    def __init__(self, out: Path | str = DEFAULT_OUT) -> None:
        self.out = Path(out)
        if not (self.out / MANIFEST).is_dir():
            raise UsageError(f"{self.out}: no manifest in it; `noisyclean score SHARDS -o {self.out}` makes one")

    @property
    def summary(self) -> Summary:
        """``summary.json``.

        Raises:
            UsageError: it is missing or broken.
        """
        path = self.out / SUMMARY_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            for name in ("noise_interval", "close_interval", "in_sample_interval"):  # JSON has no tuples
                values[name] = None if values[name] is None else tuple(values[name])
            return Summary(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{path}: missing or broken; `noisyclean split {self.out}` writes it anew") from error

    def table(self, *splits: str, columns: list[str] | None = None) -> pa.Table:
        """The rows of the named splits (none named: of all) with a ``split`` column, in no particular order.

        Raises:
            UsageError: there is no such split or column.
        """
        parts = []
        schema = MANIFEST_SCHEMA.append(pa.field("split", pa.string()))
        for column in columns or []:
            if column not in schema.names:
                raise UsageError(f"{column}: no such column; there are {', '.join(schema.names)}")
        wanted = None if columns is None else [one for one in columns if one != "split"]
        for name in splits or SPLITS:
            if name not in SPLITS:
                raise UsageError(f"{name}: no such split; there are {', '.join(SPLITS)}")
            for path in sorted((self.out / MANIFEST / f"split={name}").rglob("*.parquet")):
                part = pq.read_table(path, columns=wanted, partitioning=None)
                parts.append(part.append_column("split", pa.repeat(name, part.num_rows)))
        if not parts:
            return schema.empty_table().select(schema.names if wanted is None else [*wanted, "split"])
        return pa.concat_tables(parts)

    def pairs(self, *splits: str, columns: list[str] | None = None) -> pd.DataFrame:
        """The same as a pandas frame."""
        frame: pd.DataFrame = self.table(*splits, columns=columns).to_pandas()
        return frame
