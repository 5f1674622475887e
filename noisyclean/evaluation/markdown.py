"""Markdown tables of means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table_row(cells: Sequence[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def table_heading(cells: Sequence[str]) -> list[str]:
    """The two lines that a table begins with."""
    return [table_row(cells), "|" + "---|" * len(cells)]


def mean_cell(mean: float, deviation: float, decimals: int) -> str:
    """Mean ± standard deviation, either of which may be NaN: not measured, or of one seed."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.{decimals}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{decimals}f}")
