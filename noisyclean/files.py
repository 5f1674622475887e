"""Writing files that are either whole or not there, and what a Parquet file says of itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
_PREFIX = "noisyclean."
_REPEATING = frozenset({"shard", "split", "reason", "fault", "kind"})
"""Columns in which few values repeat. A dictionary of any other column costs twice the time and saves no space."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write one of our tables, whose columns keep their meanings from file to file."""
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        repeating = [name for name in table.column_names if name in _REPEATING]
        pq.write_table(table, temporary, compression="zstd", use_dictionary=repeating)


def with_record(table: pa.Table, record: DataclassInstance) -> pa.Table:
    """The table with a dataclass of strings as its metadata."""
    return table.replace_schema_metadata({f"{_PREFIX}{name}": value for name, value in asdict(record).items()})


def read_record(metadata: dict[bytes, bytes] | None, kind: type[Record]) -> Record:
    """The dataclass that :func:`with_record` left in a Parquet file's metadata.

    Raises:
        KeyError: it is not there, or not whole.
    """
    found = metadata or {}
    return kind(**{one.name: found[f"{_PREFIX}{one.name}".encode()].decode() for one in fields(kind)})
