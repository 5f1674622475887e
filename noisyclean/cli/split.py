"""``noisyclean split``: redraw the split from the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noisyclean.cli.options import AsJson, Out


def split(
    out: Out = Path("noisyclean-out"),
    fdr: Annotated[
        float | None, typer.Option(min=0, max=1, help="Clean: the mismatch rate asked of it.  [default: 0.05]")
    ] = None,
    keep: Annotated[float | None, typer.Option(min=0, max=1, help="Clean: this share of the readable pairs.")] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Clean: at least this score (at most, where lower is better).")
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="What --keep and --min-score go by, such as similarity.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Redraw the split from the scores, without a model.

    \b
    Examples:
      noisyclean split --fdr 0.01
      noisyclean split scored --keep 0.3 --by similarity
    """
    from dataclasses import asdict

    from noisyclean.cli.console import print_json, progress_bar
    from noisyclean.cli.summary import print_summary
    from noisyclean.manifest.splitting import split as redraw

    with progress_bar() as progress:
        summary = redraw(out, fdr=fdr, keep=keep, min_score=min_score, by=by, progress=progress)
    if as_json:
        print_json(asdict(summary))
    else:
        print_summary(summary, out)
