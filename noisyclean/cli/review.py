"""``noisyclean review``: judge a sample of pairs by eye, in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noisyclean.cli.options import Out


def review(
    out: Out = Path("noisyclean-out"),
    pairs: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many to draw from each of clean, uncertain, noisy.")
    ] = 100,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Another seed, another sample.  [default: that of the labels in OUT, or 0]"),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where to listen.  [default: a free port]", show_default=False)
    ] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser; print the address only.")] = False,
) -> None:
    """Judge by eye how clean the clean part really is, in the browser.

    Pairs drawn at random from each split are shown one by one, without what noisyclean thinks of them: press y if the
    caption describes the picture, n if not, u if you cannot say, and b to go back. Every answer is kept at once in
    OUT/labels.parquet, which `noisyclean calibrate` reads too; repeat the command to go on. Beside the pair it says how
    much of the clean part matches, and which part can be certified.

    The page is served to this machine alone, at an address that cannot be guessed, until you press Ctrl-C.

    \b
    Examples:
      noisyclean review
      noisyclean review scored --pairs 300
      noisyclean review --no-open --port 8000
      noisyclean calibrate --labels noisyclean-out/labels.parquet
    """
    import webbrowser

    from rich.markup import escape

    from noisyclean.cli.console import console, progress_bar
    from noisyclean.report.review.serve import serve
    from noisyclean.report.review.session import Session

    def ready(address: str) -> None:
        console.out.print(escape(f"Page: {address}"))
        console.out.print("Ctrl-C ends it")
        if not no_open:
            webbrowser.open(address)

    with progress_bar() as progress:
        session = Session(out, pairs=pairs, seed=seed, progress=progress)
    serve(session, port=port, ready=ready)
    labels = session.labels
    judged = len(labels.rows) - len(labels.open_places())
    console.out.print(escape(f"{judged:,} of {len(labels.rows):,} pairs judged: {labels.path}"))
