"""Writing files that are either whole or not there, and what a Parquet file says of itself.

A process that is killed while it writes leaves its temporary file: :func:`remove_leftovers` knows these.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from noisyclean.errors import NoisycleanError

if TYPE_CHECKING:
    import pyarrow as pa
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
_PREFIX = "noisyclean."
_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")
"""The names that :func:`replacing` gives; in them, the process."""
_REPEATING = frozenset({"shard", "split", "reason", "fault", "kind"})
"""Columns in which few values repeat. A dictionary of any other column costs twice the time and saves no space."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` if the block succeeds.

    Raises:
        NoisycleanError: there is no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except Exception as error:
        if (full := _no_room(error)) is None:
            raise
        raise NoisycleanError(f"{path}: cannot be written ({full}); make room, and repeat the command") from error
    finally:
        with suppress(OSError):  # as where the folder is gone: that is not what went wrong
            temporary.unlink(missing_ok=True)


def _no_room(error: Exception) -> str | None:
    """In the system's words, that there is no room for what is written; None: something else is wrong.

    The writers of torch, safetensors and Arrow raise errors of their own: with those words in them, or in place of the
    system's.
    """
    reasons = {one: os.strerror(one) for one in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
    at: BaseException | None = error
    while at is not None:
        number = getattr(at, "errno", None)
        if number in reasons:
            return reasons[number]
        if words := next((one for one in reasons.values() if one in str(at)), None):
            return words
        at = at.__cause__ or at.__context__
    return None


def replace_folder(path: Path, new: Path) -> None:
    """Rename the folder ``new`` to ``path``, in place of what was there; at no time is a part of either found there."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether it is the temporary file of a process that runs no more."""
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
        return False
    # The number of this one was given to another before: in a container, each time.
    return int(found[1]) == os.getpid() or not is_running(int(found[1]))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun in ``folder`` and in the folders below."""
    for path in folder.rglob(".*.tmp"):
        if is_leftover(path):
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether there is a process of this number."""
    if os.name == "nt":
        return True  # where to ask would be to end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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
