"""A copy of shards in which some pairs have another's caption or image.

Any pair may get what any other has, so what is given must be at hand at random, while tars (gzipped, remote) are read
from start to end. Hence one pass copies what is given, and nothing else, into one plain file a shard, and the next
fetches it from there by file and offset. Memory holds the offsets only.
"""

from __future__ import annotations

import json
import pickle
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from noisyclean.corpus.locate import TAR_SUFFIXES, Shard
from noisyclean.corpus.parallel import map_in_processes
from noisyclean.corpus.shards import (
    CAPTION_EXTENSIONS,
    METADATA_EXTENSION,
    SampleMembers,
    ShardReader,
    add_member,
    image_extension,
    is_image,
    read_metadata,
    to_sample,
)
from noisyclean.corpus.survey import Corpus, Place
from noisyclean.corpus.truth import TRUTH_NAME, write_truth
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

Gift: TypeAlias = Literal["caption", "image"]

_SIZE_FIELDS = ("width", "height", "original_width", "original_height", "sha256")

_Members: TypeAlias = dict[str, bytes]


def check_target(shards: Sequence[Shard], out: Path) -> None:
    """Refuse to write where there are shards.

    Raises:
        UsageError: ``out`` is a file, is where ``shards`` lie, or holds others.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder to write to")
    if out.resolve() in (Path(shard.path).resolve().parent for shard in shards if "://" not in shard.path):
        raise UsageError(f"{out} is where the shards lie; name another folder, they are not changed in place")
    if any(path.name.endswith(TAR_SUFFIXES) for path in out.rglob("*")):
        raise UsageError(f"{out} holds shards already; remove it or name another folder")


def write_copy(
    corpus: Corpus,
    out: Path,
    truth: pd.DataFrame,
    *,
    gift: Gift,
    recipients: NDArray[np.int64],
    given: NDArray[np.int64] | Sequence[str],
    workers: int,
    progress: Progress,
) -> Path:
    """Copy the corpus to the folder ``out``, where row ``recipients[i]`` gets the caption or image of row ``given[i]``.

    Where ``given`` are strings, these are the captions. A donor without an image takes the recipient's away.

    Returns:
        Where ``truth`` was written.

    Raises:
        NoisycleanError: a shard cannot be opened, or is not as ``corpus`` found it.
    """
    out.mkdir(parents=True, exist_ok=True)
    # Everything is made in a folder inside ``out`` and moved at the end: an interrupted run leaves no shards behind.
    with tempfile.TemporaryDirectory(dir=out, prefix=".corrupt-") as folder:
        places = {shard.name: place for shard, place in zip(corpus.shards, corpus.places(), strict=True)}
        space = _Workspace(Path(folder), places)
        if isinstance(given, np.ndarray):
            _gather(space, corpus, recipients, given, gift, workers, progress)
        else:
            _make_up(space, corpus, recipients, given)
        with progress.task("writing shards", len(corpus.shards), "shards") as task:
            for _ in map_in_processes(partial(_rewrite, space=space, gift=gift), corpus.shards, workers):
                task.advance()
        write_truth(truth, space.folder / TRUTH_NAME)
        for shard in corpus.shards:
            target = out / f"{shard.name}.tar"
            target.parent.mkdir(parents=True, exist_ok=True)
            space.shard(shard).replace(target)
        # Last, as the mark that the folder is complete.
        return (space.folder / TRUTH_NAME).replace(out / TRUTH_NAME)


@dataclass(frozen=True, slots=True)
class _Workspace:
    """A folder in which the passes leave things for one another; arrays in it have one row a sample."""

    folder: Path
    places: dict[str, Place]

    def save(self, name: str, array: NDArray[np.int64] | NDArray[np.bool_]) -> None:
        np.save(self.folder / f"{name}.npy", array)

    def load(self, name: str, shard: Shard) -> NDArray[np.int64]:
        """The shard's rows; the others stay on disk."""
        place = self.places[shard.name]
        rows: NDArray[np.int64] = np.load(self.folder / f"{name}.npy", mmap_mode="r")[place.start : place.stop]
        return rows

    def given(self, number: int) -> Path:
        """The file of what the shard of this number gives away."""
        return self.folder / f"{number}.given"

    def shard(self, shard: Shard) -> Path:
        """The shard's copy in the making."""
        return self.folder / f"{self.places[shard.name].number}.tar.part"


def _make_up(space: _Workspace, corpus: Corpus, recipients: NDArray[np.int64], captions: Sequence[str]) -> None:
    """Leave captions that no pair has as if shard 0 had given them."""
    sources = np.full((len(corpus.keys), 2), -1, np.int64)
    with space.given(0).open("wb") as file:
        for row, caption in zip(recipients.tolist(), captions, strict=True):
            sources[row] = 0, file.tell()
            pickle.dump({CAPTION_EXTENSIONS[0]: caption.encode()}, file)
    space.save("sources", sources)


def _gather(
    space: _Workspace,
    corpus: Corpus,
    recipients: NDArray[np.int64],
    donors: NDArray[np.int64],
    gift: Gift,
    workers: int,
    progress: Progress,
) -> None:
    """Copy out what the donors give, and note for each recipient where it lies."""
    gives = np.zeros(len(corpus.keys), np.bool_)
    gives[donors] = True
    space.save("gives", gives)
    offsets = np.full(len(corpus.keys), -1, np.int64)
    with progress.task("gathering what is passed on", len(corpus.shards), "shards") as task:
        gather = partial(_gather_shard, space=space, gift=gift)
        for place, found in zip(corpus.places(), map_in_processes(gather, corpus.shards, workers), strict=True):
            offsets[place.start + np.flatnonzero(gives[place.start : place.stop])] = found
            task.advance()
    sources = np.full((len(corpus.keys), 2), -1, np.int64)
    sources[recipients, 0] = np.searchsorted(corpus.starts, donors, side="right") - 1
    sources[recipients, 1] = offsets[donors]
    space.save("sources", sources)


def _gather_shard(shard: Shard, space: _Workspace, gift: Gift) -> list[int]:
    gives = space.load("gives", shard)
    offsets = []
    with space.given(space.places[shard.name].number).open("wb") as file:
        for raw in _same_samples(shard, len(gives)):
            if gives[raw.index]:
                offsets.append(file.tell())
                pickle.dump({ext: data for ext, data in raw.members.items() if _is_given(ext, gift)}, file)
    return offsets


def _is_given(extension: str, gift: Gift) -> bool:
    given = is_image(extension) if gift == "image" else extension in CAPTION_EXTENSIONS
    return given or extension == METADATA_EXTENSION


def _rewrite(shard: Shard, space: _Workspace, gift: Gift) -> None:
    """Write the copy of one shard: members in their order, each a plain file."""
    exchange = _with_image_of if gift == "image" else _with_caption_of
    sources = space.load("sources", shard)
    with tarfile.open(space.shard(shard), "w") as tar:
        for raw in _same_samples(shard, len(sources)):
            number, offset = sources[raw.index].tolist()
            members = raw.members
            if number >= 0:
                with space.given(number).open("rb") as file:
                    file.seek(offset)
                    members = exchange(pickle.load(file), members)
            for extension, data in members.items():
                add_member(tar, f"{raw.key}.{extension}", data)


def _same_samples(shard: Shard, count: int) -> Iterable[SampleMembers]:
    """The samples of a shard that had ``count`` of them when it was read before."""
    try:
        for raw, _ in zip(ShardReader(shard).members(), range(count), strict=True):
            yield raw
    except ValueError as error:
        raise NoisycleanError(f"{shard}: changed while it was read; run the command again") from error


def _with_caption_of(donor: _Members, members: _Members) -> _Members:
    """``members`` with every statement of the caption replaced by the donor's."""
    caption = to_sample("", SampleMembers("", 0, donor)).caption or ""
    verbatim = next((donor[ext] for ext in CAPTION_EXTENSIONS if ext in donor), caption.encode())
    changed = {ext: verbatim if ext in CAPTION_EXTENSIONS else data for ext, data in members.items()}
    metadata = read_metadata(members.get(METADATA_EXTENSION))
    stated = {"caption", "captions"} & metadata.keys()
    if stated:
        metadata["caption"] = caption
    if "captions" in stated:
        others = read_metadata(donor.get(METADATA_EXTENSION)).get("captions")
        metadata["captions"] = others
        if not isinstance(others, list):
            del metadata["captions"]
    if isinstance(metadata.get("text"), str):
        stated.add("text")
        metadata["text"] = caption
    if stated:
        changed[METADATA_EXTENSION] = json.dumps(metadata).encode()
    return changed


def _with_image_of(donor: _Members, members: _Members) -> _Members:
    """``members`` with the image, and what the metadata say of its size, replaced by the donor's."""
    own, given = image_extension(members), image_extension(donor)
    if given is None:
        return {ext: data for ext, data in members.items() if not is_image(ext)}
    # Another member may bear the donor's extension, as a mask does; decoders go by the bytes anyway.
    name = own if own is not None and given in members else given
    if own is None:
        own, members = name, {name: b"", **members}
    changed = {name if ext == own else ext: donor[given] if ext == own else data for ext, data in members.items()}
    metadata = read_metadata(members.get(METADATA_EXTENSION))
    others = read_metadata(donor.get(METADATA_EXTENSION))
    common = [name for name in _SIZE_FIELDS if name in metadata and name in others]
    if common:
        metadata.update({name: others[name] for name in common})
        changed[METADATA_EXTENSION] = json.dumps(metadata).encode()
    return changed
