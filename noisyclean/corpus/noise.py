"""Known noise: a copy of a corpus in which some pairs are made wrong on purpose, and the truth about them."""

from __future__ import annotations

import io
import json
import pickle
import posixpath
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from noisyclean.corpus.identity import caption_id, image_id
from noisyclean.corpus.locate import TAR_SUFFIXES, Shard, ShardSpec, find_shards
from noisyclean.corpus.parallel import default_workers, map_in_processes
from noisyclean.corpus.shards import (
    CAPTION_EXTENSIONS,
    METADATA_EXTENSION,
    SampleMembers,
    ShardReader,
    image_extension,
    is_image,
    read_metadata,
    to_sample,
)
from noisyclean.corpus.truth import RANDOM, TRUE_KINDS, TRUTH_NAME, TRUTH_SCHEMA
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd

NoiseProtocol: TypeAlias = Literal["caption", "image", "hard", "uninformative"]

PLANTED_KIND: dict[NoiseProtocol, str] = {
    "caption": RANDOM,
    "image": RANDOM,
    "hard": "hard",
    "uninformative": "uninformative",
}

TRIES = 200
"""How many swaps, or donors, are tried before a pair is left as it is."""

HARD_CHOICES = 5
"""A hard caption is drawn among so many of the most similar ones: always the nearest would be guessable."""

HARD_LIMIT = 0.9
"""A caption with a higher cosine is passed over: it may well be true of the image too."""

HARD_POOL = 100_000
"""At most so many captions, a random choice of them, are searched for near neighbours: the cost is pairs × pool."""

_SIMILARITIES_AT_ONCE = 8_000_000  # a sparse block of them takes 100 MB at the very most

_SIZE_FIELDS = ("width", "height", "original_width", "original_height", "sha256")

_Members: TypeAlias = dict[str, bytes]


def corrupt(
    shards: ShardSpec,
    out: Path | str,
    *,
    rate: float,
    protocol: NoiseProtocol = "caption",
    seed: int = 0,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Copy ``shards`` to the folder ``out``, making round(``rate`` × readable pairs) of the pairs wrong.

    Protocols:
        caption: a random choice of the pairs pass their captions on among themselves.
        image: images are passed on instead; all pairs that share one (byte for byte) get the same other one.
        hard: a pair gets a copy of one of the ``HARD_CHOICES`` captions nearest to its own by TF-IDF.
        uninformative: the caption becomes one that says nothing ("IMG_2034.JPG", "click to enlarge").

    A planted pair is always one that the corpus itself nowhere shows: another caption of the same image, or the same
    caption from elsewhere, would be no mismatch. Where passing on cannot achieve that, the pair gets a copy from any
    other pair; where nothing fits, it stays as it is and does not count, and ``progress`` is told.

    Readable means an image and a caption in the shard; nothing is decoded. Other samples are copied as they are, and
    the truth calls them "unreadable" (and matched, for want of anything better). Where a ``truth.parquet`` of an
    earlier corruption or of a synthetic corpus lies beside the shards, untouched pairs keep what it says of them and
    noise is planted in, and taken from, pairs of ``TRUE_KINDS`` only, so that a planted pair is wrong in one way only.

    Keys, members and their order are kept, and the same arguments give the same bytes, however many workers there
    are. Shards are written uncompressed, with extensions in lower case; members that the reader passes over (no key,
    or over ``MAX_MEMBER_BYTES``) and what lies after damage are left out. The sidecars ``NNNNN.parquet`` and
    ``NNNNN_stats.json`` are not copied: they repeat captions and sizes, and would contradict the shards.

    Memory: about 1 kB a pair, and for ``hard`` the captions' text besides. Disk: besides the copy, what is passed on
    is held once more while the work lasts.

    Returns:
        ``out/truth.parquet``: one row a sample in the order of the shards, with ``shard``, ``key``, ``matched``,
        ``kind`` ("match", "random", "hard", "uninformative", "unreadable", or as in the earlier truth),
        ``donor_shard`` and ``donor_key`` (where the caption or image came from; null for none).

    Raises:
        UsageError: a rate outside 0 to 1, an unknown protocol, no such shards, or an ``out`` that holds shards.
        NoisycleanError: a shard cannot be opened, or changes while it is read.
    """
    found, out = find_shards(shards), Path(out)
    _check(found, out, rate, protocol)
    workers = workers or default_workers()
    corpus = _survey(found, with_text=protocol == "hard", workers=workers, progress=progress)
    truth = _known_truth(corpus)
    rows, pairs = _candidates(corpus, truth)
    wanted = round(rate * int(corpus.usable.sum()))

    out.mkdir(parents=True, exist_ok=True)
    # Everything is made in a folder inside ``out`` and moved at the end: an interrupted run leaves no shards behind.
    with tempfile.TemporaryDirectory(dir=out, prefix=".corrupt-") as folder:
        space = _Workspace(Path(folder), {shard.name: at for shard, at in zip(found, corpus.places(), strict=True)})
        rng = np.random.default_rng(seed)
        count = min(wanted, len(rows))
        if protocol == "uninformative":
            planted = _leave_uninformative(space, corpus, rows, pairs, count, rng)
            truth.loc[planted, ["donor_shard", "donor_key"]] = None
        else:
            donors = _choose_donors(pairs, protocol, count, rng, progress)
            planted, given = rows[np.array(list(donors), int)], rows[np.array(list(donors.values()), int)]
            _gather(space, corpus, planted, given, protocol, workers, progress)
            truth.loc[planted, ["donor_shard", "donor_key"]] = truth.loc[given, ["shard", "key"]].to_numpy()
        truth.loc[planted, "matched"] = False
        truth.loc[planted, "kind"] = PLANTED_KIND[protocol]
        if len(planted) < wanted:
            progress.say(f"{len(planted):,} pairs were made wrong, not {wanted:,}: no others could be")

        with progress.task("writing shards", len(found), "shards") as task:
            for _ in map_in_processes(partial(_rewrite, space=space, protocol=protocol), found, workers):
                task.advance()
        _write_truth(truth, space.folder / TRUTH_NAME)
        for shard in found:
            target = out / f"{shard.name}.tar"
            target.parent.mkdir(parents=True, exist_ok=True)
            space.shard(shard).replace(target)
        # Last, as the mark that the folder is complete.
        return (space.folder / TRUTH_NAME).replace(out / TRUTH_NAME)


def _check(shards: Sequence[Shard], out: Path, rate: float, protocol: str) -> None:
    if not 0 <= rate <= 1:
        raise UsageError(f"rate must be 0 to 1, the share of pairs to make wrong, not {rate}")
    if protocol not in get_args(NoiseProtocol):
        raise UsageError(f"{protocol}: no such noise protocol; there are {', '.join(get_args(NoiseProtocol))}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder to write to")
    if out.resolve() in (Path(shard.path).resolve().parent for shard in shards if "://" not in shard.path):
        raise UsageError(f"{out} is where the shards lie; name another folder, they are not changed in place")
    if any(path.name.endswith(TAR_SUFFIXES) for path in out.rglob("*")):
        raise UsageError(f"{out} holds shards already; remove it or name another folder")


# The first pass: what there is.


@dataclass(frozen=True, slots=True)
class _Corpus:
    """All N samples in the order of the shards."""

    shards: list[Shard]
    starts: NDArray[np.int64]  # (len(shards) + 1,); the samples of shard s are starts[s] to starts[s + 1]
    keys: list[str]
    usable: NDArray[np.bool_]  # (N,)
    captions: NDArray[np.int64]  # (N,) hashes
    images: NDArray[np.int64]  # (N,) hashes
    texts: list[str]  # the captions of all N, or none at all

    def places(self) -> Iterable[_Place]:
        for number, (start, stop) in enumerate(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)):
            yield _Place(number, start, stop)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a shard stands in the corpus: its number, and its samples' rows."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _ShardSurvey:
    keys: list[str]
    usable: list[bool]
    hashes: NDArray[np.int64]  # (n, 2): caption, image
    texts: list[str]


def _survey(shards: list[Shard], *, with_text: bool, workers: int, progress: Progress) -> _Corpus:
    parts: list[_ShardSurvey] = []
    with progress.task("reading shards", len(shards), "shards") as task:
        for part in map_in_processes(partial(_survey_shard, with_text=with_text), shards, workers):
            parts.append(part)
            task.advance()
    hashes = np.concatenate([part.hashes for part in parts])
    return _Corpus(
        shards=shards,
        starts=np.cumsum([0, *(len(part.keys) for part in parts)], dtype=np.int64),
        keys=[key for part in parts for key in part.keys],
        usable=np.array([usable for part in parts for usable in part.usable], np.bool_),
        captions=hashes[:, 0],
        images=hashes[:, 1],
        texts=[text for part in parts for text in part.texts],
    )


def _survey_shard(shard: Shard, with_text: bool) -> _ShardSurvey:
    keys: list[str] = []
    usable: list[bool] = []
    hashes: list[tuple[int, int]] = []
    texts: list[str] = []
    for sample in ShardReader(shard):
        keys.append(sample.key)
        usable.append(sample.fault is None)
        hashes.append((caption_id(sample.caption or ""), image_id(sample.image or b"")))
        if with_text:
            texts.append(sample.caption or "")
    return _ShardSurvey(keys, usable, np.array(hashes, np.int64).reshape(-1, 2), texts)


def _known_truth(corpus: _Corpus) -> pd.DataFrame:
    """What is known before anything is planted; row r is sample r, the columns are those of the written truth."""
    import pandas as pd

    names = [shard.name for shard in corpus.shards]
    samples = pd.DataFrame({"shard": np.repeat(names, np.diff(corpus.starts)), "key": corpus.keys}, dtype=object)
    earlier = _earlier_truth(corpus.shards)
    truth = samples.merge(earlier, how="left", on=["shard", "key"])
    truth["matched"] = truth["matched"].ne(False)  # true where there is no row as well
    truth["kind"] = truth["kind"].fillna("match")
    truth.loc[~corpus.usable, ["matched", "kind", "donor_shard", "donor_key"]] = [True, "unreadable", None, None]
    return truth


def _earlier_truth(shards: Sequence[Shard]) -> pd.DataFrame:
    """The rows of all truth tables that lie beside the shards, under the names that the shards have in this run."""
    import pandas as pd

    folders: dict[tuple[str, str], None] = {}  # (folder, what this run puts before the names it knows)
    for shard in shards:
        # A shard named "en/00000" may be the 00000 of a corpus in en/, or the en/00000 of one further up.
        for known in (posixpath.basename(shard.name), shard.name):
            folder = shard.path.replace("\\", "/").rpartition(f"{known}.")[0]
            folders[folder, shard.name.removesuffix(known)] = None
    tables = [pd.DataFrame(columns=TRUTH_SCHEMA.names)]
    for folder, prefix in folders:
        table = _read_truth(f"{folder}{TRUTH_NAME}")
        if table is not None:
            tables.append(table.assign(shard=prefix + table["shard"], donor_shard=prefix + table["donor_shard"]))
    return pd.concat([table.astype(object) for table in tables]).drop_duplicates(["shard", "key"])


def _read_truth(path: str) -> pd.DataFrame | None:
    import fsspec
    import pandas as pd

    filesystem, inner = fsspec.core.url_to_fs(path)
    if not filesystem.exists(inner):
        return None
    try:
        with filesystem.open(inner, "rb") as file:
            return pd.read_parquet(io.BytesIO(file.read()), columns=TRUTH_SCHEMA.names)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise NoisycleanError(f"{path}: not a truth table ({error}); repair it or move it away") from error


def _write_truth(truth: pd.DataFrame, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pandas(truth, schema=TRUTH_SCHEMA, preserve_index=False), path)


# The choice: who gets whose caption or image.


class _Pairs:
    """The pairs that noise may be planted in, numbered in the order of (shard, key)."""

    def __init__(self, captions: list[int], images: list[int], texts: list[str], known: set[int]) -> None:
        self.captions = captions
        self.images = images
        self.texts = texts
        self._known = known

    def __len__(self) -> int:
        return len(self.captions)

    def wrong(self, *, image: int, caption: int) -> bool:
        """Whether the corpus nowhere shows these two (hashes) together."""
        return image ^ caption not in self._known


def _candidates(corpus: _Corpus, truth: pd.DataFrame) -> tuple[NDArray[np.int64], _Pairs]:
    eligible = truth[truth["kind"].isin(TRUE_KINDS).to_numpy() & corpus.usable]
    # By name, not by place, so that a shard's inner order has no say in who is chosen.
    rows = eligible.sort_values(["shard", "key"]).index.to_numpy(np.int64)
    known = set((corpus.images ^ corpus.captions)[corpus.usable].tolist())
    texts = [corpus.texts[row] for row in rows] if corpus.texts else []
    return rows, _Pairs(corpus.captions[rows].tolist(), corpus.images[rows].tolist(), texts, known)


def _choose_donors(
    pairs: _Pairs, protocol: NoiseProtocol, count: int, rng: np.random.Generator, progress: Progress
) -> dict[int, int]:
    """Recipient → donor, for ``count`` recipients where possible."""
    if count == 0:
        return {}
    if protocol == "hard":
        return _near_neighbours(pairs, count, rng, progress)
    return (_pass_images_on if protocol == "image" else _pass_captions_on)(pairs, count, rng)


def _pass_captions_on(pairs: _Pairs, count: int, rng: np.random.Generator) -> dict[int, int]:
    def fits(recipient: int, donor: int) -> bool:
        return pairs.wrong(image=pairs.images[recipient], caption=pairs.captions[donor])

    everyone = np.arange(len(pairs))
    return _pass_on(rng.permutation(everyone)[:count], everyone, fits, rng)


def _pass_images_on(pairs: _Pairs, count: int, rng: np.random.Generator) -> dict[int, int]:
    sharing: dict[int, list[int]] = {}
    for pair, image in enumerate(pairs.images):
        sharing.setdefault(image, []).append(pair)
    groups = {members[0]: members for members in sharing.values()}  # known by their first pair

    def fits(recipient: int, donor: int) -> bool:
        image = pairs.images[donor]
        return all(pairs.wrong(image=image, caption=pairs.captions[pair]) for pair in groups[recipient])

    everyone = np.array(list(groups))
    chosen = []
    for group in rng.permutation(everyone).tolist():
        if len(groups[group]) <= count:
            chosen.append(group)
            count -= len(groups[group])
    donors = _pass_on(np.array(chosen, np.int64), everyone, fits, rng)
    return {pair: donor for group, donor in donors.items() for pair in groups[group]}


def _pass_on(
    chosen: NDArray[np.int64],
    everyone: NDArray[np.int64],
    fits: Callable[[int, int], bool],
    rng: np.random.Generator,
) -> dict[int, int]:
    """Recipient → donor: each of ``chosen`` (in random order) gets the next one's, save where that does not fit.

    Two that can thereby be mended swap their donors; else the recipient gets a copy from any of ``everyone``.
    """
    recipients = chosen.tolist()
    donors = recipients[1:] + recipients[:1]
    unserved = set()
    for here, recipient in enumerate(recipients):
        if fits(recipient, donors[here]):
            continue
        for there in _some(len(recipients), rng):
            if fits(recipient, donors[there]) and fits(recipients[there], donors[here]):
                donors[here], donors[there] = donors[there], donors[here]
                break
        else:
            copied = next((one for one in everyone[_some(len(everyone), rng)].tolist() if fits(recipient, one)), None)
            if copied is None:
                unserved.add(recipient)
            else:
                donors[here] = copied
    return {one: donor for one, donor in zip(recipients, donors, strict=True) if one not in unserved}


def _some(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Different numbers under ``count`` in random order, at most ``TRIES``."""
    return rng.choice(count, min(count, TRIES), replace=False)


def _near_neighbours(pairs: _Pairs, count: int, rng: np.random.Generator, progress: Progress) -> dict[int, int]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    order = rng.permutation(len(pairs))
    distinct = {pairs.captions[pair]: pair for pair in order.tolist()}
    pool = np.array(list(distinct.values())[:HARD_POOL], np.int64)
    vectoriser = TfidfVectorizer(token_pattern=r"\w+", dtype=np.float32)
    try:
        pool_vectors = vectoriser.fit_transform(pairs.texts[pair] for pair in pool).T.tocsr()
    except ValueError:  # not one word in all the captions
        return {}
    at_once = max(1, _SIMILARITIES_AT_ONCE // len(pool))
    donors: dict[int, int] = {}
    with progress.task("finding near captions", count, "pairs") as task:
        # Through all pairs if need be: some captions have no near neighbour.
        for start in range(0, len(order), at_once):
            recipients = order[start : start + at_once].tolist()
            similarities = vectoriser.transform(pairs.texts[pair] for pair in recipients) @ pool_vectors
            for row, recipient in enumerate(recipients):
                span = slice(*similarities.indptr[row : row + 2])
                near = _nearest(similarities.data[span], pool[similarities.indices[span]])
                image = pairs.images[recipient]
                choices = list(
                    islice((one for one in near if pairs.wrong(image=image, caption=pairs.captions[one])), HARD_CHOICES)
                )
                if choices:
                    donors[recipient] = choices[rng.integers(len(choices))]
                    task.advance()
                if len(donors) == count:
                    return donors
    return donors


def _nearest(similarities: NDArray[np.float32], pairs: NDArray[np.int64]) -> list[int]:
    """The most similar pairs under ``HARD_LIMIT``, the nearest first, at most ``TRIES``."""
    under = similarities <= HARD_LIMIT
    similarities, pairs = similarities[under], pairs[under]
    if len(pairs) > TRIES:
        top = np.argpartition(-similarities, TRIES)[:TRIES]
        similarities, pairs = similarities[top], pairs[top]
    nearest: list[int] = pairs[np.lexsort((pairs, -similarities))].tolist()
    return nearest


# The passing on.
#
# Any pair may get what any other has, so what is given must be at hand at random, while tars (gzipped, remote) are
# read from start to end. Hence a second pass copies what is given, and nothing else, into one plain file a shard, and
# the third fetches it from there by file and offset. Memory holds the offsets only.


@dataclass(frozen=True, slots=True)
class _Workspace:
    """A folder in which the passes leave things for one another; arrays in it have one row a sample."""

    folder: Path
    places: dict[str, _Place]

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


def _leave_uninformative(
    space: _Workspace,
    corpus: _Corpus,
    rows: NDArray[np.int64],
    pairs: _Pairs,
    count: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Make up captions for ``count`` pairs and leave them as if shard 0 had given them; return the recipients."""
    from noisyclean.corpus.synthetic.captions import write_nothing

    sources = np.full((len(corpus.keys), 2), -1, np.int64)
    chosen = rng.permutation(len(pairs))[:count]
    with space.given(0).open("wb") as file:
        for pair in chosen.tolist():
            caption = write_nothing(rng)
            while not pairs.wrong(image=pairs.images[pair], caption=caption_id(caption)):
                caption = write_nothing(rng)
            sources[rows[pair]] = 0, file.tell()
            pickle.dump({CAPTION_EXTENSIONS[0]: caption.encode()}, file)
    space.save("sources", sources)
    return rows[chosen]


def _gather(
    space: _Workspace,
    corpus: _Corpus,
    recipients: NDArray[np.int64],
    donors: NDArray[np.int64],
    protocol: NoiseProtocol,
    workers: int,
    progress: Progress,
) -> None:
    """Copy out what the donors give, and note for each recipient where it lies."""
    gives = np.zeros(len(corpus.keys), np.bool_)
    gives[donors] = True
    space.save("gives", gives)
    offsets = np.full(len(corpus.keys), -1, np.int64)
    with progress.task("gathering what is passed on", len(corpus.shards), "shards") as task:
        gather = partial(_gather_shard, space=space, protocol=protocol)
        for place, found in zip(corpus.places(), map_in_processes(gather, corpus.shards, workers), strict=True):
            offsets[place.start + np.flatnonzero(gives[place.start : place.stop])] = found
            task.advance()
    sources = np.full((len(corpus.keys), 2), -1, np.int64)
    sources[recipients, 0] = np.searchsorted(corpus.starts, donors, side="right") - 1
    sources[recipients, 1] = offsets[donors]
    space.save("sources", sources)


def _gather_shard(shard: Shard, space: _Workspace, protocol: NoiseProtocol) -> list[int]:
    gives = space.load("gives", shard)
    offsets = []
    with space.given(space.places[shard.name].number).open("wb") as file:
        for raw in _same_samples(shard, len(gives)):
            if gives[raw.index]:
                offsets.append(file.tell())
                pickle.dump({ext: data for ext, data in raw.members.items() if _is_given(ext, protocol)}, file)
    return offsets


def _is_given(extension: str, protocol: NoiseProtocol) -> bool:
    given = is_image(extension) if protocol == "image" else extension in CAPTION_EXTENSIONS
    return given or extension == METADATA_EXTENSION


def _rewrite(shard: Shard, space: _Workspace, protocol: NoiseProtocol) -> None:
    """Write the copy of one shard: members in their order, each a plain file without owner or time."""
    exchange = _with_image_of if protocol == "image" else _with_caption_of
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
                member = tarfile.TarInfo(f"{raw.key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _same_samples(shard: Shard, count: int) -> Iterable[SampleMembers]:
    """The samples of a shard that had ``count`` of them when it was read before."""
    try:
        for raw, _ in zip(ShardReader(shard).members(), range(count), strict=True):
            yield raw
    except ValueError as error:
        raise NoisycleanError(f"{shard.path}: changed while it was read; run the command again") from error


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
    assert own is not None and given is not None  # only usable pairs give or take  # noqa: PT018
    # Another member may bear the donor's extension, as a mask does; decoders go by the bytes anyway.
    name = own if given in members else given
    changed = {name if ext == own else ext: donor[given] if ext == own else data for ext, data in members.items()}
    metadata = read_metadata(members.get(METADATA_EXTENSION))
    others = read_metadata(donor.get(METADATA_EXTENSION))
    common = [name for name in _SIZE_FIELDS if name in metadata and name in others]
    if common:
        metadata.update({name: others[name] for name in common})
        changed[METADATA_EXTENSION] = json.dumps(metadata).encode()
    return changed
