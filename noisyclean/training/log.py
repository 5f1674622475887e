"""``metrics.jsonl`` and TensorBoard: how the training went, a line at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsLog:
    """Appends figures to ``metrics.jsonl`` and, where TensorBoard is installed, to event files in ``tensorboard/``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._writer = _tensorboard(path.parent / "tensorboard")

    def write(self, epoch: int, fold: int, figures: dict[str, Any]) -> None:
        """Log the figures of one fold's epoch; None values are left out of TensorBoard."""
        json.dump({"epoch": epoch, "fold": fold, **figures}, self._file)
        self._file.write("\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{name}/fold-{fold}", value, epoch)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory))
