"""How long work reports on itself, without knowing who listens.

The library calls these; the command line renders them (:mod:`noisyclean.cli.console`). The default listener is silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Count ``amount`` more units as done; ``note`` replaces the few words shown beside the bar."""


class Progress(Protocol):
    """A listener for progress."""

    def task(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """Open a task of ``total`` units (None: not known); it ends with the ``with`` block."""

    def say(self, text: str) -> None:
        """Tell the user one line worth knowing."""


class _SilentTask:
    def advance(self, amount: int = 1, note: str | None = None) -> None:
        pass


class Silent:
    """The listener that says nothing."""

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Task]:
        yield _SilentTask()

    def say(self, text: str) -> None:
        pass


SILENT: Progress = Silent()
