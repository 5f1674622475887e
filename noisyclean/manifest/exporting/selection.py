"""Which rows are exported: those of some splits, one shard at a time, so that memory does not grow with the corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from noisyclean.errors import UsageError
from noisyclean.manifest.reading import ROW_SCHEMA, Manifest, SplitFile
from noisyclean.manifest.schema import SPLITS

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
        UsageError: there is no manifest, split or column of that name, a file of the manifest is broken, or the column
            is no weight.
    """

    def __init__(self, out: Path, splits: Sequence[str], weights: str | None = None) -> None:
        if not splits:
            raise UsageError(f"--split names no split; there are {', '.join(SPLITS)}")
        self._manifest = Manifest(out)
        self._files = self._manifest.files(*sorted(set(splits)))
        self._weights = weights
        # Before anything is written: a look at sizes, and at one column, is nothing beside copying shards.
        self.rows = sum(self._manifest.count(file) for file in self._files)
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
        wanted = {*columns, "index", *([self._weights] if self._weights else [])}
        shards: dict[str, list[SplitFile]] = {}
        for file in self._files:
            shards.setdefault(file.shard, []).append(file)
        for _, files in sorted(shards.items()):
            table = pa.concat_tables(self._manifest.read(file, sorted(wanted)) for file in files).sort_by("index")
            if self._weights is not None:
                table = table.append_column(WEIGHT, table[self._weights])
            if table.num_rows:
                yield table.select(schema.names).cast(schema)

    def _check_weights(self, column: str) -> None:
        kinds = {field.name: field.type for field in ROW_SCHEMA}
        numbers = [name for name, kind in kinds.items() if pa.types.is_floating(kind) or pa.types.is_integer(kind)]
        if column not in numbers:
            raise UsageError(f"--weights {column}: no column of numbers; there are {', '.join(numbers)}")
        for file in self._files:
            values = self._manifest.read(file, [column])[column]
            if values.null_count:
                raise UsageError(f"--weights {column}: {file.split} pairs have none; leave {file.split} out of --split")
            if not pc.all(pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, 1)), min_count=0).as_py():
                raise UsageError(
                    f"--weights {column}: not from 0 to 1 everywhere ({file.path}); take match_probability instead"
                )
