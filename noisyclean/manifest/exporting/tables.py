"""The formats that are one file: ``keys``, ``csv``, ``jsonl`` and DataComp's array of uids. No shard is opened."""

from __future__ import annotations

import json
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from noisyclean.errors import UsageError
from noisyclean.manifest.exporting.selection import Selection
from noisyclean.manifest.reading import ROW_SCHEMA
from noisyclean.progress import Task

KEY_COLUMNS = ("shard", "key", "index", "uid")

UID_DTYPE = np.dtype("u8,u8")
"""DataComp's uid: its first and its last 16 hex digits."""

_UID = "^[0-9a-fA-F]{32}$"

# Control characters, and the two line separators that some readers take for the end of a row.
_CONTROL = r"[\x00-\x1f\x7f-\x9f\x{2028}\x{2029}]"
# What a spreadsheet takes for a formula; East Asian ones take the wide signs too.
_FORMULA = r"^(\s*[=+\-@＝＋－＠])"


def write_keys(file: BinaryIO, selection: Selection, task: Task) -> int:
    """Write ``KEY_COLUMNS`` as Parquet; returns how many rows."""
    rows = 0
    with pq.ParquetWriter(file, selection.schema(*KEY_COLUMNS), compression="zstd") as writer:
        for table in selection.tables(*KEY_COLUMNS):
            writer.write_table(table)
            rows += table.num_rows
            task.advance(table.num_rows)
    return rows


def write_csv(file: BinaryIO, selection: Selection, task: Task) -> int:
    """Write all columns as CSV that is safe to open in a spreadsheet; returns how many rows.

    In text, control characters (line breaks and tabs among them) become spaces, and an apostrophe is put before what
    would be run as a formula. ``keys`` and ``jsonl`` have every text as it is.
    """
    rows = 0
    with pa.csv.CSVWriter(file, selection.schema(*ROW_SCHEMA.names)) as writer:
        for table in selection.tables(*ROW_SCHEMA.names):
            for at, field in enumerate(table.schema):
                if pa.types.is_string(field.type):
                    table = table.set_column(at, field, harmless(table[field.name]))
            writer.write_table(table)
            rows += table.num_rows
            task.advance(table.num_rows)
    return rows


def harmless(text: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Text that no spreadsheet takes for a formula, and no reader of lines for two."""
    plain = pc.replace_substring_regex(text, pattern=_CONTROL, replacement=" ")
    return pc.replace_substring_regex(plain, pattern=_FORMULA, replacement=r"'\1")


def write_jsonl(file: BinaryIO, selection: Selection, task: Task) -> int:
    """Write all columns as one JSON object a line, in ASCII; returns how many rows."""
    rows = 0
    for table in selection.tables(*ROW_SCHEMA.names):
        for row in table.to_pylist():
            file.write(json.dumps(row).encode() + b"\n")
        rows += table.num_rows
        task.advance(table.num_rows)
    return rows


def write_uids(file: BinaryIO, selection: Selection, task: Task) -> int:
    """Write the uids as DataComp has its subsets: a sorted ``UID_DTYPE`` array, repeated uids kept; returns how many.

    16 bytes of memory a row.

    Raises:
        UsageError: a pair has no uid of 32 hex digits.
    """
    uids = np.empty(selection.rows, UID_DTYPE)
    rows = 0
    for table in selection.tables("shard", "key", "uid"):
        usable = pc.fill_null(pc.match_substring_regex(table["uid"], _UID), False)
        if not pc.all(usable).as_py():
            first: dict[str, str | None] = table.filter(pc.invert(usable)).slice(0, 1).to_pylist()[0]
            uid = "missing" if first["uid"] is None else repr(first["uid"])
            raise UsageError(
                f"shard {first['shard']}, key {first['key']}: its uid is {uid}, and DataComp's are 32 hex digits "
                "in the json of each sample; use --format shards or keys, which need none"
            )
        uids[rows : rows + table.num_rows] = parse_uids(table["uid"])
        rows += table.num_rows
        task.advance(table.num_rows)
    uids.sort()
    np.lib.format.write_array(file, uids, allow_pickle=False)
    return rows


def parse_uids(uids: pa.ChunkedArray) -> NDArray[np.void]:
    """Strings of 32 hex digits as an (N,) ``UID_DTYPE`` array."""
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(uids)], uids.combine_chunks()), "")
    digits: str = joined[0].as_py()
    return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64).view(UID_DTYPE)
