"""Which rows are exported: those of some splits, one shard at a time, so that memory does not grow with the corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from noisyclean.errors import UsageError
from noisyclean.manifest.schema import MANIFEST_SCHEMA, SPLITS
from noisyclean.manifest.splitting import MANIFEST

ROW_SCHEMA = MANIFEST_SCHEMA.append(pa.field("split", pa.string(), nullable=False))
"""All that a row can be exported with."""

WEIGHT = "weight"


class Selection:
    """The rows of some splits of a manifest, in order of shard and position.

    Attributes:
        rows: how many there are.

    Args:
        out: the OUT folder.
        splits: their names.
        weights: the column that becomes ``weight``, a number from 0 to 1 in every row; None: there is no ``weight``.

    Raises:
        UsageError: there is no manifest, split or column of that name, or the column is no weight.
    """

    def __init__(self, out: Path, splits: Sequence[str], weights: str | None = None) -> None:
        self._out = out
        root = out / MANIFEST
        if not root.is_dir():
            raise UsageError(f"{out}: no manifest in it; `noisyclean split {out}` makes one of its scores")
        for name in splits:
            if name not in SPLITS:
                raise UsageError(f"--split {name}: no such split; there are {', '.join(SPLITS)}")
        if not splits:
            raise UsageError(f"--split names no split; there are {', '.join(SPLITS)}")
        self._files: dict[Path, list[tuple[str, Path]]] = {}  # one entry a shard: its file in each split
        for name in sorted(set(splits), key=SPLITS.index):
            folder = root / f"split={name}"
            for path in folder.rglob("*.parquet"):
                self._files.setdefault(path.relative_to(folder), []).append((name, path))
        self._weights = weights
        self.rows = sum(self._count(path) for files in self._files.values() for _, path in files)
        if weights is not None:
            self._check_weights(weights)

    def schema(self, *columns: str) -> pa.Schema:
        """What the tables of these columns look like."""
        fields = [ROW_SCHEMA.field(name) for name in columns]
        if self._weights is not None:
            fields.append(pa.field(WEIGHT, ROW_SCHEMA.field(self._weights).type, nullable=False))
        return pa.schema(fields)

    def tables(self, *columns: str) -> Iterator[pa.Table]:
        """The named columns, and ``weight`` if there is one, as a table for each shard that has rows."""
        schema = self.schema(*columns)
        wanted = {*columns, "index", *([self._weights] if self._weights else [])} - {"split"}
        for relative in sorted(self._files):
            parts = []
            for split, path in self._files[relative]:
                part = pq.read_table(path, columns=sorted(wanted), partitioning=None)
                parts.append(part.append_column("split", pa.repeat(split, part.num_rows)))
            table = pa.concat_tables(parts).sort_by("index")
            if self._weights is not None:
                table = table.append_column(WEIGHT, table[self._weights])
            if table.num_rows:
                yield table.select(schema.names).cast(schema)

    def _count(self, path: Path) -> int:
        remedy = f"`noisyclean split {self._out}` writes it anew"
        try:
            found = pq.read_metadata(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UsageError(f"{path}: no whole Parquet file; {remedy}") from error
        for name in MANIFEST_SCHEMA.names:
            if name not in found.schema.names:
                raise UsageError(f"{path}: has no column {name}, as of another version of noisyclean; {remedy}")
        return int(found.num_rows)

    def _check_weights(self, column: str) -> None:
        # Before anything is written: a look at one column is nothing beside copying shards.
        kinds = {field.name: field.type for field in ROW_SCHEMA}
        numbers = [name for name, kind in kinds.items() if pa.types.is_floating(kind) or pa.types.is_integer(kind)]
        if column not in numbers:
            raise UsageError(f"--weights {column}: no column of numbers; there are {', '.join(numbers)}")
        for files in self._files.values():
            for split, path in files:
                values = pq.read_table(path, columns=[column], partitioning=None)[column]
                if values.null_count:
                    raise UsageError(f"--weights {column}: {split} pairs have none; leave {split} out of --split")
                if not pc.all(pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, 1)), min_count=0).as_py():
                    raise UsageError(
                        f"--weights {column}: not from 0 to 1 everywhere ({path}); take match_probability instead"
                    )
