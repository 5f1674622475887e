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
from collections.abc import Iterator, Mapping
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

    from noisyclean.corpus.remote import ObjectState

Record = TypeVar("Record", bound="DataclassInstance")
_PREFIX = "noisyclean."
_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")
"""The names of temporary files; in them, the process."""
_ONE_SLASH = re.compile(r"^([a-z0-9]{2,}):/(?!/)")
"""Of an address that has been a pathlib path, which makes one slash of two."""
_LOCAL = re.compile(r"^(?:file|local):/*(?=/)")
"""What makes an address of a path of this machine."""
_STORES = ("s3://", "s3a://", "gs://", "gcs://")
"""Where an object is put whole, in place of what was there, and needs no folder to lie in."""
_REPEATING = frozenset({"shard", "split", "reason", "fault", "kind"})
"""Columns in which few values repeat. A dictionary of any other column costs twice the time and saves no space."""


def place(path: Path | str) -> Path:
    """The folder that the user names, which may be the address of one in a store that can be written to.

    Raises:
        UsageError: the address is of no such store, or there is a secret in it, or a sign of a glob.
        NoisycleanError: the store cannot be reached, or may not be read.
    """
    address = _path_or_address(path)
    if isinstance(address, Path):
        return address
    from upath import UPath

    from noisyclean.corpus.remote import persist

    if without_secrets(address) != address:
        raise UsageError(f"{without_secrets(address)}: leave the secret out; the store's library takes it elsewhere")
    if not address.startswith(_STORES):
        raise UsageError(f"{address}: cannot be written to; give an address in a bucket, or a local folder and copy it")
    if any(sign in address for sign in "*?["):
        raise UsageError(f"{address}: a place in a store has no *, ? or [ in its name; give another")

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
    found = _path_or_address(path)
    if isinstance(found, str):
        raise UsageError(f"{without_secrets(found)}: a local path is needed here; copy from there, or to there after")
    return found


def is_remote(path: Path) -> bool:
    """Whether it lies in a store."""
    return is_address(str(path))


def is_file(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        NoisycleanError: its store cannot say; ``path.is_file()`` would be False.
    """
    return path.is_file() if not is_remote(path) else state_in_store(path) is not None


def state_in_store(path: Path) -> ObjectState | None:
    """What its store says of a file; None: there is no such file.

    Raises:
        NoisycleanError: the store cannot say.
    """
    from noisyclean.corpus.remote import MissingObjectError, look_up

    try:
        return look_up(str(path))
    except MissingObjectError:
        return None


def _path_or_address(path: Path | str) -> Path | str:
    text = _ONE_SLASH.sub(r"\1://", _LOCAL.sub("", str(path)))
    return text if is_address(text) else Path(text)


def parquet_files(folder: Path) -> list[str]:
    """The Parquet files in a folder and those below, by their paths in it, in no order; none where there is no folder.

    Raises:
        NoisycleanError: its store cannot say; ``folder.rglob`` would not find them all.
    """
    if not is_remote(folder):
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
    from noisyclean.corpus.remote import list_under

    return [name for name in list_under(str(folder)) if name.endswith(".parquet")]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to ``path``, beside which it is, if the block succeeds.

    For a store it is a path of this machine, that is uploaded; an upload is there whole or not at all.

    Raises:
        NoisycleanError: there is no room for it, or the store does not take it.
    """
    remote = is_remote(path)
    try:
        with _uploading(path) if remote else _renaming(path) as temporary:
            yield temporary
    except Exception as error:
        if (full := _no_room(error)) is None:
            raise
        room = f"room in {tempfile.gettempdir()}" if remote else "room"
        raise NoisycleanError(f"{path}: cannot be written ({full}); make {room}, and repeat the command") from error


@contextmanager
def _uploading(path: Path) -> Iterator[Path]:
    from noisyclean.corpus.remote import put_remote

    with tempfile.TemporaryDirectory(prefix="noisyclean-") as folder:
        yield Path(folder) / path.name
        put_remote(Path(folder) / path.name, str(path))


@contextmanager
def _renaming(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
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
    before that goes the file ``mark``, which says that the folder is whole; the caller writes it after the block, once
    :func:`refuse_mixture` has looked.
    """
    if is_remote(path):
        from noisyclean.corpus.remote import remove_remote, remove_under

        remove_remote(str(mark))
        remove_under(str(path))
        yield path
        return
    building = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    yield building
    replace_folder(path, building)


def refuse_mixture(path: Path, mark: Path, written: Mapping[str, int]) -> None:
    """See that a folder that was rebuilt in a store holds what was written there and nothing else.

    Args:
        path, mark: as for :func:`rebuilding`; the mark, which another process may have written, goes if it is not so.
        written: the bytes of each file, by its path in the folder.

    Raises:
        NoisycleanError: another process has rebuilt it meanwhile.
    """
    from noisyclean.corpus.remote import list_under, remove_remote

    if list_under(str(path)) != written:
        remove_remote(str(mark))
        raise NoisycleanError(f"{path}: another process wrote there meanwhile; repeat the command")


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
    for path in [*folder.rglob(".*.tmp")]:
        if is_leftover(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
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


def write_parquet(path: Path, table: pa.Table) -> int:
    """Write one of our tables, whose columns keep their meanings from file to file; returns how many bytes it takes."""
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        repeating = [name for name in table.column_names if name in _REPEATING]
        pq.write_table(table, temporary, compression="zstd", use_dictionary=repeating)
        return temporary.stat().st_size


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
