"""Every mode of picture becomes RGB; whatever cannot says why, the same whichever way it is decoded."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import encode_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import noisyclean
from noisyclean.corpus.decoding import MAX_PIXELS, UndecodableError, decode_image, decode_reduced
from noisyclean.encoders import DualEncoder
from noisyclean.errors import UsageError


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("LA", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "BMP"),
        ("RGB", "WEBP"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "JPEG"),
        ("I;16", "PNG"),
    ],
)
def test_every_mode_becomes_rgb(mode: str, image_format: str) -> None:
    decoded = decode_image(encode(Image.new(mode, (7, 5)), image_format))
    assert (decoded.mode, decoded.size) == ("RGB", (7, 5))


def test_colours_are_kept() -> None:
    assert decode_image(encode(Image.new("RGB", (2, 2), (10, 200, 30)))).getpixel((0, 0)) == (10, 200, 30)
    assert decode_image(encode(Image.new("RGB", (2, 2), "red").quantize(4))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str) -> None:
    assert decode_image(encode(Image.new(mode, (2, 2)))).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_lies_on_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0])
    assert decode_image(encode(image, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_keeps_its_brightness() -> None:
    grey = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert decode_image(encode(grey)).getpixel((0, 0)) == (128, 128, 128)
    assert decode_image(encode(grey, transparency=0)).getpixel((0, 0)) == (128, 128, 128)
    assert decode_image(encode(grey, "TIFF")).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_truncated(image_format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), image_format)
    with pytest.raises(UndecodableError, match=f"(truncated|broken) ({image_format}|picture)"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_no_picture(data: bytes) -> None:
    with pytest.raises(UndecodableError):
        decode_image(data)


@pytest.mark.parametrize("side", [10_001, 50_000])
def test_bomb_is_refused_by_its_header(side: int) -> None:
    assert side * side > MAX_PIXELS
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(UndecodableError, match=r"pixels|too large"):
        decode_image(data)


def test_warnings_stay_off_the_terminal() -> None:
    image = Image.new("P", (2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(encode(image, transparency=b"\x00\x80"))  # Pillow warns of such palettes


@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_broken_bytes_raise_nothing_else(image_format: str, data: st.DataObject) -> None:
    image = bytearray(encode_image(123456, (16, 16), image_format))
    for at in data.draw(st.lists(st.integers(0, len(image) - 1), max_size=4)):
        image[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UndecodableError):
        assert decode_image(bytes(image)).mode == "RGB"


def test_a_picture_of_extreme_shape_is_refused() -> None:
    """Its short side would be resized to the model's input, and the long one with it."""
    with pytest.raises(UndecodableError, match="1 × 30,000 pixels"):
        decode_image(encode_image(0, (1, 30_000)))


WHOLE = (10_000, 10_000)
"""Asked for at least so much, no picture of these tests is reduced."""


def photo(mode: str = "RGB", size: tuple[int, int] = (120, 90)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def outcome_of_both(data: bytes) -> str | None:
    """Why the picture is refused, if it is, by both ways of decoding; if not, their pixels are the same."""
    try:
        expected = decode_image(data)
    except UndecodableError as error:
        for least in (WHOLE, (8, 8)):
            with pytest.raises(UndecodableError, match=f"^{re.escape(str(error))}$"):
                decode_reduced(data, least)
        return str(error)
    pixels, size = decode_reduced(data, WHOLE)
    assert size == expected.size
    assert np.array_equal(pixels, np.asarray(expected))
    return None


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_blocks": 2},
        {"keep_rgb": True},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},  # lies on its side
        {"icc_profile": b"no profile"},
    ],
)
def test_every_kind_of_jpeg_is_the_same_either_way(mode: str, options: dict[str, Any]) -> None:
    data = encode(photo(mode), "JPEG", **options)
    assert outcome_of_both(data) is None
    outcome_of_both(data[:-2])  # without its end mark
    assert outcome_of_both(data + b"more") is None
    assert outcome_of_both(data[: len(data) * 2 // 3]) == "truncated JPEG"
    assert outcome_of_both(data[:100]) in ("not a picture", "truncated picture", "broken picture", "truncated JPEG")


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "MPO"])
def test_other_formats_are_the_same_either_way(image_format: str) -> None:
    data = encode(photo(), image_format)
    assert outcome_of_both(data) is None
    assert outcome_of_both(data[: len(data) // 2]) is not None


def test_a_jpeg_bomb_is_refused_by_its_header() -> None:
    data = encode(photo(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    sides = {(12_000, 9_000): "JPEG of 108,000,000 pixels", (65_000, 65_000): "picture too large"}
    for (width, height), reason in sides.items():
        assert outcome_of_both(data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]) == reason
    assert outcome_of_both(data[:at] + struct.pack(">HH", 90, 9_001) + data[at + 4 :]) == "JPEG of 9,001 × 90 pixels"


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        ((224, 224), (240, 320)),
        ((240, 320), (240, 320)),
        ((240, 321), (480, 640)),  # 5/8 would do, but takes longer than the whole
        ((224, 300), (240, 320)),
        ((64, 64), (120, 160)),
        ((60, 60), (60, 80)),
        ((1, 1), (60, 80)),
        ((500, 500), (480, 640)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_jpeg_is_decoded_no_larger_than_needed(
    mode: str, least: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = encode(photo(mode, (640, 480)), "JPEG", quality=95)
    pixels, size = decode_reduced(data, least)
    assert size == (640, 480)
    assert pixels.shape == (*expected, 3)
    smaller = decode_image(data).resize(expected[::-1], Image.Resampling.BOX)
    assert np.abs(pixels.astype(int) - np.asarray(smaller)).mean() < 1


@given(st.data())
def test_broken_jpegs_are_the_same_either_way(data: st.DataObject) -> None:
    image = bytearray(encode(photo(), "JPEG", progressive=data.draw(st.booleans())))
    for at in data.draw(st.lists(st.integers(0, len(image) - 1), max_size=4)):
        image[at] = data.draw(st.integers(0, 255))
    outcome_of_both(bytes(image[: data.draw(st.integers(1, len(image)))]))


def test_scores_of_one_folder_are_of_one_way_of_decoding(
    faulty_corpus: Path, encoder: DualEncoder, tmp_path: Path
) -> None:
    encoder.save(tmp_path / "model")
    out = {}
    for decode, other in (("fast", "exact"), ("exact", "gpu"), ("gpu", "fast")):
        how: dict[str, Any] = {"model": tmp_path / "model", "out": tmp_path / decode, "workers": 0}
        out[decode] = noisyclean.score(str(faulty_corpus), decode=decode, **how).pairs
        with pytest.raises(UsageError, match=f"{decode}: scored with --decode {decode}; give that again"):
            noisyclean.score(str(faulty_corpus), decode=other, **how)
    assert out["fast"] == out["exact"] == out["gpu"]
    with pytest.raises(UsageError, match="leave out --decode"):
        noisyclean.score(embeddings=tmp_path, decode="fast", out=tmp_path / "embedded")
