"""From the bytes of a picture to RGB pixels, with a reason where that fails."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MAX_PIXELS = 100_000_000
"""A picture that claims more is refused before its pixels are decoded (decompression bombs)."""

MAX_ASPECT = 100
"""Nor may one side be longer than so many times the other: it is the short one that is resized to the model's input."""


class UndecodableError(Exception):
    """The bytes are no picture that can be used; the message is the row's reason."""


def decode_image(data: bytes) -> Picture:
    """Decode to an RGB picture; a transparent one is laid on white, where most icons and logos are meant to lie.

    Raises:
        UndecodableError: not a picture, truncated, or of more than ``MAX_PIXELS``.
    """
    from PIL import Image, UnidentifiedImageError

    kind = "picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a picture is said in its row, not on the terminal
            image: Image.Image = Image.open(io.BytesIO(data))
            kind = image.format or kind
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise UndecodableError(f"{kind} of {pixels:,} pixels")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UndecodableError(f"{kind} of {image.width:,} × {image.height:,} pixels")
            image.load()
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            if "transparency" in image.info or "A" in image.getbands() or "a" in image.getbands():
                rgba = image.convert("RGBA")
                image = Image.new("RGBA", rgba.size, "white")
                image.alpha_composite(rgba)
            return image.convert("RGB")
    except UndecodableError:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableError("not a picture") from error
    except Image.DecompressionBombError as error:
        raise UndecodableError("picture too large") from error
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, KeyError … on hostile files
        truncated = "truncat" in str(error).lower()
        raise UndecodableError(f"truncated {kind}" if truncated else f"broken {kind}") from error
