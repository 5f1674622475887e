"""The rows of a manifest as a DuckDB table: counted, sorted and drawn from without holding them in Python."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa

from noisyclean.manifest.ranking import MEMORY_LIMIT
from noisyclean.manifest.reading import ROW_SCHEMA, Manifest, SplitFile
from noisyclean.progress import SILENT, Progress

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

AT_RANDOM = "md5(shard || '/' || key || '{seed}')"
"""SQL that puts rows in an order which is their own: the same for the same seed, wherever the rows lie."""

_INSERTED_AT_ONCE = 2**17
"""Rows that are handed on together: calls cost more than rows."""


@contextmanager
def open_rows(
    manifest: Manifest, *splits: str, columns: Sequence[str], progress: Progress = SILENT
) -> Iterator[DuckDBPyConnection]:
    """A database with these columns of the named splits (none named: of all) in the table ``rows``.

    What does not fit its memory lies on the disk, in a temporary folder.

    Raises:
        UsageError: there is no such split, or a file of the manifest is broken.
    """
    import duckdb

    files = manifest.files(*splits)
    with (
        tempfile.TemporaryDirectory(prefix="noisyclean-rows-") as scratch,
        duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": scratch}) as db,
    ):
        db.execute("set enable_progress_bar = false")  # it would write to stdout
        _fill(db, manifest, files, columns, progress)
        yield db


def _fill(
    db: DuckDBPyConnection, manifest: Manifest, files: Sequence[SplitFile], columns: Sequence[str], progress: Progress
) -> None:
    batch = pa.schema([ROW_SCHEMA.field(name) for name in columns]).empty_table()
    db.execute("create table rows as select * from batch")
    waiting: list[pa.Table] = []
    with progress.task("reading the manifest", len(files), "files") as task:
        for number, file in enumerate(files, 1):
            waiting.append(manifest.read(file, columns))
            if number == len(files) or sum(map(len, waiting)) >= _INSERTED_AT_ONCE:
                batch = pa.concat_tables(waiting)  # noqa: F841 - DuckDB finds it by its name
                db.execute("insert into rows select * from batch")
                waiting.clear()
            task.advance()
