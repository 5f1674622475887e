"""Writing files that are either whole or not there, on this machine or in a store, and what Parquet says of itself.

A path in a store is a UPath, which is read as a path of this machine is; how it is written to, these functions know. A
process that is killed while it writes leaves its temporary file: :func:`remove_leftovers` knows these.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from noisyclean.corpus.locate import is_address, without_secrets
from noisyclean.errors import NoisycleanError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
_PREFIX = "noisyclean."
_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")
"""The names that :func:`replacing` gives; in them, the process."""
_ONE_SLASH = re.compile(r"^([a-z0-9]{2,}):/(?!/)")
"""Of an address that has been a pathlib path, which makes one slash of two."""
_NOT_WRITTEN_TO = ("http://", "https://", "hf://")
_REPEATING = frozenset({"shard", "split", "reason", "fault", "kind"})
"""Columns in which few values repeat. A dictionary of any other column costs twice the time and saves no space."""


def place(path: Path | str) -> Path:
    """The folder that the user names, which may be the address of one in a store that can be written to.

    Raises:
        UsageError: the address is of no such store, or there is a secret in it.
        NoisycleanError: the store cannot be reached, or may not be read.
    """
    address = _address(path)
    if address is None:
        return Path(path)
    from upath import UPath

    from noisyclean.corpus.remote import persist

    if without_secrets(address) != address:
        raise UsageError(f"{without_secrets(address)}: leave the secret out; the store's library takes it elsewhere")
    if address.startswith(_NOT_WRITTEN_TO):
        raise UsageError(f"{address}: cannot be written to; give an address in a bucket, or a local folder and copy it")

    def reach() -> Path:
        found = UPath(address, use_listings_cache=False)
        with suppress(FileNotFoundError):  # it may be made yet
            found.fs.info(found.path)
        return cast("Path", found)

    return persist(reach, address)


def local_place(path: Path | str) -> Path:
    """The file or folder that the user names, where it must be on this machine.

    Raises:
        UsageError: it is an address.
    """
    if (address := _address(path)) is not None:
        raise UsageError(f"{without_secrets(address)}: a local path is needed here; copy from there, or to there after")
    return Path(path)


def is_remote(path: Path) -> bool:
    """Whether it lies in a store."""
    return is_address(str(path))


def is_file(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        NoisycleanError: its store cannot say; ``path.is_file()`` would be False.
    """
    if not is_remote(path):
        return path.is_file()
    from noisyclean.corpus.remote import MissingObjectError, look_up

    try:
        look_up(str(path))
    except MissingObjectError:
        return False
    return True


def _address(path: Path | str) -> str | None:
    text = _ONE_SLASH.sub(r"\1://", str(path))
    return text if is_address(text) else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to ``path``, beside which it is, if the block succeeds.

    For a store it is a path of this machine, that is uploaded; an upload is there whole or not at all.

    Raises:
        NoisycleanError: there is no room for it, or the store does not take it.
    """
    if is_remote(path):
        from noisyclean.corpus.remote import put_remote

        with tempfile.TemporaryDirectory(prefix="noisyclean-") as folder:
            yield Path(folder) / path.name
            put_remote(Path(folder) / path.name, str(path))
        return
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


@contextmanager
def rebuilding(path: Path, mark: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which is put in place of the folder ``path`` if the block succeeds.

    Nothing can be renamed in a store: there the old folder is removed first, and the new one filled in its place. So
    before that goes the file ``mark``, which says that the folder is whole; the caller writes it after the block.
    """
    if is_remote(path):
        from noisyclean.corpus.remote import remove_remote

        remove_remote(str(mark))
        remove_remote(str(path))
        yield path
        return
    building = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    yield building
    replace_folder(path, building)


def read_bytes(path: Path) -> bytes:
    """The content of a small file.

    Raises:
        OSError: it cannot be read.
        NoisycleanError: it cannot be had from its store.
    """
    if not is_remote(path):
        return path.read_bytes()
    from noisyclean.corpus.remote import read_remote

    return read_remote(str(path))


@contextmanager
def at_hand(path: Path) -> Iterator[Path]:
    """Yield the file as one of this machine: itself, or for as long a copy from the store."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="noisyclean-") as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(read_bytes(path))
        yield copy


def is_leftover(path: Path) -> bool:
    """Whether it is the temporary file of a process that runs no more."""
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
        return False
    # The number of this one was given to another before: in a container, each time.
    return int(found[1]) == os.getpid() or not is_running(int(found[1]))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun in ``folder`` and in the folders below; in a store they leave nothing."""
    if is_remote(folder):
        return
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


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; of one in a store, little more is fetched than is read."""
    import pyarrow.parquet as pq

    if not is_remote(path):
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
        return
    from noisyclean.corpus.remote import open_remote

    with open_remote(str(path), ahead=False) as stream, pq.ParquetFile(stream, pre_buffer=True) as file:
        yield file


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
