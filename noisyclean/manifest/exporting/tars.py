"""The format ``shards``: tars of whole samples, copied member by member from the shards that were scored."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from noisyclean.corpus.locate import Shard
from noisyclean.corpus.shards import SampleMembers, ShardReader, add_member
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import write_json, write_parquet
from noisyclean.manifest.exporting.selection import WEIGHT, Selection
from noisyclean.manifest.exporting.sinks import open_sink
from noisyclean.manifest.parts import shard_state
from noisyclean.progress import Progress

SIZES_NAME = "sizes.json"
STATS_SUFFIX = "_stats.json"

UNSAFE, REPEATED, INCOMPLETE = "unsafe member name", "key is in the tar already", "not all of it can be read"
"""Why a pair is left out: its members have names as :func:`is_unsafe` says; two samples of one key in a tar would be
read as one, or not at all; or members of it are cut off or too large to be read."""

# A root, a drive (C:), or two dots, after which Windows overlooks blanks and more dots; and control characters.
_DANGEROUS = re.compile(r"[/\\]|[A-Za-z]:|(?:.*[/\\])?\.\.[. ]*(?:[/\\]|$)|.*[\x00-\x1f\x7f-\x9f]", re.DOTALL)
_LONGEST_PART, _LONGEST_NAME = 255, 1024
"""Bytes: what the file systems of Linux and macOS take."""


@dataclass(frozen=True)
class TarStats:
    """``<tar>_stats.json``, in img2dataset's words; written after the tar, as the mark that it is done.

    Attributes:
        count: pairs chosen for the tar.
        successes: pairs in it.
        failed_to_download, failed_to_resize: always 0.
        duration: seconds it took.
        status_dict: "success" and the reasons why pairs were left out → how many.
        bytes: size of the tar.
        made_from: a digest of the chosen rows and of the shards they are from.
    """

    count: int
    successes: int
    failed_to_download: int
    failed_to_resize: int
    duration: float
    status_dict: dict[str, int]
    bytes: int
    made_from: str


@dataclass(frozen=True)
class PlannedTar:
    """One tar to write: its name without ``.tar``, and its rows, (shard, table with key and index) for each shard."""

    name: str
    pieces: list[tuple[Shard, pa.Table]]

    def digest(self) -> str:
        """Equal for the same rows of unchanged shards."""
        digest = hashlib.blake2b(digest_size=16)
        for shard, table in self.pieces:
            digest.update(json.dumps([shard.name, shard_state(shard), table.to_pydict()]).encode())
        return digest.hexdigest()

    @property
    def weighted(self) -> bool:
        """Whether the rows have weights, for a file beside the tar."""
        return all(WEIGHT in table.schema.names for _, table in self.pieces)


def write_tars(
    selection: Selection,
    paths: Mapping[str, str],
    to: Path,
    *,
    shard_size: int | None,
    dry_run: bool,
    progress: Progress,
) -> list[TarStats]:
    """Write the tars and their sidecars to the folder ``to``; returns what is in each.

    A tar that an earlier call finished is left as it is if it would come out the same. What else earlier calls left is
    removed at the end. A dry run reads all that would be read, and writes nothing.

    Args:
        paths: shard name → where it lies.
        shard_size: the most samples in a tar, which then are 00000.tar …; None: the tars of the corpus.

    Raises:
        UsageError: a shard's name is unsafe, or ``paths`` lacks it.
        NoisycleanError: a shard cannot be opened, or is not as it was scored.
    """
    done: dict[str, TarStats] = {}
    kept = 0
    written = [] if dry_run else _written(to)
    if not dry_run:
        for folder in {to, *((to / f"{name}.tar").parent for name in written)}:
            (folder / SIZES_NAME).unlink(missing_ok=True)  # whoever finds one may take the folder for complete
    source = _Source()
    with progress.task("counting" if dry_run else "writing shards", selection.rows, "pairs") as task:
        for planned in _plan(selection, paths, shard_size):
            made_from = planned.digest()
            stats = _done(to, planned, made_from)
            if stats is not None:
                kept += 1
            else:
                stats = _write_tar(planned, made_from, source, to, dry_run, progress)
            done[planned.name] = stats
            task.advance(stats.count, f"{planned.name}.tar")
    if kept:
        progress.say(f"{kept:,} of {len(done):,} tars were there already")
    if not dry_run:
        for name in set(written) - set(done):
            for old in _files(to, name):
                old.unlink(missing_ok=True)
        _write_sizes(to, done)
    return list(done.values())


def _write_sizes(to: Path, done: Mapping[str, TarStats]) -> None:
    folders: dict[Path, dict[str, int]] = {to: {}}
    for name, stats in done.items():
        tar = to / f"{name}.tar"
        folders.setdefault(tar.parent, {})[tar.name] = stats.successes
    for folder, counts in folders.items():
        write_json(folder / SIZES_NAME, counts)


def _files(to: Path, name: str) -> tuple[Path, Path, Path]:
    """The statistics, tar and weights of that name."""
    return to / f"{name}{STATS_SUFFIX}", to / f"{name}.tar", to / f"{name}.parquet"


def _plan(selection: Selection, paths: Mapping[str, str], shard_size: int | None) -> Iterator[PlannedTar]:
    pieces = _pieces(selection, paths)
    if shard_size is not None:
        for number, several in enumerate(_cut(pieces, shard_size)):
            yield PlannedTar(f"{number:05d}", several)
        return
    for shard, table in pieces:
        if is_unsafe(shard.name):
            raise UsageError(f"{shard}: {shard.name!r} is no safe name for a tar; use --shard-size")
        yield PlannedTar(shard.name, [(shard, table)])


def _pieces(selection: Selection, paths: Mapping[str, str]) -> Iterator[tuple[Shard, pa.Table]]:
    for table in selection.tables("shard", "key", "index"):
        name = table["shard"][0].as_py()
        if name not in paths:
            raise UsageError(
                f"{name}: run.json does not say where this shard lies; repeat the `noisyclean score` command"
            )
        yield Shard(name, paths[name]), table.drop_columns("shard")


def _cut(pieces: Iterator[tuple[Shard, pa.Table]], size: int) -> Iterator[list[tuple[Shard, pa.Table]]]:
    """Divide the rows into groups of ``size``, or fewer where a key would come twice in a group."""
    group: list[tuple[Shard, pa.Table]] = []
    keys: set[str] = set()
    for shard, table in pieces:
        start = 0
        for at, key in enumerate(table["key"].to_pylist()):
            if len(keys) == size or key in keys:
                if at > start:
                    group.append((shard, table.slice(start, at - start)))
                yield group
                group, keys, start = [], set(), at
            keys.add(key)
        group.append((shard, table.slice(start)))
    if group:
        yield group


def _written(to: Path) -> list[str]:
    """The tars that earlier calls finished, known by their statistics: what else lies there is not ours."""
    records = to.rglob(f"*{STATS_SUFFIX}")
    return [one.relative_to(to).as_posix().removesuffix(STATS_SUFFIX) for one in records if _read_stats(one)]


def _read_stats(record: Path) -> TarStats | None:
    """What a statistics file says; None: it is not there, or not ours."""
    try:
        return TarStats(**json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _done(to: Path, planned: PlannedTar, made_from: str) -> TarStats | None:
    """The statistics of a tar that is done; None: it has to be written."""
    record, tar, weights = _files(to, planned.name)
    stats = _read_stats(record)
    if stats is None or stats.made_from != made_from or not tar.is_file():
        return None
    if planned.weighted and not weights.is_file():
        return None
    return stats if tar.stat().st_size == stats.bytes else None


def _write_tar(
    planned: PlannedTar, made_from: str, source: _Source, to: Path, dry_run: bool, progress: Progress
) -> TarStats:
    started = time.perf_counter()
    record, path, weights = _files(to, planned.name)
    if not dry_run:
        # Interrupted, the new tar must not pass for the one that these describe.
        record.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
    with open_sink(path, dry_run=dry_run) as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            rows, status = _copy_samples(planned, source, tar, progress)
        size = file.tell()
    stats = TarStats(
        count=status.total(),
        successes=rows.num_rows,
        failed_to_download=0,
        failed_to_resize=0,
        duration=round(time.perf_counter() - started, 3),
        status_dict=dict(status),
        bytes=size,
        made_from=made_from,
    )
    if not dry_run:
        if planned.weighted:
            write_parquet(weights, rows.select(["key", WEIGHT]))
        write_json(record, asdict(stats))
    return stats


def _copy_samples(
    planned: PlannedTar, source: _Source, tar: tarfile.TarFile, progress: Progress
) -> tuple[pa.Table, Counter[str]]:
    """Copy the samples of a tar; returns the rows of those that are in it, and how many went in or why not."""
    status = Counter(success=0)
    written: set[str] = set()
    chosen = []
    for shard, table in planned.pieces:
        good = []
        for key, index in zip(table["key"].to_pylist(), table["index"].to_pylist(), strict=True):
            raw = source.sample(shard, key, index)
            fault = REPEATED if key in written else _fault(raw)
            good.append(fault is None)
            status[fault or "success"] += 1
            if fault is None:
                written.add(key)
                for extension, data in raw.members.items():
                    add_member(tar, f"{key}.{extension}", data)
                tar.members = []  # type: ignore[attr-defined]  # or tarfile would keep them all
            elif status[fault] == 1:
                # Quoted and cut, since what is wrong may be characters that a terminal obeys, or the length.
                progress.say(f"{planned.name}.tar: {key[:80]!r} of {shard} is left out, and its like: {fault}")
        chosen.append(table.filter(pa.array(good, pa.bool_())))
    return pa.concat_tables(chosen), status


def _fault(raw: SampleMembers) -> str | None:
    """Why a sample cannot be in any tar."""
    if any(is_unsafe(f"{raw.key}.{extension}") for extension in raw.members):
        return UNSAFE
    return INCOMPLETE if raw.fault not in (None, "duplicate key") else None


def is_unsafe(name: str) -> bool:
    """Whether a file of this name would, on some system, be unpacked outside the folder meant for it, or not at all.

    Control characters are unsafe too: a terminal obeys some of them, and a NUL cuts the name short.
    """
    encoded = name.encode()
    too_long = len(encoded) > _LONGEST_NAME or max(map(len, encoded.split(b"/"))) > _LONGEST_PART
    return too_long or _DANGEROUS.match(name) is not None


class _Source:
    """Chosen samples of one shard after another. As long as it is asked in order, each shard is read once."""

    def __init__(self) -> None:
        self._reader: ShardReader | None = None
        self._members: Iterator[SampleMembers] = iter(())
        self._next = 0

    def sample(self, shard: Shard, key: str, index: int) -> SampleMembers:
        """The sample at ``index`` of a shard.

        Raises:
            NoisycleanError: the shard cannot be opened, or the sample there is another one.
        """
        if self._reader is None or shard != self._reader.shard or index < self._next:
            self._reader = ShardReader(shard)
            self._members, self._next = self._reader.members(), 0
        for raw in self._members:
            self._next = raw.index + 1
            if raw.index == index and raw.key == key:
                return raw
            if raw.index == index:
                break
        raise NoisycleanError(
            f"{shard}: sample {index} is not {key} any more ({self._reader.damage or 'the shard has changed'}); "
            "repeat the `noisyclean score` command"
        )
