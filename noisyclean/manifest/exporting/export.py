"""``export``: write the pairs of some splits so that others can go on with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import noisyclean
from noisyclean.corpus.embeddings import SUFFIXES
from noisyclean.errors import UsageError
from noisyclean.files import is_leftover, local_place, place, remove_leftovers, write_json
from noisyclean.manifest.exporting.selection import Selection
from noisyclean.manifest.exporting.sinks import open_sink
from noisyclean.manifest.exporting.tables import write_csv, write_jsonl, write_keys, write_uids
from noisyclean.manifest.exporting.tars import write_tars
from noisyclean.manifest.schema import CLEAN
from noisyclean.manifest.splitting import DEFAULT_OUT, read_out
from noisyclean.progress import SILENT, Progress, Task

Format: TypeAlias = Literal["shards", "datacomp", "keys", "csv", "jsonl"]

EXPORT_FILE = "export.json"

_TABLES: dict[Format, tuple[str, Callable[[BinaryIO, Selection, Task], int]]] = {
    "datacomp": ("uids.npy", write_uids),
    "keys": ("keys.parquet", write_keys),
    "csv": ("pairs.csv", write_csv),
    "jsonl": ("pairs.jsonl", write_jsonl),
}


@dataclass(frozen=True)
class Export:
    """What was written (or would be, in a dry run).

    Attributes:
        rows: pairs.
        files: tars, or the one file of the other formats; what lies beside tars does not count.
        bytes: the size of these files.
        left_out: why pairs of the splits are not in the tars → how many.
    """

    rows: int
    files: int
    bytes: int
    left_out: dict[str, int]


def export(
    out: Path | str = DEFAULT_OUT,
    *,
    to: Path | str,
    format: Format,
    splits: Sequence[str] = (CLEAN,),
    weights: str | None = None,
    shard_size: int | None = None,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Export:
    """Write the pairs of some splits to the folder ``to``.

    Formats:
        shards: WebDataset tars of the chosen samples, whole and in their order, with every member's bytes as they are.
            Tars have the names of the shards, or are ``00000.tar`` … with ``shard_size``; ``sizes.json`` counts their
            samples for open_clip, in each folder that has tars, and ``<tar>_stats.json`` as img2dataset does.
        datacomp: ``uids.npy``, the sorted uids that DataComp's tools take for a subset.
        keys: ``keys.parquet`` with shard, key, index and uid.
        csv, jsonl: ``pairs.csv`` or ``pairs.jsonl`` with all columns of the manifest.

    Tars are uncompressed, and extensions in lower case; members that the reader passes over (no key, or over 256 MiB)
    are not copied. A pair is left out, with a word about it, if its members' names are unsafe to unpack on some system
    (``../``, ``C:``, control characters, over 255 bytes), if not all of it can be read, or if its key is in the tar
    already; only unreadable pairs are of the last two kinds.

    Interrupted, it goes on where it was when called again with the same arguments, and writes those tars anew whose
    rows or shards have changed since. What it had begun when it was killed is removed.

    Args:
        out: the OUT folder that ``score`` wrote.
        to: a folder that is empty, or holds an earlier export of ``out`` in the same format.
        format: one of the above.
        splits: whose pairs.
        weights: a column of numbers from 0 to 1, such as ``match_probability``, for use as soft labels: a column
            ``weight`` of the tables, and for tars ``<tar>.parquet`` with key and weight. Not for ``datacomp``.
        shard_size: the most samples in a tar; fewer where a key would come twice in it. Only for ``shards``.
        dry_run: read all that would be read, and write nothing; the figures are those of the export.
        progress: who is told how it goes.

    Raises:
        UsageError: the arguments make no sense, ``out`` holds no manifest, ``to`` holds something else, or, for
            ``datacomp``, a pair has no uid of 32 hex digits.
        NoisycleanError: a shard cannot be opened, or is not as it was scored.
    """
    out, to = place(out), local_place(to)
    if format not in get_args(Format):
        raise UsageError(f"--format {format}: no such format; there are {', '.join(get_args(Format))}")
    if shard_size is not None and format != "shards":
        raise UsageError(f"--shard-size goes with --format shards; {format} is one file")
    if shard_size is not None and shard_size < 1:
        raise UsageError(f"--shard-size {shard_size}: at least 1")
    if weights is not None and format == "datacomp":
        raise UsageError("--weights: a DataComp subset has no place for weights; use --format keys")
    run = read_out(out)
    paths = _paths(out, run) if format == "shards" else {}
    selection = Selection(out, splits, weights)
    _claim(to, {"out": str(out.resolve()), "format": format, "version": noisyclean.__version__}, dry_run)
    _refuse_own_source(to, paths.values())
    if not dry_run:
        remove_leftovers(to)
    if format == "shards":
        tars = write_tars(selection, paths, to, shard_size=shard_size, dry_run=dry_run, progress=progress)
        status = Counter[str]()
        for tar in tars:
            status.update(tar.status_dict)
        rows = status.pop("success", 0)
        return Export(rows, len(tars), sum(tar.bytes for tar in tars), dict(status))
    name, write = _TABLES[format]
    with open_sink(to / name, dry_run=dry_run) as file, progress.task("exporting", selection.rows, "pairs") as task:
        rows = write(file, selection, task)
        return Export(rows, 1, file.tell(), {})


def _paths(out: Path, run: dict[str, Any]) -> dict[str, str]:
    """Shard name → where it lies, as ``score`` recorded it."""
    if "paths" not in run:
        raise UsageError(f"{out}: does not say where its shards lie; repeat the `noisyclean score` command, to add it")
    if any(path.endswith(SUFFIXES) for path in run["paths"]):
        raise UsageError(
            f"{out}: scored from embeddings, so there are no shards to copy; use --format keys or datacomp"
        )
    if len(run["paths"]) != len(run["shards"]):
        raise UsageError(f"{out}: its run.json is broken; repeat the `noisyclean score` command, to write it anew")
    return dict(zip(run["shards"], run["paths"], strict=True))


def _refuse_own_source(to: Path, paths: Iterable[str]) -> None:
    """What is read must not be written over."""
    for path in paths:
        if "://" not in path and Path(path).resolve().is_relative_to(to.resolve()):
            raise UsageError(f"{to}: holds {path}, which is exported from; give another folder with -o")


def _claim(to: Path, about: dict[str, Any], dry_run: bool) -> None:
    """Make ``to`` the place of this export, or refuse if it is that of something else."""
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is a file; name a folder to write to")
    path = to / EXPORT_FILE
    if to.is_dir() and any(one != path and not is_leftover(one) for one in to.iterdir()):
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            known = before["out"], before["format"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{to}: holds files that are no export; give another folder with -o") from error
        if known != (about["out"], about["format"]):
            raise UsageError(f"{to}: holds {known[1]} exported from {known[0]}; give another folder with -o")
    if not dry_run:
        write_json(path, about)
