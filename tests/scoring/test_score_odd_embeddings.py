"""One odd row costs that row and no other; a file that cannot be read is refused in one line, which names it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import noisyclean as nc
from noisyclean.errors import NoisycleanError

PAIRS, WIDTH, ODD = 40, 16, 3
KEYS = [f"{i:05d}" for i in range(PAIRS)]
CAPTIONS = [f"caption {i}" for i in range(PAIRS)]


def make_pairs() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(7)
    image = random.normal(size=(PAIRS, WIDTH))
    text = image + 0.5 * random.normal(size=image.shape)
    return image.astype(np.float32), text.astype(np.float32)


IMAGE, TEXT = make_pairs()


def with_odd(values: list[Any], odd: Any, at: int = ODD) -> list[Any]:
    return [*values[:at], odd, *values[at + 1 :]]


def score(path: Path | str, out: Path) -> pd.DataFrame:
    nc.score(embeddings=path, out=out, temperature=0.1, device="cpu")
    parts = [pd.read_parquet(part) for part in sorted((out / "scores").rglob("*.parquet"))]
    return pd.concat(parts).set_index("key", drop=False)


def refusal(spec: Path | str, out: Path) -> str:
    with pytest.raises(NoisycleanError) as caught:
        score(spec, out)
    assert "\n" not in str(caught.value)
    assert not (out / "scores").exists()
    return str(caught.value)


def described(folder: Path, **columns: Any) -> Path:
    """An npz of all pairs, and a Parquet file that describes them."""
    np.savez(folder / "a.npz", img=IMAGE, txt=TEXT)
    pq.write_table(pa.table({"key": KEYS, **columns}), folder / "a.parquet")
    return folder / "a.npz"


def not_utf8(kind: pa.DataType) -> pa.Array:
    raw = pa.array(with_odd([one.encode() for one in CAPTIONS], b"\xff\xfe"), pa.binary())
    return raw.cast(kind, safe=False)


@pytest.mark.parametrize(
    ("name", "column", "odd", "others"),
    [
        ("width", with_odd(["640"] * PAIRS, "abc"), None, 640),
        ("width", with_odd(["640"] * PAIRS, " 480.0 "), 480, 640),
        ("width", with_odd([640.0] * PAIRS, float("nan")), None, 640),
        ("width", with_odd([640] * PAIRS, 2**62 + 1), None, 640),
        ("width", pa.array(with_odd([640] * PAIRS, 480), pa.decimal128(10, 2)), 480, 640),
        ("width", with_odd([True] * PAIRS, False), None, None),
        ("height", pa.array([0] * PAIRS, pa.timestamp("s")), None, None),
        ("caption", not_utf8(pa.binary()), None, CAPTIONS[0]),
        ("caption", not_utf8(pa.string()), None, CAPTIONS[0]),
        ("caption", not_utf8(pa.large_string()), None, CAPTIONS[0]),
        ("caption", not_utf8(pa.binary()).dictionary_encode(), None, CAPTIONS[0]),
        ("caption", [*range(PAIRS)], str(ODD), "0"),
        ("caption", with_odd([["a"]] * PAIRS, []), None, None),
        ("url", not_utf8(pa.string()), None, CAPTIONS[0]),
    ],
)
def test_what_cannot_be_understood_is_null(tmp_path: Path, name: str, column: Any, odd: object, others: object) -> None:
    found = score(described(tmp_path, **{name: column}), tmp_path / "out")
    assert found.index.tolist() == KEYS
    assert found["similarity"].notna().all()
    values = [None if pd.isna(value) else value for value in found[name]]
    assert (values[ODD], values[0]) == (odd, others)
    assert values.count(None) == (others is None) * (PAIRS - 1) + (odd is None)


def test_keys_that_are_not_utf8_give_way(tmp_path: Path) -> None:
    found = score(described(tmp_path, uid=not_utf8(pa.binary())).rename(tmp_path / "a.npz"), tmp_path / "out")
    assert found.index.tolist() == KEYS
    assert found["uid"].isna().sum() == 1
    pq.write_table(pa.table({"uid": not_utf8(pa.string())}), tmp_path / "a.parquet")
    found = score(tmp_path / "a.npz", tmp_path / "again")
    assert found.index.tolist() == [f"{i:09d}" for i in range(PAIRS)]


def table(path: Path, image: list[Any], text: list[Any], **columns: Any) -> Path:
    kind = pa.list_(pa.float32())
    vectors = {"image_embedding": pa.array(image, kind), "text_embedding": pa.array(text, kind)}
    pq.write_table(pa.table({"key": KEYS[: len(image)], **vectors, **columns}), path, row_group_size=7)
    return path


@pytest.mark.parametrize(("side", "at"), [("image", 0), ("text", PAIRS - 1)])
@pytest.mark.parametrize(
    ("vector", "fault"),
    [
        ([], f"embedding has 0 values, not {WIDTH}"),
        ([1.0] * 4, f"embedding has 4 values, not {WIDTH}"),
        ([1.0] * 17, f"embedding has 17 values, not {WIDTH}"),
        (None, "embedding is missing or not finite"),
        ([None, *[1.0] * 15], "embedding is missing or not finite"),
    ],
)
def test_an_odd_vector_is_unreadable_and_the_others_are_scored(
    tmp_path: Path, side: str, at: int, vector: Any, fault: str
) -> None:
    sides = {"image": IMAGE.tolist(), "text": TEXT.tolist()}
    sides[side] = with_odd(sides[side], vector, at)
    found = score(table(tmp_path / "a.parquet", **sides), tmp_path / "out")
    assert found.index.tolist() == KEYS
    assert found["fault"].dropna().to_dict() == {KEYS[at]: f"{side} {fault}"}
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (IMAGE, TEXT)]
    expected = np.delete((unit[0] * unit[1]).sum(axis=1), at)
    np.testing.assert_allclose(found["similarity"].dropna(), expected, atol=1e-5)


@pytest.mark.parametrize(("none", "missing"), [(None, 5000), ([], 4070)])  # 4096 rows are read at once
def test_a_file_may_begin_with_rows_that_have_no_vectors(tmp_path: Path, none: Any, missing: int) -> None:
    kind = pa.list_(pa.float32())
    columns = {
        f"{name}_embedding": pa.array([none] * missing + side.tolist(), kind)
        for name, side in (("image", IMAGE), ("text", TEXT))
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = score(tmp_path / "a.parquet", tmp_path / "out")
    assert found["fault"].isna().tolist() == [False] * missing + [True] * PAIRS


def test_files_and_sides_of_another_width_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", IMAGE.tolist(), TEXT.tolist())
    table(tmp_path / "b.parquet", IMAGE[:, :4].tolist(), TEXT[:, :4].tolist())
    assert "; score the embeddings of one model at a time" in refusal(tmp_path, tmp_path / "out")
    (tmp_path / "b.parquet").unlink()
    table(tmp_path / "a.parquet", IMAGE.tolist(), TEXT[:, :4].tolist())
    message = "a.parquet: image_embedding holds 16 values a row but text_embedding 4"
    assert message in refusal(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("scale", "kind"),
    [
        (1e-30, np.float32),
        (1e30, np.float32),
        (2.0**-126, np.float32),
        (2.0**-17, np.float16),
        (1e-300, np.float64),
        (1e300, np.float64),
    ],
)
def test_the_length_of_a_vector_does_not_matter(tmp_path: Path, scale: float, kind: type[np.floating[Any]]) -> None:
    """The direction is all that counts, as far as the type still holds it."""
    image, text = IMAGE.astype(np.float64), TEXT.astype(np.float64)
    image[ODD] *= scale
    text[ODD + 1] *= scale
    image, text = image.astype(kind), text.astype(kind)
    np.savez(tmp_path / "a.npz", img=image, txt=text)
    found = score(tmp_path / "a.npz", tmp_path / "out")
    assert found["fault"].isna().all()
    exact = [side.astype(np.float64) / np.abs(side).max(axis=1, keepdims=True) for side in (image, text)]
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in exact]
    np.testing.assert_allclose(found["similarity"], (unit[0] * unit[1]).sum(axis=1), atol=1e-6)


@pytest.mark.parametrize("spec", ["**x/*.npz", "a/**b", "***", "~nobody-of-this-name/x", "x" * 5000, "a\0b", "["])
def test_specs_that_cannot_be_looked_for_are_refused(tmp_path: Path, spec: str) -> None:
    message = refusal(spec, tmp_path / "out")
    assert spec in message
    assert "give an .npz or .parquet file" in message


def saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def huge() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**13, 512)})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (b"words", "is no array"),
        (b"", "is no array"),
        (saved(TEXT)[:500], "cannot be read (EOF"),
        (saved(TEXT)[:20], "cannot be read (EOF"),
        (saved(TEXT)[:10] + b"\xff" * 118 + saved(TEXT)[128:], "cannot be read ("),
        (saved(TEXT).replace(b"}", b" ", 1), "cannot be read ("),
        (huge(), "cannot be read (Unable to allocate"),
        (saved(np.array([None] * PAIRS)), "cannot be read (Object arrays"),
        (saved(np.full(TEXT.shape, "a")), "is <U1 [40, 16]"),
        (saved(TEXT.astype(int)), "is int64 [40, 16]"),
        (saved(TEXT + 1j), "is complex64 [40, 16]"),
        (saved(TEXT[0]), "is float32 [16]"),
    ],
)
def test_arrays_that_are_none_of_vectors_are_refused(tmp_path: Path, member: bytes, said: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("img.npy", saved(IMAGE))
        file.writestr("txt.npy", member)
    message = refusal(tmp_path / "a.npz", tmp_path / "out")
    assert f"{tmp_path / 'a.npz'}: txt {said}" in message
    assert message.endswith("floats [pairs, width] are needed")


def break_zip(path: Path, at: int, value: int) -> None:
    """Change a byte of the headers of the first member: of the one before it, and of the one in the directory."""
    raw = bytearray(path.read_bytes())
    raw[at] = raw[raw.index(b"PK\x01\x02") + at + 2] = value
    path.write_bytes(raw)


@pytest.mark.parametrize(("at", "value", "said"), [(6, 1, "is encrypted"), (8, 99, "compression method")])
def test_members_that_cannot_be_unpacked_are_refused(tmp_path: Path, at: int, value: int, said: str) -> None:
    np.savez(tmp_path / "a.npz", img=IMAGE, txt=TEXT)
    break_zip(tmp_path / "a.npz", at, value)
    message = refusal(tmp_path / "a.npz", tmp_path / "out")
    assert f"{tmp_path / 'a.npz'}: img cannot be read (" in message
    assert said in message


@pytest.mark.parametrize(
    ("at", "said"), [(0, "invalid block type"), (100, "Bad CRC-32")], ids=["deflate stream", "checksum"]
)
def test_damage_within_a_member_is_told(tmp_path: Path, at: int, said: str) -> None:
    save = np.savez_compressed if at == 0 else np.savez
    save(tmp_path / "a.npz", img=IMAGE, txt=TEXT)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    data = 30 + int.from_bytes(raw[26:28], "little") + int.from_bytes(raw[28:30], "little")
    raw[data + at] = 0xFF
    (tmp_path / "a.npz").write_bytes(raw)
    message = refusal(tmp_path / "a.npz", tmp_path / "out")
    assert f"{tmp_path / 'a.npz'}: img cannot be read (" in message
    assert said in message


@pytest.mark.parametrize(
    ("column", "said"), [(0, "cannot read what describes the embeddings ("), (1, "a damaged Parquet file (")]
)
def test_damaged_pages_are_told(tmp_path: Path, column: int, said: str) -> None:
    path = table(tmp_path / "a.parquet", IMAGE.tolist(), TEXT.tolist())
    chunk = pq.read_metadata(path).row_group(0).column(column)
    raw = bytearray(path.read_bytes())
    raw[chunk.dictionary_page_offset : chunk.dictionary_page_offset + 8] = b"\xff" * 8
    path.write_bytes(raw)
    assert f"{path}: {said}" in refusal(path, tmp_path / "out")


def repeat_vectors(path: Path) -> None:
    vectors = pa.array(IMAGE.tolist(), pa.list_(pa.float32()))
    names = ["image_embedding", "image_embedding", "text_embedding"]
    pq.write_table(pa.Table.from_arrays([vectors] * 3, names), path)


def no_rows(path: Path) -> None:
    table(path, [], [])


def no_columns(path: Path) -> None:
    pq.write_table(pa.table({}), path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (repeat_vectors, "a.parquet: 2 columns named image_embedding"),
        (no_rows, "a.parquet: not a single pair of embeddings can be used"),
        (no_columns, "a.parquet: needs the columns of vectors image_embedding and text_embedding or"),
    ],
)
def test_tables_without_two_columns_of_vectors_are_refused(
    tmp_path: Path, write: Callable[[Path], None], said: str
) -> None:
    write(tmp_path / "a.parquet")
    assert said in refusal(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("columns", "names", "said"),
    [
        ([KEYS, CAPTIONS, CAPTIONS], ["key", "caption", "caption"], "2 columns named caption"),
        ([KEYS[:-1]], ["key"], "39 rows for 40 embeddings"),
        ([[*KEYS, "x"]], ["key"], "41 rows for 40 embeddings"),
        ([], [], "0 rows for 40 embeddings"),
    ],
)
def test_descriptions_of_other_rows_are_refused(
    tmp_path: Path, columns: list[list[str]], names: list[str], said: str
) -> None:
    described(tmp_path)
    pq.write_table(pa.Table.from_arrays([pa.array(one) for one in columns], names), tmp_path / "a.parquet")
    assert f"{tmp_path / 'a.parquet'}: {said}" in refusal(tmp_path, tmp_path / "out")


def test_a_column_repeated_that_nobody_asks_for_is_left_alone(tmp_path: Path) -> None:
    described(tmp_path)
    columns = pa.Table.from_arrays([pa.array(one) for one in (KEYS, CAPTIONS, CAPTIONS)], ["key", "note", "note"])
    pq.write_table(columns, tmp_path / "a.parquet")
    assert score(tmp_path, tmp_path / "out").index.tolist() == KEYS


def test_files_of_no_rows_are_nothing_to_score(tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz", img=IMAGE[:0], txt=TEXT[:0])
    assert "not a single pair of embeddings can be used" in refusal(tmp_path, tmp_path / "refused")
    described(tmp_path)
    found = score(tmp_path, tmp_path / "out")
    assert found.index.tolist() == KEYS
    assert sorted(path.name for path in (tmp_path / "out" / "scores").iterdir()) == ["a.parquet", "empty.parquet"]
