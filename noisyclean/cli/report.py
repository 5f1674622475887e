"""``noisyclean report``: a page of what a corpus, or a fit, turned out to be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noisyclean.cli.options import AsJson


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="[OUT]", help="The folder that `noisyclean score` wrote, or `noisyclean fit`.")
    ] = Path("noisyclean-out"),
    to: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The page to write.  [default: OUT/report.html]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a page of how much is mismatched, why, and what it looks like.

    One HTML file that needs no network, with pictures from the shards where these are still there. Its figures are
    also written as SVG and PNG, to a folder beside it.

    \b
    Examples:
      noisyclean report
      noisyclean report scored -o scored.html
      noisyclean report noisyclean-run
    """
    from rich.markup import escape

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.report.page import report as make

    with progress_bar() as progress:
        page = make(folder, to=to, progress=progress)
    if as_json:
        print_json({"page": str(page), "figures": str(page.with_suffix(""))})
        return
    console.out.print(escape(f"Page:    {page}"))
    console.out.print(escape(f"Figures: {page.with_suffix('')}"))
