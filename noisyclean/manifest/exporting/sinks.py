"""Where exported bytes go: to a file that is whole or not there, or in a dry run nowhere, but counted all the same.

A process that is killed while it writes leaves its temporary file: :func:`is_leftover` knows these.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from noisyclean.files import replacing

_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")
"""The names that :func:`noisyclean.files.replacing` gives; in them, the process."""


@contextmanager
def open_sink(path: Path, *, dry_run: bool) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; its ``tell`` says how many bytes it has taken."""
    if dry_run:
        yield cast("BinaryIO", _Nowhere())
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def is_leftover(path: Path) -> bool:
    """Whether it is the temporary file of a process that runs no more."""
    found = _TEMPORARY.fullmatch(path.name)
    return found is not None and not _runs_beside(int(found[1]))


def _runs_beside(process: int) -> bool:
    if process == os.getpid():  # given to another one before: in a container, each time
        return False
    if os.name == "nt":
        return True  # where to ask would be to end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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
