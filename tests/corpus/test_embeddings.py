"""Every layout gives the same pairs, every row comes out once, and odd files are refused in words."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from noisyclean.corpus.chunk import ROWS, Chunk
from noisyclean.corpus.embeddings import (
    Origin,
    common_origin,
    find_embeddings,
    index_embeddings,
    read_embeddings,
    save_embeddings,
    saved_origin,
    take_embeddings,
)
from noisyclean.corpus.identity import caption_id, image_id, pair_id
from noisyclean.corpus.locate import Shard
from noisyclean.errors import UsageError

WIDTH = 8


def make_vectors(rows: int, seed: int = 0) -> NDArray[np.float16]:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float16)


IMAGE, TEXT = make_vectors(23, 0), make_vectors(23, 1)
CAPTIONS = [f"caption {i}" if i != 4 else None for i in range(23)]


def write_metadata(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=10)
    return path


def described() -> dict[str, Any]:
    return {
        "uid": [f"{i:032x}" for i in range(23)],
        "url": [f"http://nowhere/{i}.jpg" for i in range(23)],
        "text": CAPTIONS,
        "original_width": [640.0, None, float("nan"), -1.0, *range(100, 119)],
        "original_height": [480] * 23,
    }


def write_npz(folder: Path, names: tuple[str, str] = ("img", "txt"), metadata: bool = True, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "part.npz", **{names[0]: IMAGE, names[1]: TEXT, **more})
    if metadata:
        write_metadata(folder / "part.parquet", **described())
    return folder / "part.npz"


def write_datacomp(folder: Path) -> Path:
    return write_npz(folder, ("l14_img", "l14_txt"), b32_img=TEXT[:, :4], b32_txt=IMAGE[:, :4])


def write_clip_retrieval(folder: Path) -> Path:
    for side, vectors in (("img", IMAGE), ("text", TEXT)):
        (folder / f"{side}_emb").mkdir(parents=True)
        np.save(folder / f"{side}_emb" / f"{side}_emb_0.npy", vectors)
    columns = described()
    columns["caption"] = columns.pop("text")
    write_metadata(folder / "metadata" / "metadata_0.parquet", **columns)
    return folder


def write_lists(kind: Callable[[pa.DataType], pa.DataType], value: pa.DataType) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        vectors = {
            name: pa.array([row.tolist() for row in side.astype(np.float32)], kind(pa.float32())).cast(kind(value))
            if value != pa.float16()
            else pa.array([list(row) for row in side], kind(value))
            for name, side in (("image_embedding", IMAGE), ("text_embedding", TEXT))
        }
        return write_metadata(folder / "part.parquet", **vectors, **described())

    return write


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "npz": write_npz,
    "datacomp": write_datacomp,
    "clip-retrieval": write_clip_retrieval,
    "lists": write_lists(pa.list_, pa.float32()),
    "large lists": write_lists(pa.large_list, pa.float64()),
    "fixed lists": write_lists(lambda value: pa.list_(value, WIDTH), pa.float32()),
    "halffloat": write_lists(pa.list_, pa.float16()),
    "fixed halffloat": write_lists(lambda value: pa.list_(value, WIDTH), pa.float16()),
}


def read(path: Path, **options: Any) -> list[Chunk]:
    return list(read_embeddings(find_embeddings(path), **options))


def unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    rows = vectors.astype(np.float64)
    found: NDArray[np.float64] = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return found


@pytest.mark.parametrize("chunk_size", [5, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pairs(tmp_path: Path, layout: str, chunk_size: int) -> None:
    chunks = read(LAYOUTS[layout](tmp_path / "corpus"), chunk_size=chunk_size)
    assert {chunk.shard for chunk in chunks} == {"0" if layout == "clip-retrieval" else "part"}
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert max(chunk.rows.num_rows for chunk in chunks) <= chunk_size
    assert all(chunk.rows.schema.names == ROWS.names for chunk in chunks)
    image, text = (np.concatenate([getattr(chunk, side) for chunk in chunks]) for side in ("image", "text"))
    assert image.dtype == text.dtype == np.float32
    np.testing.assert_allclose(image, unit(IMAGE), atol=1e-6)
    np.testing.assert_allclose(text, unit(TEXT), atol=1e-6)
    rows = pa.concat_tables([chunk.rows for chunk in chunks])
    assert rows["key"].to_pylist() == rows["uid"].to_pylist() == described()["uid"]
    assert rows["index"].to_pylist() == list(range(23))
    assert rows["url"].to_pylist() == described()["url"]
    assert rows["caption"].to_pylist() == CAPTIONS
    assert rows["width"].to_pylist() == [640, None, None, None, *range(100, 119)]
    assert rows["height"].to_pylist() == [480] * 23
    assert rows["fault"].null_count == 23
    ids = np.concatenate([chunk.caption_ids for chunk in chunks])
    assert ids.tolist() == [
        caption_id(caption) if caption else image_id(text[i].tobytes()) for i, caption in enumerate(CAPTIONS)
    ]
    assert np.concatenate([chunk.image_ids for chunk in chunks]).tolist() == [image_id(row.tobytes()) for row in image]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"key": list("cab"), "uid": list("xyz")}, ["c", "a", "b"]),
        ({"KEY": [7, 8, 9]}, ["7", "8", "9"]),
        ({"key": ["a", "a", "b"], "uid": list("xyz")}, ["x", "y", "z"]),
        ({"key": ["a", None, "b"], "image_path": ["d/1.jpg", "d/e.f/2.x.png", "3"]}, ["1", "2.x", "3"]),
        ({"image_path": ["a/1.jpg", "b/1.jpg", "2"]}, ["000000000", "000000001", "000000002"]),
        ({}, ["000000000", "000000001", "000000002"]),
    ],
)
def test_keys_are_those_that_tell_the_rows_apart(tmp_path: Path, columns: dict[str, Any], expected: list[str]) -> None:
    np.savez(tmp_path / "a.npz", img=IMAGE[:3], txt=TEXT[:3])
    if columns:
        write_metadata(tmp_path / "a.parquet", **columns)
    (chunk,) = read(tmp_path / "a.npz")
    assert chunk.rows["key"].to_pylist() == expected


def test_rows_that_are_no_embeddings_are_unreadable(tmp_path: Path) -> None:
    image, text = IMAGE.astype(np.float32), TEXT.astype(np.float32)
    image[0], text[1], image[2, 3], text[3, 0] = 0, 0, np.nan, np.inf
    image[4], text[4] = np.nan, 0
    np.savez(tmp_path / "a.npz", img=image, txt=text)
    (chunk,) = read(tmp_path / "a.npz")
    assert chunk.rows["fault"].to_pylist() == [
        "image embedding is zero",
        "text embedding is zero",
        "image embedding is missing or not finite",
        "text embedding is missing or not finite",
        "image embedding is missing or not finite",
        *[None] * 18,
    ]
    np.testing.assert_allclose(chunk.text, unit(TEXT[5:]), atol=1e-6)
    np.testing.assert_allclose(chunk.image, unit(IMAGE[5:]), atol=1e-6)


@pytest.mark.parametrize("value", [pa.float16(), pa.float32()])
def test_missing_vectors_are_unreadable(tmp_path: Path, value: pa.DataType) -> None:
    vectors = [list(row) for row in IMAGE[:6]]
    columns = {
        "image_emb": pa.array([None, None, *vectors[2:]], pa.list_(value)),
        "text_emb": pa.array([*vectors[:4], None, vectors[5]], pa.list_(value)),
    }
    chunks = read(write_metadata(tmp_path / "a.parquet", **columns), chunk_size=2)
    faults = pa.concat_tables([chunk.rows for chunk in chunks])["fault"].to_pylist()
    missing = "embedding is missing or not finite"
    assert faults == [f"image {missing}", f"image {missing}", None, None, f"text {missing}", None]
    np.testing.assert_allclose(
        np.concatenate([c.image for c in chunks if len(c.image)]), unit(IMAGE[[2, 3, 5]]), atol=1e-6
    )


def test_a_large_row_group_is_not_held(tmp_path: Path) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(np.random.default_rng(0).normal(size=40_000 * 64), 64)
    table = pa.table({"image": vectors, "text": vectors})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    size = table.nbytes
    del table, vectors
    (shard,) = find_embeddings(tmp_path)
    assert pq.read_metadata(shard.path).num_row_groups == 1
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_embeddings([shard])]
    assert len(held) > 5
    assert max(held) < size / 2


def test_an_empty_file_is_a_shard_of_no_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", img=IMAGE[:0], txt=TEXT[:0])
    write_npz(tmp_path / "b")
    chunks = read(tmp_path)
    assert [(chunk.shard, chunk.rows.num_rows, chunk.last) for chunk in chunks] == [
        ("a", 0, True),
        ("b/part", 23, True),
    ]


def test_files_are_found_by_folder_and_glob(tmp_path: Path) -> None:
    for name in ("x/0.npz", "y/0.npz", "y/z/1.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / name, img=IMAGE, txt=TEXT)
    write_metadata(tmp_path / "x" / "0.parquet", **described())

    def names(spec: Path) -> list[str]:
        return [shard.name for shard in find_embeddings(spec)]

    assert names(tmp_path) == ["x/0", "y/0", "y/z/1"]
    assert names(tmp_path / "y") == ["0", "z/1"]
    assert names(tmp_path / "*" / "0*") == ["x/0", "y/0"]
    assert names(tmp_path / "x" / "0.npz") == ["0"]
    for spec in (tmp_path / "none", tmp_path / "*.npy", tmp_path / "x" / "0.npy"):
        with pytest.raises(UsageError, match="no embeddings there; give an "):
            find_embeddings(spec)


def test_several_parts_of_clip_retrieval(tmp_path: Path) -> None:
    root = write_clip_retrieval(tmp_path / "corpus")
    for side in ("img", "text"):
        np.save(root / f"{side}_emb" / f"{side}_emb_1.npy", make_vectors(4, 5))
    chunks = read(root)
    assert [(chunk.shard, chunk.rows.num_rows) for chunk in chunks] == [("0", 23), ("1", 4)]
    assert chunks[1].rows["key"].to_pylist() == [f"{i:09d}" for i in range(4)]  # of this part nothing else is known


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_odd_arrays_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def refuse(**arrays: Any) -> str:
        np.savez(path, **arrays)
        message = refusal(path)
        assert str(path) in message
        return message

    assert "needs the arrays img and txt or" in refuse(img=IMAGE, words=TEXT)
    assert "txt is float16 [23]; floats [pairs, width] are needed" in refuse(img=IMAGE, txt=TEXT[:, 0])
    assert "img is [23, 8] but txt is [22, 8]" in refuse(img=IMAGE, txt=TEXT[:-1])
    np.savez(path, img=IMAGE, txt=TEXT)
    path.write_bytes(path.read_bytes()[:300])
    assert "not an npz file" in refusal(path)


def test_odd_metadata_is_refused_in_words(tmp_path: Path) -> None:
    path = write_npz(tmp_path, metadata=False)
    beside = write_metadata(tmp_path / "part.parquet", uid=["a"] * 22)
    assert refusal(path) == f"{beside}: 22 rows for 23 embeddings; one row a pair is needed"
    beside.write_bytes(b"PAR1 and no more")
    assert f"{beside}: cannot read what describes the embeddings" in refusal(path)


def test_odd_parts_are_refused_in_words(tmp_path: Path) -> None:
    root = write_clip_retrieval(tmp_path / "corpus")
    text = root / "text_emb" / "text_emb_0.npy"
    np.save(text, TEXT[:-1])
    assert f"[23, 8] but {text} is [22, 8]" in refusal(root)
    np.save(text, np.array([object()] * 23), allow_pickle=True)
    assert f"{text} cannot be read" in refusal(root)
    buffer = io.BytesIO()
    np.savez(buffer, a=TEXT)
    text.write_bytes(buffer.getvalue())
    assert f"{text} is no array" in refusal(root)
    text.unlink()
    assert f"{text}: no such file" in refusal(root)
    (root / "img_emb" / "img_emb_0.npy").unlink()
    assert "no img_emb_*.npy in it" in refusal(root)


def test_odd_tables_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [row.tolist() for row in IMAGE]
    write_metadata(path, image_embedding=rows, text=CAPTIONS)
    assert "needs the columns of vectors image_embedding and text_embedding or" in refusal(path)
    write_metadata(path, image=rows, text=[row[:4] for row in rows])
    assert "image holds 8 values a row but text 4" in refusal(path)
    path.write_bytes(b"words")
    assert f"{path}: not a Parquet file" in refusal(path)


def test_files_of_different_widths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", img=IMAGE, txt=TEXT)
    np.savez(tmp_path / "b.npz", img=IMAGE[:, :4], txt=TEXT[:, :4])
    assert "b.npz: embeddings of width 4, all others have 8" in refusal(tmp_path)
    with pytest.raises(UsageError, match=r"a\.npz: embeddings of width 8, all others have 4"):
        read(tmp_path / "a.npz", width=4)


def test_the_index_knows_pairs_by_what_they_hold(tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[6], image[9] = image[5], 0
    np.savez(tmp_path / "a.npz", img=image, txt=TEXT)
    np.savez(tmp_path / "b.npz", img=IMAGE[:0], txt=TEXT[:0])
    write_metadata(tmp_path / "a.parquet", caption=[*CAPTIONS[:-1], "Caption  0"])
    index = index_embeddings(find_embeddings(tmp_path))
    assert [shard.name for shard in index.shards] == ["a", "b"]
    assert index.offsets.tolist() == [0, 23, 23]
    assert index.usable.tolist() == [i != 9 for i in range(23)]
    assert index.pair[7] == pair_id("a", "000000007")
    assert index.image[5] == index.image[6]
    assert len(set(index.image)) == 22
    assert index.caption[0] == index.caption[22] == caption_id("caption 0")
    rows, found, text = take_embeddings(index, np.array([20, 3, 11]))
    assert rows.tolist() == [3, 11, 20]
    np.testing.assert_allclose(found, unit(image[rows]), atol=1e-6)
    np.testing.assert_allclose(text, unit(TEXT[rows]), atol=1e-6)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    rows = pa.table({"key": list("abc"), "shard": ["s/0.5"] * 3, "index": [0, 2, 3], "caption": ["x", None, "z"]})
    origin = Origin("encoder", "0.05", "12:34")
    save_embeddings(tmp_path, "s/0.5", rows, IMAGE[:3], TEXT[:3], origin)
    assert saved_origin(tmp_path, "s/0.5") == origin
    assert saved_origin(tmp_path, "other") is None
    shards = find_embeddings(tmp_path)
    assert [shard.name for shard in shards] == ["0.5"]
    (chunk,) = read_embeddings(shards)
    assert chunk.rows["key"].to_pylist() == list("abc")
    assert chunk.rows["caption"].to_pylist() == ["x", None, "z"]
    np.testing.assert_allclose(chunk.image, unit(IMAGE[:3]), atol=1e-6)
    assert common_origin(shards) == origin
    save_embeddings(tmp_path, "s/1", rows, IMAGE[:3], TEXT[:3], Origin("another", "0.05", ""))
    with pytest.raises(UsageError, match="by another model"):
        common_origin(find_embeddings(tmp_path))


def test_half_a_save_is_none_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    rows = pa.table({"key": list("abc")})
    save_embeddings(tmp_path, "0", rows, IMAGE[:3], TEXT[:3], Origin("encoder", "0.05", ""))
    (tmp_path / "0.npz").unlink()
    assert saved_origin(tmp_path, "0") is None
    sidecar = write_metadata(tmp_path / "1.parquet", uid=["a"])
    with pytest.raises(UsageError, match=f"{sidecar}: in the way"):
        saved_origin(tmp_path, "1")
    np.savez(tmp_path / "2.npz", img=IMAGE)
    with pytest.raises(UsageError, match=r"2\.npz: in the way"):
        saved_origin(tmp_path, "2")
    assert common_origin([Shard("2", str(tmp_path / "2.npz"))]) is None
