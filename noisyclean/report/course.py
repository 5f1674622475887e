"""How a fit went: what ``metrics.jsonl`` and ``run.json`` of a RUN say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisyclean.errors import UsageError
from noisyclean.scoring.run import METRICS_FILE as METRICS_FILE
from noisyclean.scoring.run import RECIPE_FILE, RunRecord, read_record
from noisyclean.scoring.run import RUN_FILE as RUN_FILE

Point = tuple[int, float]


@dataclass(frozen=True)
class Course:
    """A fit.

    Attributes:
        record: its run.json.
        recipe: its recipe.yaml.
        rows: the lines of its metrics.jsonl, an epoch of a fold each.
    """

    record: RunRecord
    recipe: str
    rows: list[dict[str, Any]]

    def lines(self, figure: str) -> list[list[Point]]:
        """The (epoch, value) points of a figure, of each fold; epochs, from 1, that lack it are left out."""
        folds = len(self.record.folds)
        return [
            [
                (row["epoch"] + 1, row[figure])
                for row in self.rows
                if row["fold"] == fold and row.get(figure) is not None
            ]
            for fold in range(folds)
        ]

    def last(self) -> list[dict[str, Any]]:
        """The last epoch of each fold."""
        last = {row["fold"]: row for row in self.rows}
        return [last[fold] for fold in sorted(last)]


def read_course(run: Path) -> Course:
    """Read a complete RUN.

    Raises:
        UsageError: it is none, or its metrics are broken.
    """
    record = read_record(run)
    path = run / METRICS_FILE
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        recipe = (run / RECIPE_FILE).read_text(encoding="utf-8")
        for row in rows:
            row["epoch"], row["fold"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: missing or broken ({error}); fit again") from error
    return Course(record, recipe, rows)
