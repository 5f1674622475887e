"""A scored corpus's pictures to look at: whether its shards still are what was scored, and pictures made small."""

from __future__ import annotations

import io
from pathlib import Path

from noisyclean.corpus.decoding import decode_reduced
from noisyclean.corpus.locate import Shard
from noisyclean.errors import NoisycleanError
from noisyclean.manifest.parts import read_part_info, shard_state


def what_happened(out: Path, shard: Shard) -> str | None:
    """In words, if the shard is no longer what was scored; else None.

    Raises:
        UsageError: its score part is missing or broken, so that nothing is known of how the shard was.
    """
    scored = read_part_info(out, shard.name).source
    try:
        state = shard_state(shard)
    except NoisycleanError as error:
        return str(error)
    if scored in ("", state):
        return None
    return f"{shard} {'has changed since it was scored' if state else 'is no longer there'}"


def small_webp(data: bytes, side: int, quality: int) -> bytes:
    """A picture as a WebP of at most ``side`` pixels a side.

    It is never handed on as it lies in the shard: browsers know other formats than we, and have holes of their own.

    Raises:
        UndecodableError: as :func:`noisyclean.corpus.decoding.decode_image`.
    """
    from PIL import Image

    pixels, _ = decode_reduced(data, (side, side))
    image = Image.fromarray(pixels).convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()
