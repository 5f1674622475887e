"""Score parts: one Parquet file a shard, whole or not there; its presence means the shard is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from noisyclean.corpus.locate import Shard
from noisyclean.errors import UsageError
from noisyclean.files import read_record, with_record, write_parquet
from noisyclean.manifest.schema import PART_SCHEMA, SCHEMA_VERSION

SCORES = "scores"


@dataclass(frozen=True)
class PartInfo:
    """What a part says of itself, in its Parquet metadata.

    Attributes:
        scorer: fingerprint of the models and banks that scored it.
        source: size and modification time of the shard; ``""`` where these cannot be had.
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
    root = out / SCORES
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.parquet"))


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
        UsageError: the part is broken or of another version of the schema.
    """
    with _open(part_path(out, shard)) as (_, info):
        return info


@contextmanager
def _open(path: Path) -> Iterator[tuple[pq.ParquetFile, PartInfo]]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            info = read_record(file.metadata.metadata, PartInfo)
            if info.version != SCHEMA_VERSION:
                raise UsageError(
                    f"{path}: schema version {info.version}, this noisyclean reads {SCHEMA_VERSION}; score again"
                )
            yield file, info
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:  # also of pages that are not as they say
        raise UsageError(f"{path}: not a score part that noisyclean wrote; remove it and score again") from error


def shard_state(shard: Shard) -> str:
    """Size and modification time of a local shard: when they differ, it is scored again."""
    try:
        status = os.stat(shard.path)  # noqa: PTH116 - the path may be an address
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"
