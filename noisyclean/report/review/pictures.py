"""Pictures to look at, taken out of the shards when they are asked for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final

from noisyclean.corpus.decoding import UndecodableError
from noisyclean.corpus.embeddings import SUFFIXES
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.pick import pick_pictures
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.manifest.splitting import read_out
from noisyclean.report.pictures import small_webp, what_happened

SIDE: Final = 1024
"""Pixels of the longer side that are shown."""
_AT_HAND: Final = 8
"""Pictures kept, so that one that was fetched ahead, or is looked at again, is not read again."""


class NoPicture(NoisycleanError):
    """A picture cannot be had; the message says why."""


class Pictures:
    """The pictures of a scored corpus, as WebP of at most ``SIDE`` pixels a side.

    Attributes:
        read: shard and key → a picture; raises :class:`NoPicture` if the shard is gone or has changed, or if it holds
            none that can be decoded.

    Raises:
        UsageError: it was scored from embeddings, or does not say where its shards lie.
    """

    def __init__(self, out: Path) -> None:
        run = read_out(out)
        self._out = out
        self._paths = dict(zip(run["shards"], run.get("paths", ()), strict=False))
        if not self._paths or any(path.endswith(SUFFIXES) for path in self._paths.values()):
            raise UsageError(
                f"{out}: scored without shards, so there are no pictures to look at; "
                "`noisyclean calibrate --sample` draws pairs to label by other means"
            )
        self.read = lru_cache(_AT_HAND)(self._read)

    def _read(self, shard: str, key: str) -> bytes:
        if shard not in self._paths:
            raise NoPicture(f"{shard}: not said where it lies")
        there = Shard(shard, self._paths[shard])
        try:
            if (happened := what_happened(self._out, there)) is not None:
                raise NoPicture(happened)
            data = pick_pictures(there, [key]).get(key)
            if data is None:
                raise NoPicture(f"{there}: no picture of {key}")
            return small_webp(data, SIDE, quality=90)
        except (UndecodableError, NoisycleanError, OSError) as error:
            raise NoPicture(str(error)) from error
