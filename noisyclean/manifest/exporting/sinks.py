"""Where exported bytes go: to a file that is whole or not there, or in a dry run nowhere, but counted all the same."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from noisyclean.files import replacing


@contextmanager
def open_sink(path: Path, *, dry_run: bool) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; its ``tell`` says how many bytes it has taken."""
    if dry_run:
        yield cast("BinaryIO", _Nowhere())
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


class _Nowhere(io.RawIOBase):
    def __init__(self) -> None:
        self._taken = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # any buffer, as the base class has it
        size = memoryview(data).nbytes
        self._taken += size
        return size

    def tell(self) -> int:
        return self._taken
