"""The terminal: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.progress import Task as BarTask
from rich.text import Text

from noisyclean.progress import Progress, Task

LINE_EVERY = 10.0
"""Seconds between two lines of a task's progress where stderr is no terminal (a log file, a batch job)."""


class _Console:
    """Both streams, made anew for each use, so that a redirected ``sys.stdout`` is honoured."""

    @property
    def out(self) -> Console:
        return Console(highlight=False, soft_wrap=True)

    @property
    def err(self) -> Console:
        return Console(stderr=True, highlight=False, soft_wrap=True)


console = _Console()


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A listener that shows the work on stderr: bars in a terminal, a line every few seconds elsewhere."""
    err = console.err
    if not err.is_terminal:
        yield _Lines(err)
        return
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=err,
    )
    with bars:
        yield _Bars(bars)


def _plain(text: str) -> str:
    """Without what rich or a terminal would obey: what is said may quote a hostile corpus."""
    return escape("".join(one if one.isprintable() or one == "\n" else "�" for one in text))


class _RateColumn(ProgressColumn):
    def render(self, task: BarTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s", style="cyan")


class _BarTask:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        if note is None:
            self._bars.advance(self._task, amount)
        else:
            self._bars.update(self._task, advance=amount, note=_plain(note))


class _Bars:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Task]:
        task = self._bars.add_task(name, total=total, unit=unit, note="")
        yield _BarTask(self._bars, task)
        self._bars.update(task, note="")
        self._bars.stop_task(task)

    def say(self, text: str) -> None:
        self._bars.console.print(_plain(text))


class _LineTask:
    def __init__(self, err: Console, name: str, total: int | None, unit: str) -> None:
        self._err, self._name, self._total, self._unit = err, name, total, unit
        self._done = 0
        self._started = self._said = time.monotonic()

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        self._done += amount
        if time.monotonic() - self._said >= LINE_EVERY:
            self.tell(note)

    def tell(self, note: str | None = None) -> None:
        self._said = time.monotonic()
        seconds = max(self._said - self._started, 1e-9)
        rate = self._done / seconds
        parts = [f"{self._done:,}" + (f" of {self._total:,}" if self._total else "") + f" {self._unit}"]
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
        parts.append(f"{seconds:.0f} s")
        if self._total and 0 < self._done < self._total:
            parts.append(f"{(self._total - self._done) / rate:.0f} s left")
        if note:
            parts.append(note)
        self._err.print(_plain(f"{self._name}: {', '.join(parts)}"))


class _Lines:
    def __init__(self, err: Console) -> None:
        self._err = err

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Task]:
        task = _LineTask(self._err, name, total, unit)
        yield task
        task.tell()

    def say(self, text: str) -> None:
        self._err.print(_plain(text))
