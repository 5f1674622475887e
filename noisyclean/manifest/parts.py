"""Score parts: one Parquet file a shard, whole or not there; its presence means the shard is done."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from noisyclean.corpus.locate import Shard, is_address
from noisyclean.errors import UsageError
from noisyclean.files import open_parquet, parquet_files, read_record, with_record, write_parquet
from noisyclean.manifest.schema import PART_SCHEMA, SCHEMA_VERSION

SCORES = "scores"
_PROBES, _PROBED = 16, 2**14
"""How many places of a shard are looked at, and how many bytes there."""


@dataclass(frozen=True)
class PartInfo:
    """What a part says of itself, in its Parquet metadata.

    Attributes:
        scorer: fingerprint of the models and banks that scored it.
        source: what :func:`shard_state` says of the shard.
        damage: what is wrong with the shard's tar; ``""``: nothing.
        version: of the schema.
    """

    scorer: str
    source: str
    damage: str = ""
    version: str = SCHEMA_VERSION


def part_path(out: Path, shard: str) -> Path:
    """Where the scores of a shard lie in OUT."""
    return out / SCORES / f"{shard}.parquet"


def list_parts(out: Path) -> list[str]:
    """The shards that have a part in OUT, sorted."""
    return sorted(name.removesuffix(".parquet") for name in parquet_files(out / SCORES))


def write_part(out: Path, shard: str, table: pa.Table, info: PartInfo) -> None:
    """Write the scores of one shard (:data:`PART_SCHEMA`)."""
    write_parquet(part_path(out, shard), with_record(table.cast(PART_SCHEMA), info))


def read_part(out: Path, shard: str, columns: list[str] | None = None) -> pa.Table:
    """Read the scores of one shard, or some columns of them.

    Raises:
        UsageError: the part is broken or of another version of the schema.
    """
    with _open(part_path(out, shard)) as (file, _):
        return file.read(columns=columns)


def read_part_info(out: Path, shard: str) -> PartInfo:
    """What a part says of itself.

    Raises:
        UsageError: the part is broken or of another version of the schema, or there is none.
        MissingObjectError: there is none in a store.
    """
    with _open(part_path(out, shard)) as (_, info):
        return info


@contextmanager
def _open(path: Path) -> Iterator[tuple[pq.ParquetFile, PartInfo]]:
    try:
        with open_parquet(path) as file:
            info = read_record(file.metadata.metadata, PartInfo)
            if info.version != SCHEMA_VERSION:
                raise UsageError(
                    f"{path}: schema version {info.version}, this noisyclean reads {SCHEMA_VERSION}; score again"
                )
            yield file, info
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:  # also of pages that are not as they say
        raise UsageError(f"{path}: not a score part that noisyclean wrote; remove it and score again") from error


def shard_state(shard: Shard) -> str:
    """What tells a shard from a changed one, which is scored again; ``""``: it cannot be read.

    Of a local one the size, and a digest of its first and last bytes and of others between them, a few reads: neither
    a copy nor a touch is a change. A large shard that was changed in a few places, and kept its size, may pass for what
    it was; one that was written anew will not. Of a remote one the size, and the store's ETag or checksum, or else the
    time it was changed.

    Raises:
        NoisycleanError: a remote one cannot be had.
    """
    if is_address(shard.path):
        from noisyclean.corpus.remote import look_up

        found = look_up(shard.path)
        return f"{found.size}:{found.version}"
    digest = hashlib.blake2b(digest_size=16)
    try:
        with Path(shard.path).open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            for probe in range(_PROBES):
                file.seek(max(size - _PROBED, 0) * probe // (_PROBES - 1))
                digest.update(file.read(_PROBED))
    except OSError:
        return ""
    return f"{size}:{digest.hexdigest()}"
