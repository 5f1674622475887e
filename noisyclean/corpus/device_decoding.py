"""JPEGs decoded where the model is: on a GPU by nvJPEG, through torchvision."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import cache
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from noisyclean.corpus.decoding import MAX_PIXELS, Encoded
from noisyclean.errors import UsageError


@cache
def require_decoder(device: torch.device) -> None:
    """See whether JPEGs can be decoded on a device at all.

    Raises:
        UsageError: no; torchvision lacks nvJPEG.
    """
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    try:
        _decode([torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)], device)
    except (RuntimeError, ImportError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"--decode gpu (encoder.decode in a recipe) needs a torchvision with nvJPEG ({why}); take --decode fast"
        ) from error


def decode_jpegs(jpegs: Mapping[int, Encoded], device: torch.device) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield, of pictures by their places, the places of some with the pixels of each: (3, H, W) uint8.

    These are on ``device``, decoded about ``MAX_PIXELS`` at a time. A picture that its decoder refuses is left out.

    Raises:
        UsageError: nothing can be decoded on ``device``.
    """
    if jpegs:
        require_decoder(device)
    for group in _groups(jpegs):
        decoded = _decode_each([torch.from_numpy(jpegs[place].data) for place in group], device)
        pictures = {place: one for place, one in zip(group, decoded, strict=True) if one is not None}
        if pictures:
            yield [*pictures], [*pictures.values()]


def _groups(jpegs: Mapping[int, Encoded]) -> Iterator[list[int]]:
    """The places of all, in groups that can be held at a time."""
    group: list[int] = []
    held = 0
    for place, (_, (width, height)) in jpegs.items():
        if group and held + width * height > MAX_PIXELS:
            yield group
            group, held = [], 0
        group.append(place)
        held += width * height
    if group:
        yield group


def _decode_each(jpegs: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """(3, H, W) uint8 of each, or None: refused."""
    try:
        return [*_decode(jpegs, device)]
    except torch.OutOfMemoryError:  # says nothing of the pictures
        raise
    except RuntimeError:
        if len(jpegs) == 1:
            return [None]
    return [picture for jpeg in jpegs for picture in _decode_each([jpeg], device)]


def _decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    """(3, H, W) uint8 of each.

    Raises:
        RuntimeError: one of them cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # which is to be removed from some later torchvision

    if device.type == "cuda":
        # nvJPEG does not wait its turn: it would write over memory that was freed, but that the GPU has yet to read
        # (https://github.com/pytorch/vision/pull/9606).
        torch.cuda.current_stream(device).synchronize()
    return cast(list[Tensor], decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device))
