"""Pairs that come embedded: the layouts they are kept in, read as a stream, and written.

* ``.npz`` with an array of images and one of texts (:data:`ARRAY_NAMES`). A Parquet file of the same stem beside it, if
  there is one, describes the rows: so does DataComp's metadata, and what :func:`save_embeddings` writes.
* clip-retrieval's folders: ``img_emb/img_emb_0.npy``, ``text_emb/text_emb_0.npy``, ``metadata/metadata_0.parquet``.
* Parquet with two columns of vectors (:data:`VECTOR_NAMES`), and any that describe the rows.

Row i of both sides is pair i. One file, or part of a clip-retrieval folder, is one shard. npy files are mapped and
Parquet is read by row groups; the arrays of an npz are loaded whole, those of one file at a time.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from noisyclean.corpus.identity import caption_id, image_id, pair_id
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.locate import Shard
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import read_record, replacing, with_record, write_parquet
from noisyclean.progress import SILENT, Progress

Vectors: TypeAlias = NDArray[np.floating[Any]]

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


@dataclass(frozen=True)
class EmbeddedChunk:
    """Consecutive pairs of one shard.

    Attributes:
        shard: the shard's name.
        rows: ``key``, ``index``, ``uid``, ``url``, ``caption``, ``width``, ``height`` and ``fault`` of the N rows; one
            with a ``fault`` has no embeddings.
        ids: (R,) int64 hashes of the captions of the R readable rows in order, or of the texts' embeddings where there
            is no caption.
        image, text: (R, d) float32 unit-norm embeddings.
        last: whether the shard ends with this chunk. Every shard ends with exactly one such chunk, maybe empty.
    """

    shard: str
    rows: pa.Table
    ids: NDArray[np.int64]
    image: NDArray[np.float32]
    text: NDArray[np.float32]
    last: bool


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
        UsageError: nothing matches.
    """
    path = Path(spec).expanduser()
    if (path / "img_emb").is_dir():
        parts = sorted((path / "img_emb").glob("img_emb_*.npy"))
        if not parts:
            raise UsageError(f"{path / 'img_emb'}: no img_emb_*.npy in it; name a folder that clip-retrieval wrote")
        return [Shard(_part_number(part), str(part)) for part in parts]
    if path.is_dir():
        found = list(path.rglob("*"))
    elif path.is_file():
        found = [path]
    else:
        found = list(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if path.name else []
    by_suffix = ([one for one in found if one.suffix == suffix and one.is_file()] for suffix in (".npz", ".parquet"))
    files = next(filter(None, by_suffix), [])
    if not files:
        raise UsageError(f"{spec}: no embeddings there; give {LAYOUTS}")
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


def read_embeddings(
    shards: Sequence[Shard], *, width: int | None = None, chunk_size: int = _CHUNK
) -> Iterator[EmbeddedChunk]:
    """Read the shards one after the other.

    A row's key is its ``key``, ``uid`` or the stem of its ``image_path``, the first of these that every row of the file
    has and no two share; else the number of the row.

    Args:
        shards: as :func:`find_embeddings` gives them.
        width: d; None: that of the first pair.
        chunk_size: rows in a chunk, at most.

    Raises:
        UsageError: a file is missing, broken or not in one of the layouts, or its embeddings are of another width.
    """
    for shard in shards:
        for chunk in _read_shard(shard, chunk_size):
            if len(chunk.ids):
                width = width or chunk.image.shape[1]
                if chunk.image.shape[1] != width:
                    raise UsageError(
                        f"{shard.path}: embeddings of width {chunk.image.shape[1]}, all others have {width}; "
                        "score the embeddings of one model at a time"
                    )
            yield chunk


def index_embeddings(shards: Sequence[Shard], *, progress: Progress = SILENT) -> CorpusIndex:
    """An index of embedded pairs, as :func:`noisyclean.corpus.index.index_corpus` makes one of tars.

    The hash of a picture is that of its embedding.

    Raises:
        UsageError: as :func:`read_embeddings`.
    """
    pairs: list[int] = []
    usable = []
    hashes = []
    ends = [0]
    with progress.task("reading the embeddings", len(shards), "shards") as task:
        for chunk in read_embeddings(shards):
            pairs.extend(pair_id(chunk.shard, key) for key in chunk.rows["key"].to_pylist())
            readable = chunk.rows["fault"].is_null().to_numpy()
            both = np.zeros((len(readable), 2), np.int64)
            both[readable, 0] = chunk.ids
            both[readable, 1] = [image_id(vector.tobytes()) for vector in chunk.image]
            usable.append(readable)
            hashes.append(both)
            if chunk.last:
                ends.append(len(pairs))
                task.advance()
    caption, image = np.concatenate(hashes).T.copy()
    return CorpusIndex(
        list(shards), np.array(ends), np.array(pairs, np.int64), caption, image, np.concatenate(usable).astype(np.bool_)
    )


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
            readable = chunk.rows["fault"].is_null().to_numpy()
            chosen = mask[first : first + len(readable)][readable]
            images.append(chunk.image[chosen])
            texts.append(chunk.text[chosen])
            first += len(readable)
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
        if isinstance(file, np.ndarray):
            raise UsageError(f"{path}: a single array; an npz file with two is needed")
        with file:
            found = _find_names(path, "arrays", file.files, names)
            image, text = file[found[0]], file[found[1]]
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not an npz file of embeddings ({error})") from error
    for name, array in zip(found, (image, text), strict=True):
        _require_vectors(f"{path}: {name}", array)
    if image.shape != text.shape:
        raise UsageError(
            f"{path}: {found[0]} is {list(image.shape)} but {found[1]} is {list(text.shape)}; row i of both is a pair"
        )
    return found, image, text


def _read_shard(shard: Shard, chunk_size: int) -> Iterator[EmbeddedChunk]:
    path = Path(shard.path)
    if path.suffix == ".parquet":
        count, batches = _open_parquet(path, chunk_size)
    else:
        image, text = _open_parts(shard) if path.suffix == ".npy" else read_npz(path)[1:]
        count, batches = len(image), _slices(image, text, chunk_size)
    described = _describe(embedding_files(shard)[-1], count)
    first = 0
    for image, text in batches:
        rows = described.slice(first, len(image))
        first += len(image)
        yield _chunk(shard.name, rows, image, text, last=first == count)
    if count == 0:
        yield _chunk(shard.name, described, np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32), last=True)


def _chunk(shard: str, rows: pa.Table, image: Vectors, text: Vectors, *, last: bool) -> EmbeddedChunk:
    image, image_fault = _unit_rows("image", image)
    text, text_fault = _unit_rows("text", text)
    fault = pc.coalesce(image_fault, text_fault)
    readable = fault.is_null().to_numpy(zero_copy_only=False)
    image, text = image[readable], text[readable]
    captions = rows["caption"].filter(fault.is_null()).to_pylist()
    ids = [
        caption_id(caption) if caption else image_id(vector.tobytes())
        for caption, vector in zip(captions, text, strict=True)
    ]
    return EmbeddedChunk(shard, rows.append_column("fault", fault), np.array(ids, np.int64), image, text, last)


def _unit_rows(side: str, vectors: Vectors) -> tuple[NDArray[np.float32], pa.Array]:
    """The rows brought to length 1, and what is wrong with those that cannot be."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rows = np.asarray(vectors, np.float32)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / length
    fault = np.full(len(rows), None, dtype=object)
    fault[length[:, 0] == 0] = f"{side} embedding is zero"
    fault[~np.isfinite(length[:, 0])] = f"{side} embedding is missing or not finite"
    return rows, pa.array(fault, pa.string())


def _slices(image: Vectors, text: Vectors, chunk_size: int) -> Iterator[tuple[Vectors, Vectors]]:
    for start in range(0, len(image), chunk_size):
        yield image[start : start + chunk_size], text[start : start + chunk_size]


def _open_parts(shard: Shard) -> tuple[Vectors, Vectors]:
    """The two mapped arrays of a part of a clip-retrieval folder."""
    sides = []
    for path in embedding_files(shard)[:2]:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file; images and texts of a part belong together") from None
        except (OSError, EOFError, ValueError) as error:
            raise UsageError(f"{path}: not an npy file of embeddings ({error})") from error
        if not isinstance(array, np.ndarray):
            raise UsageError(f"{path}: several arrays; an npy file with one is needed")
        _require_vectors(str(path), array)
        sides.append(array)
    image, text = sides
    if image.shape != text.shape:
        raise UsageError(
            f"{shard.path}: {list(image.shape)} but {embedding_files(shard)[1]} is {list(text.shape)}; "
            "row i of both is a pair"
        )
    return image, text


def _open_parquet(path: Path, chunk_size: int) -> tuple[int, Iterator[tuple[Vectors, Vectors]]]:
    """The number of rows, and the two columns of vectors in batches."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{path}: not a Parquet file ({error})") from error
    present = [column.name for column in file.schema_arrow if _is_vectors(column.type)]
    names = _find_names(path, "columns of vectors", present, VECTOR_NAMES)

    def batches() -> Iterator[tuple[Vectors, Vectors]]:
        for batch in _record_batches(path, file, chunk_size, names):
            image, text = (_matrix(path, name, batch[name]) for name in names)
            both = batch[names[0]].is_valid().to_numpy(False) & batch[names[1]].is_valid().to_numpy(False)
            if both.any() and image.shape != text.shape:
                raise UsageError(
                    f"{path}: {names[0]} holds {image.shape[1]} values a row but {names[1]} {text.shape[1]}; "
                    "both are by one model"
                )
            yield image, text

    return file.metadata.num_rows, batches()


def _record_batches(
    path: Path, file: pq.ParquetFile, chunk_size: int, names: tuple[str, str]
) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(chunk_size, columns=list(names))
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{path}: a damaged Parquet file ({error}); fetch it again") from error


def _matrix(path: Path, name: str, column: pa.Array) -> Vectors:
    """A column of vectors as ``[N, d]``, with NaN where there is none."""
    vectors = column.drop_null()
    widths = pc.unique(pc.list_value_length(vectors)).to_pylist()
    if len(widths) > 1:
        raise UsageError(f"{path}: {name} holds vectors of {widths[0]} and of {widths[1]} values; one width is needed")
    width = widths[0] if widths else 1
    values = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), width)
    matrix: Vectors = np.full((len(column), width), np.nan, values.dtype)
    matrix[column.is_valid().to_numpy(zero_copy_only=False)] = values
    return matrix


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
        table = file.read(columns=sorted(set(sources.values())))
        found = {name: table[column] for name, column in sources.items()}
        described = {name: _counts(one) if name in _COUNTS else one.cast(pa.string()) for name, one in found.items()}
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"{path}: cannot read what describes the embeddings ({error})") from error
    if "image_path" in described:
        described["image_path"] = pc.replace_substring_regex(described["image_path"], r"^.*/|\.[^./]*$", "")
    return described


def _counts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    numbers = column.cast(pa.float64())
    sound = pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, 2**31))
    return pc.if_else(sound, numbers, pa.scalar(None, pa.float64())).cast(pa.int32(), safe=False)


def _find_names(path: Path, what: str, present: Sequence[str], names: Sequence[tuple[str, str]]) -> tuple[str, str]:
    for pair in names:
        if set(pair) <= set(present):
            return pair
    sought = " or ".join(f"{image} and {text}" for image, text in names)
    raise UsageError(f"{path}: needs the {what} {sought}, but has {', '.join(present) or 'none'}")


def _require_vectors(where: str, array: NDArray[Any]) -> None:
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise UsageError(f"{where} is {array.dtype} {list(array.shape)}; floats [pairs, width] are needed")


def _part_number(path: Path) -> str:
    return path.stem.removeprefix("img_emb_")


def _saved(directory: Path, shard: str) -> Path:
    return directory / f"{shard}.npz"


def _read_origin(path: Path) -> Origin | None:
    try:
        return read_record(pq.read_metadata(path).metadata, Origin)
    except (OSError, pa.ArrowInvalid, KeyError):
        return None
