"""Every mode of picture becomes RGB; whatever cannot says why."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from helpers import encode_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from noisyclean.corpus.decoding import MAX_PIXELS, UndecodableError, decode_image


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
