"""The state between two epochs, so that an interrupted fit goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from noisyclean.errors import UsageError
from noisyclean.files import remove_leftovers, replacing


class Checkpoint:
    """One file in RUN, replaced after each epoch and removed when the run is complete.

    ``key`` says what the state belongs to: corpus and recipe. It is read with ``weights_only``, so it runs no code.
    """

    def __init__(self, out: Path, key: str) -> None:
        self._path = out / "checkpoint.pt"
        self._key = key

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; tensors, numbers, strings, lists and dicts only."""
        # Through a file of ours: what torch opens itself fails without saying that the disk is full.
        with replacing(self._path) as temporary, temporary.open("wb") as file:
            torch.save({"key": self._key, **state}, file)

    def check(self) -> None:
        """See that the last state saved, if there is any, can be gone on with.

        Raises:
            UsageError: it belongs to another recipe or corpus, or cannot be read.
        """
        self._read(mmap=True)

    def load(self) -> dict[str, Any] | None:
        """The last state saved, on the CPU; None if there is none.

        Raises:
            UsageError: it belongs to another recipe or corpus, or cannot be read.
        """
        return self._read(mmap=False)

    def _read(self, mmap: bool) -> dict[str, Any] | None:
        if not self._path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # torch.load raises pickle, zip and runtime errors of many kinds
            raise UsageError(f"{self._path}: cannot be read; remove it to start the fit anew") from error
        if state.get("key") != self._key:
            raise UsageError(
                f"{self._path.parent}: holds an unfinished fit of another recipe or corpus; "
                "give another folder with -o, or remove this one"
            )
        return state

    def remove(self) -> None:
        """Forget the state, and what killed fits had begun to write."""
        self._path.unlink(missing_ok=True)
        remove_leftovers(self._path.parent)
