"""``noisyclean evaluate``: compare a manifest with the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noisyclean.cli.options import AsJson, Out


def evaluate(
    out: Out = Path("noisyclean-out"),
    truth: Annotated[
        Path | None,
        typer.Option(help="Parquet with shard, key, matched: the truth.parquet of `noisyclean corrupt`.  [required]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the split with a known truth.

    AUROC, average precision, realised mismatch rate and recall of each split.

    \b
    Examples:
      noisyclean evaluate --truth noisy/truth.parquet
      noisyclean evaluate scored --truth noisy/truth.parquet --json
    """
    from noisyclean.cli.console import print_json
    from noisyclean.errors import UsageError
    from noisyclean.evaluation.detection import evaluate as compare

    if truth is None:
        raise UsageError("evaluate needs --truth FILE: a Parquet file with the columns shard, key and matched")
    found = compare(out, truth=truth)
    if as_json:
        print_json(found.to_dict())
    else:
        from noisyclean.cli.evaluation import print_evaluation

        print_evaluation(found)
