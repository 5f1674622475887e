"""Pairs that come embedded: the layouts they are kept in, read as a stream, and written.

* ``.npz`` with an array of images and one of texts (:data:`ARRAY_NAMES`). A Parquet file of the same stem beside it, if
  there is one, describes the rows: so does DataComp's metadata, and what :func:`save_embeddings` writes.
* clip-retrieval's folders: ``img_emb/img_emb_0.npy``, ``text_emb/text_emb_0.npy``, ``metadata/metadata_0.parquet``.
* Parquet with two columns of vectors (:data:`VECTOR_NAMES`), and any that describe the rows.

Row i of both sides is pair i. One file, or part of a clip-retrieval folder, is one shard. npy files are mapped, and
vectors in Parquet are read by pages, however large its row groups are; the arrays of an npz and what describes the rows
are loaded whole, those of one file at a time.

A row that holds no two vectors of the file's width becomes unreadable, and the rest is read. What describes a row and
cannot be understood is null.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final, TypeAlias
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from noisyclean.corpus.chunk import Chunk
from noisyclean.corpus.identity import caption_id, image_id, pair_id
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.locate import Shard
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import read_record, replacing, with_record, write_parquet
from noisyclean.progress import SILENT, Progress

Vectors: TypeAlias = NDArray[np.floating[Any]]
_Batch: TypeAlias = tuple[Vectors, Vectors, pa.Array]  # (N, d) each side as it is, and the faults that its values lack

ARRAY_NAMES: Final = (("img", "txt"), ("image", "text"), ("l14_img", "l14_txt"), ("b32_img", "b32_txt"))
"""Names of the two arrays, the first pair found being taken; the last two are those of DataComp's metadata."""
VECTOR_NAMES: Final = (
    ("image_embedding", "text_embedding"),
    ("img_embedding", "txt_embedding"),
    ("image_emb", "text_emb"),
    ("img_emb", "txt_emb"),
    ("image_features", "text_features"),
    *ARRAY_NAMES,
)
"""Names of the two columns of vectors in Parquet, the first pair found being taken."""
SUFFIXES: Final = (".npz", ".parquet", ".npy")
"""Of the files that hold embeddings."""
LAYOUTS: Final = "an .npz or .parquet file, a folder or glob of them, or a clip-retrieval folder (img_emb/, text_emb/)"

_CHUNK = 4096
_KEY_DIGITS = 9
_KEYS = ("key", "uid", "image_path")
_TEXTS = {"uid": ("uid",), "url": ("url",), "caption": ("caption", "text")}
_COUNTS = {"width": ("width", "original_width"), "height": ("height", "original_height")}
_WHOLE_NUMBER = r"^\s*(?P<digits>[0-9]{1,9})(?:\.[0-9]*)?\s*$"
_PAGES = {"pre_buffer": False, "buffer_size": 1 << 20}
"""Parquet piece by piece: else the columns of a row group, which may be the whole file, are fetched at once."""
_NOT_READ = (OSError, EOFError, ValueError, RuntimeError, MemoryError, BadZipFile, zlib.error, TokenError)
"""What pathlib, numpy, the zip it opens and pyarrow raise where they cannot read."""


@dataclass(frozen=True)
class Origin:
    """What made saved embeddings.

    Attributes:
        encoder: fingerprint of the encoder.
        temperature: its τ, as ``repr`` has it.
        source: the state of the shard they are of.
    """

    encoder: str
    temperature: str
    source: str


def find_embeddings(spec: Path | str) -> list[Shard]:
    """Resolve ``spec`` to the files of embeddings it names, sorted by name.

    A shard's name is its path below the folder that holds all of them, without the suffix; in a clip-retrieval folder
    it is the number of the part. Where there are both npz and Parquet files, the latter describe the former.

    Raises:
        UsageError: nothing matches, or it cannot be looked for.
    """
    try:
        files = _matching_files(Path(spec).expanduser())
    except _NOT_READ as error:
        raise UsageError(f"{spec}: cannot look for embeddings there ({_why(error)}); give {LAYOUTS}") from error
    if not files:
        raise UsageError(f"{spec}: no embeddings there; give {LAYOUTS}")
    if files[0].suffix == ".npy":
        return [Shard(_part_number(part), str(part)) for part in files]
    root = os.path.commonpath([one.parent for one in files])
    named = (Shard(one.relative_to(root).with_suffix("").as_posix(), str(one)) for one in files)
    return sorted(named, key=lambda shard: shard.name)


def embedding_files(shard: Shard) -> list[Path]:
    """The files that hold or describe the pairs of a shard; the one that only describes may be missing."""
    path = Path(shard.path)
    if path.suffix == ".npz":
        return [path, path.with_suffix(".parquet")]
    if path.suffix == ".npy":
        root, number = path.parent.parent, _part_number(path)
        return [path, root / "text_emb" / f"text_emb_{number}.npy", root / "metadata" / f"metadata_{number}.parquet"]
    return [path]


def read_embeddings(shards: Sequence[Shard], *, width: int | None = None, chunk_size: int = _CHUNK) -> Iterator[Chunk]:
    """Read the shards one after the other; the chunks hold (R, d) float32 unit-norm embeddings.

    A row's key is its ``key``, ``uid`` or the stem of its ``image_path``, the first of these that every row of the file
    has and no two share; else the number of the row. The hash of a picture is that of its embedding, and so is the
    hash of a caption where there is none.

    Args:
        shards: as :func:`find_embeddings` gives them.
        width: d; None: that of the first pair.
        chunk_size: rows in a chunk, at most.

    Raises:
        UsageError: a file is missing, broken or not in one of the layouts, or its embeddings are of another width.
    """
    for shard in shards:
        for chunk in _read_shard(shard, chunk_size):
            if len(chunk.image):
                width = width or chunk.image.shape[1]
                if chunk.image.shape[1] != width:
                    raise UsageError(
                        f"{shard.path}: embeddings of width {chunk.image.shape[1]}, all others have {width}; "
                        "score the embeddings of one model at a time"
                    )
            yield chunk


def index_embeddings(shards: Sequence[Shard], *, progress: Progress = SILENT) -> CorpusIndex:
    """An index of embedded pairs, as :func:`noisyclean.corpus.index.index_corpus` makes one of tars.

    Raises:
        UsageError: as :func:`read_embeddings`.
    """
    hashes = []
    usable = []
    counts = [0] * len(shards)
    position = 0
    with progress.task("reading the embeddings", len(shards), "shards") as task:
        for chunk in read_embeddings(shards):
            readable = chunk.readable
            known = np.zeros((len(readable), 3), np.int64)
            known[:, 0] = [pair_id(chunk.shard, key) for key in chunk.rows["key"].to_pylist()]
            known[readable, 1], known[readable, 2] = chunk.caption_ids, chunk.image_ids
            hashes.append(known)
            usable.append(readable)
            counts[position] += len(readable)
            if chunk.last:
                position += 1
                task.advance()
    pair, caption, image = np.concatenate(hashes).T.copy()
    return CorpusIndex(list(shards), np.cumsum([0, *counts]), pair, caption, image, np.concatenate(usable))


def take_embeddings(
    index: CorpusIndex, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """The embeddings of usable ``rows`` of the index.

    Returns:
        The rows in ascending order, and (R, d) float32 unit-norm embeddings of images and texts.

    Raises:
        NoisycleanError: no rows are wanted.
    """
    if not len(rows):
        raise NoisycleanError(f"{index.shards[0].path}: not a single pair of embeddings can be used")
    wanted = np.zeros(len(index), np.bool_)
    wanted[rows] = True
    images, texts = [], []
    for position, shard in enumerate(index.shards):
        mask = wanted[index.rows_at(position)]
        first = 0
        for chunk in read_embeddings([shard]) if mask.any() else ():
            here = mask[first : first + chunk.rows.num_rows]
            first += len(here)
            chosen = here[chunk.readable]
            if chosen.any():  # else its embeddings may have no width
                images.append(chunk.image.numpy()[chosen])
                texts.append(chunk.text.numpy()[chosen])
    return np.flatnonzero(wanted), np.concatenate(images), np.concatenate(texts)


def save_embeddings(
    directory: Path, shard: str, rows: pa.Table, image: NDArray[np.float16], text: NDArray[np.float16], origin: Origin
) -> None:
    """Write ``DIRECTORY/SHARD.npz`` (``img``, ``txt``) and the ``.parquet`` of the same stem that describes its rows.

    Args:
        rows: the pairs, in the order of ``image`` and ``text``, (R, d) float16.
    """
    path = _saved(directory, shard)
    path.unlink(missing_ok=True)  # it comes last: its presence means that both are there, and belong together
    write_parquet(path.with_suffix(".parquet"), with_record(rows, origin))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, img=image, txt=text)


def saved_origin(directory: Path, shard: str) -> Origin | None:
    """What made the embeddings of a shard in ``directory``; None: they are not, or not all, there.

    Raises:
        UsageError: a file lies in their place that noisyclean did not write.
    """
    path = _saved(directory, shard)
    origin = _read_origin(path.with_suffix(".parquet"))
    if origin is None:
        for one in (path, path.with_suffix(".parquet")):
            if one.exists():
                raise UsageError(f"{one}: in the way of the embeddings to be saved; give another folder")
    return origin if path.exists() else None


def common_origin(shards: Sequence[Shard]) -> Origin | None:
    """What made all these embeddings, as :func:`save_embeddings` recorded it; None: nothing is recorded.

    Raises:
        UsageError: they are of different encoders.
    """
    common: Origin | None = None
    for shard in shards:
        origin = _read_origin(embedding_files(shard)[-1])
        if origin is not None and common is not None and origin.encoder != common.encoder:
            raise UsageError(f"{shard.path}: by another model than those before it; score each model's by themselves")
        common = common or origin
    return common


def read_npz(path: Path, names: Sequence[tuple[str, str]] = ARRAY_NAMES) -> tuple[tuple[str, str], Vectors, Vectors]:
    """The two arrays of an npz file as they are, ``[N, d]`` each, with their names.

    Args:
        names: which to look for; the first pair found is taken.

    Raises:
        UsageError: the file is no npz file, lacks the arrays, or they are no pairs of vectors.
    """
    try:
        file = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except _NOT_READ as error:
        raise UsageError(f"{path}: not an npz file of embeddings ({_why(error)})") from error
    if isinstance(file, np.ndarray):
        raise UsageError(f"{path}: a single array; an npz file with two is needed")
    with file:
        found = _find_names(path, "arrays", file.files, names)
        image, text = (_load_vectors(f"{path}: {name}", partial(file.__getitem__, name)) for name in found)
    if image.shape != text.shape:
        raise UsageError(
            f"{path}: {found[0]} is {list(image.shape)} but {found[1]} is {list(text.shape)}; row i of both is a pair"
        )
    return found, image, text


def _matching_files(path: Path) -> list[Path]:
    if (path / "img_emb").is_dir():
        parts = sorted((path / "img_emb").glob("img_emb_*.npy"))
        if not parts:
            raise UsageError(f"{path / 'img_emb'}: no img_emb_*.npy in it; name a folder that clip-retrieval wrote")
        return parts
    if path.is_dir():
        found = list(path.rglob("*"))
    elif path.is_file():
        found = [path]
    else:
        found = list(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if path.name else []
    by_suffix = ([one for one in found if one.suffix == suffix and one.is_file()] for suffix in (".npz", ".parquet"))
    return next(filter(None, by_suffix), [])


def _read_shard(shard: Shard, chunk_size: int) -> Iterator[Chunk]:
    path = Path(shard.path)
    if path.suffix == ".parquet":
        count, batches = _open_parquet(path, chunk_size)
    else:
        image, text = _open_parts(shard) if path.suffix == ".npy" else read_npz(path)[1:]
        count, batches = len(image), _slices(image, text, chunk_size)
    described = _describe(embedding_files(shard)[-1], count)
    first = 0
    for batch in batches:
        rows = described.slice(first, len(batch[0]))
        first += len(batch[0])
        yield _chunk(shard.name, rows, batch, last=first == count)
    if count == 0:
        none = np.zeros((0, 1), np.float32)
        yield _chunk(shard.name, described, (none, none, _no_faults(0)), last=True)


def _chunk(shard: str, rows: pa.Table, batch: _Batch, *, last: bool) -> Chunk:
    import torch

    image, image_fault = _unit_rows("image", batch[0])
    text, text_fault = _unit_rows("text", batch[1])
    fault = pc.coalesce(batch[2], image_fault, text_fault)
    readable = fault.is_null()
    mask = readable.to_numpy(zero_copy_only=False)
    image, text = image[mask], text[mask]
    caption_ids = [
        caption_id(caption) if caption else image_id(vector.tobytes())
        for caption, vector in zip(rows["caption"].filter(readable).to_pylist(), text, strict=True)
    ]
    return Chunk(
        shard=shard,
        rows=rows.append_column("fault", fault),
        caption_ids=np.array(caption_ids, np.int64),
        image_ids=np.array([image_id(vector.tobytes()) for vector in image], np.int64),
        image=torch.from_numpy(image),
        text=torch.from_numpy(text),
        last=last,
    )


def _unit_rows(side: str, vectors: Vectors) -> tuple[NDArray[np.float32], pa.Array]:
    """The rows brought to length 1, and what is wrong with those that cannot be."""
    wide = np.asarray(vectors, np.promote_types(vectors.dtype, np.float32))
    # Squares of very large and very small values do not fit. A power of two changes no digit of a value.
    _, exponent = np.frexp(np.abs(wide).max(axis=1, initial=0, keepdims=True))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rows = (wide / np.ldexp(wide.dtype.type(1), exponent - 1)).astype(np.float32, copy=False)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= length
    fault = np.full(len(rows), None, dtype=object)
    fault[length[:, 0] == 0] = f"{side} embedding is zero"
    fault[~np.isfinite(length[:, 0])] = f"{side} embedding is missing or not finite"
    return rows, pa.array(fault, pa.string())


def _no_faults(count: int) -> pa.Array:
    return pa.nulls(count, pa.string())


def _slices(image: Vectors, text: Vectors, chunk_size: int) -> Iterator[_Batch]:
    for start in range(0, len(image), chunk_size):
        here = slice(start, start + chunk_size)
        yield image[here], text[here], _no_faults(len(image[here]))


def _open_parts(shard: Shard) -> tuple[Vectors, Vectors]:
    """The two mapped arrays of a part of a clip-retrieval folder."""
    files = embedding_files(shard)[:2]
    for path in files:
        if not path.exists():
            raise UsageError(f"{path}: no such file; images and texts of a part belong together")
    image, text = (
        _load_vectors(str(path), partial(np.load, path, mmap_mode="r", allow_pickle=False)) for path in files
    )
    if image.shape != text.shape:
        raise UsageError(
            f"{shard.path}: {list(image.shape)} but {files[1]} is {list(text.shape)}; row i of both is a pair"
        )
    return image, text


def _load_vectors(where: str, load: Callable[[], Any]) -> Vectors:
    """The array that ``load`` gives, if it is one of vectors; ``where`` names it."""
    needed = "floats [pairs, width] are needed"
    try:
        array = load()
    except _NOT_READ as error:
        raise UsageError(f"{where} cannot be read ({_why(error)}); {needed}") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{where} is no array; {needed}")
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise UsageError(f"{where} is {array.dtype} {list(array.shape)}; {needed}")
    return array


def _open_parquet(path: Path, chunk_size: int) -> tuple[int, Iterator[_Batch]]:
    """The number of rows, and the two columns of vectors in batches."""
    try:
        file = pq.ParquetFile(path, **_PAGES)
    except _NOT_READ as error:
        raise UsageError(f"{path}: not a Parquet file ({_why(error)})") from error
    present = [column.name for column in file.schema_arrow if _is_vectors(column.type)]
    names = _find_names(path, "columns of vectors", present, VECTOR_NAMES)
    _refuse_repeated(path, file, names)

    def batches() -> Iterator[_Batch]:
        widths = [0, 0]
        try:
            for batch in file.iter_batches(chunk_size, columns=list(names)):
                columns = [batch[name] for name in names]
                widths = [width or _usual_width(column) for width, column in zip(widths, columns, strict=True)]
                if all(widths) and widths[0] != widths[1]:
                    raise UsageError(
                        f"{path}: {names[0]} holds {widths[0]} values a row but {names[1]} {widths[1]}; "
                        "both are by one model"
                    )
                image, text = map(_matrix, columns, widths)
                yield image, text, pc.coalesce(*map(_odd_widths, ("image", "text"), columns, widths))
        except _NOT_READ as error:
            raise UsageError(f"{path}: a damaged Parquet file ({_why(error)}); fetch it again") from error

    return file.metadata.num_rows, batches()


def _usual_width(column: pa.Array) -> int:
    """How many values most vectors of a column have; 0: none has any.

    A file's is that of its first vectors, so that an odd one among them is what is odd.
    """
    counts = np.bincount(pc.list_value_length(column).drop_null().to_numpy(), minlength=1)
    counts[0] = 0
    return int(counts.argmax())


def _matrix(column: pa.Array, width: int) -> Vectors:
    """A column of vectors as ``[N, width]``, with NaN where there is none of that width."""
    fits = pc.fill_null(pc.equal(pc.list_value_length(column), width), False)
    values = column.filter(fits).flatten().to_numpy(zero_copy_only=False)
    matrix: Vectors = np.full((len(column), max(width, 1)), np.nan, values.dtype)
    if width:
        matrix[fits.to_numpy(zero_copy_only=False)] = values.reshape(-1, width)
    return matrix


def _odd_widths(side: str, column: pa.Array, width: int) -> pa.Array:
    """What is wrong with the vectors of another width."""
    found = pc.list_value_length(column)
    fault = pc.binary_join_element_wise(f"{side} embedding has", found.cast(pa.string()), f"values, not {width}", " ")
    return pc.if_else(pc.equal(found, width), None, fault)


def _is_vectors(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def _describe(path: Path, count: int) -> pa.Table:
    """What a Parquet file says of ``count`` rows (nothing, if it is not there), all columns but ``fault``."""
    found = _read_descriptions(path, count) if path.exists() else {}
    numbers = pa.array(np.arange(count))
    keys = (found[name] for name in _KEYS if name in found)
    unique = (one for one in keys if one.null_count == 0 and pc.count_distinct(one).as_py() == count)
    columns = {
        "key": next(unique, pc.utf8_lpad(numbers.cast(pa.string()), _KEY_DIGITS, "0")),
        "index": numbers,
        **{name: found.get(name, pa.nulls(count, pa.string())) for name in _TEXTS},
        **{name: found.get(name, pa.nulls(count, pa.int32())) for name in _COUNTS},
    }
    return pa.table(columns)


def _read_descriptions(path: Path, count: int) -> dict[str, pa.ChunkedArray]:
    try:
        file = pq.ParquetFile(path)
        if file.metadata.num_rows != count:
            raise UsageError(f"{path}: {file.metadata.num_rows} rows for {count} embeddings; one row a pair is needed")
        # laion's tables have them in capitals.
        plain = {one.name.lower(): one.name for one in file.schema_arrow if not pa.types.is_nested(one.type)}
        sought = {**{key: (key,) for key in _KEYS}, **_TEXTS, **_COUNTS}
        sources = {
            name: plain[there] for name, aliases in sought.items() if (there := next(filter(plain.get, aliases), None))
        }
        _refuse_repeated(path, file, sources.values())
        table = file.read(columns=sorted(set(sources.values())))
        texts = {name: _texts(table[column]) for name, column in sources.items()}
    except _NOT_READ as error:
        raise UsageError(f"{path}: cannot read what describes the embeddings ({_why(error)})") from error
    described = {name: _counts(text) if name in _COUNTS else text for name, text in texts.items()}
    if "image_path" in described:
        described["image_path"] = pc.replace_substring_regex(described["image_path"], r"^.*/|\.[^./]*$", "")
    return described


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any plain column as strings, with null where one would not be UTF-8."""
    texts = column.cast(pa.string(), safe=False)
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        texts = pa.chunked_array([[_decoded(raw) for raw in texts.cast(pa.binary()).to_pylist()]], pa.string())
    return texts


def _decoded(raw: bytes | None) -> str | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return None


def _counts(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.struct_field(pc.extract_regex(texts, _WHOLE_NUMBER), "digits").cast(pa.int32())


def _refuse_repeated(path: Path, file: pq.ParquetFile, names: Iterable[str]) -> None:
    present = file.schema_arrow.names
    for name in names:
        if present.count(name) > 1:
            raise UsageError(f"{path}: {present.count(name)} columns named {name}; rename all but one")


def _find_names(path: Path, what: str, present: Sequence[str], names: Sequence[tuple[str, str]]) -> tuple[str, str]:
    for pair in names:
        if set(pair) <= set(present):
            return pair
    sought = " or ".join(f"{image} and {text}" for image, text in names)
    raise UsageError(f"{path}: needs the {what} {sought}, but has {', '.join(present) or 'none'}")


def _why(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _part_number(path: Path) -> str:
    return path.stem.removeprefix("img_emb_")


def _saved(directory: Path, shard: str) -> Path:
    return directory / f"{shard}.npz"


def _read_origin(path: Path) -> Origin | None:
    try:
        return read_record(pq.read_metadata(path).metadata, Origin)
    except (*_NOT_READ, KeyError):
        return None
