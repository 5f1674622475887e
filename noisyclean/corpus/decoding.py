"""From the bytes of a picture to RGB pixels, with a reason where that fails."""

from __future__ import annotations

import io
import os
import pickle
import signal
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image as Picture

T = TypeVar("T")

Decode: TypeAlias = Literal["fast", "exact", "gpu"]
"""How pictures become model input: nearly as open_clip does it, at several times the speed; to the pixel; or as fast
does it, but for JPEGs, which are decoded where the model is."""

MAX_PIXELS = 64_000_000
"""A picture that claims more is refused before its pixels are decoded (decompression bombs)."""

MAX_ASPECT = 100
"""Nor may one side be longer than so many times the other: it is the short one that is resized to the model's input."""

DECODING_SECONDS = 60
"""A picture that takes longer hangs."""

_STRIP = 64
"""Rows of pixels that are copied at a time."""


_END = b"\xff\xd9"
"""The last marker of a JPEG."""
_MOST_ENCODED = 2**19
"""Bytes of a JPEG that may be handed on undecoded: some hundred of them wait in each process."""


class UndecodableError(Exception):
    """The bytes are no picture that can be used; the message is the row's reason."""


class Encoded(NamedTuple):
    """A JPEG that is still to be decoded: its bytes, (n,) uint8, and the (width, height) that its header tells."""

    data: NDArray[np.uint8]
    size: tuple[int, int]


def decode_image(data: bytes) -> Picture:
    """Decode to an RGB picture; a transparent one is laid on white, where most icons and logos are meant to lie.

    Raises:
        UndecodableError: not a picture, truncated, or of more than ``MAX_PIXELS``.
    """
    return _load(_open(data))


def decode_reduced(data: bytes, least: tuple[int, int]) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Decode as :func:`decode_image` does, but a large JPEG no larger than needed.

    libjpeg can decode at eighths of the size, and is the faster for it from a half downwards: the smallest such scale
    is taken at which neither side is shorter than asked for.

    Args:
        least: (height, width) in pixels.

    Returns:
        The pixels, (H, W, 3) uint8, and the (width, height) of the whole picture.

    Raises:
        UndecodableError: as by :func:`decode_image`, in the same words.
    """
    import numpy as np
    import simplejpeg

    image = _open(data)
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        height, width = least
        # Whatever it finds fault with is left to Pillow, which forgives some of it, and has words for the rest.
        with suppress(ValueError):
            return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2), image.size
    picture = _load(image)
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for top in range(0, picture.height, _STRIP):  # NumPy takes a picture by way of two copies more
        strip = slice(top, min(top + _STRIP, picture.height))
        pixels[strip] = np.asarray(picture.crop((0, strip.start, picture.width, strip.stop)))
    return pixels, picture.size


def whole_jpeg(data: bytes) -> Encoded | None:
    """The JPEG, if any decoder may be trusted with it; None: it is none, or better left to :func:`decode_reduced`.

    nvJPEG does not say that a picture is cut off, and may take colours for YCbCr that are not. What is damaged amid
    the picture, which libjpeg forgives or has words for, nobody can see without decoding: that comes out somehow.

    Raises:
        UndecodableError: the header is that of nothing that :func:`decode_image` would decode, in the same words.
    """
    import numpy as np

    image = _open(data)
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or len(data) > _MOST_ENCODED:
        return None
    if not data.rstrip(b"\0").endswith(_END):
        return None
    components = bytes(number for number, *_ in image.layer)  # type: ignore[attr-defined]
    if components == b"RGB" or image.info.get("adobe_transform") == 0:
        return None
    # Of memory that may be written to, which torch insists on.
    return Encoded(np.frombuffer(bytearray(data), np.uint8), image.size)


def decode_apart(decode: Callable[[bytes], T], data: bytes) -> T:
    """``decode(data)``, in a process of its own, which may die of it or hang.

    Raises:
        UndecodableError: by ``decode``, or the process has ended, twice.
    """
    if not hasattr(os, "fork"):
        return decode(data)
    for _ in range(2):  # the system may have killed it for want of memory, once
        # A file, not a pipe: of that a process forked meanwhile by another thread would hold the other end open.
        with tempfile.TemporaryFile() as answered:
            if not (child := os.fork()):
                try:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command
                    signal.alarm(DECODING_SECONDS)  # which ends it
                    try:
                        answer: T | UndecodableError = decode(data)
                    except UndecodableError as error:
                        answer = error
                    pickle.dump(answer, answered)
                    answered.flush()
                    os._exit(0)
                finally:
                    os._exit(1)
            if os.waitpid(child, 0)[1] == 0:
                answered.seek(0)
                answer = pickle.load(answered)
                if isinstance(answer, UndecodableError):
                    raise answer
                return answer
    raise UndecodableError("crashes the decoder")


def _open(data: bytes) -> Picture:
    """Read the header, and refuse by it what shall not be decoded."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a picture is said in its row, not on the terminal
            image = Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, KeyError … on hostile files
        raise _fault("picture", error) from error
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableError(f"{image.format} of {image.width * image.height:,} pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UndecodableError(f"{image.format} of {image.width:,} × {image.height:,} pixels")
    return image


def _load(image: Picture) -> Picture:
    """Decode what was opened.

    Pillow takes up to four bytes a pixel, and of the largest pictures no more than two such are to be held at a time:
    each is closed as soon as the next is made of it.
    """
    from PIL import Image

    kind = image.format or "picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
                if image.mode not in ("I", "I;16"):
                    image = _instead_of(image, image.convert("I"))
                image = _instead_of(image, image.point(lambda value: value / 256))
                image = _instead_of(image, image.convert("L"))
            if image.mode != "RGBA" and ("transparency" in image.info or {"A", "a"} & {*image.getbands()}):
                image = _instead_of(image, image.convert("RGBA"))
            if image.mode == "RGBA":
                flat = Image.new("RGB", image.size, "white")
                flat.paste(image, mask=image)
                return _instead_of(image, flat)
            return image if image.mode == "RGB" else _instead_of(image, image.convert("RGB"))
    except Exception as error:
        raise _fault(kind, error) from error


def _instead_of(image: Picture, new: Picture) -> Picture:
    image.close()
    return new


def _fault(kind: str, error: Exception) -> UndecodableError:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return UndecodableError("not a picture")
    if isinstance(error, Image.DecompressionBombError):
        return UndecodableError("picture too large")
    return UndecodableError(f"{'truncated' if 'truncat' in str(error).lower() else 'broken'} {kind}")
