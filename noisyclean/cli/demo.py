"""``noisyclean demo``: the whole main job, on a corpus it makes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noisyclean.cli.options import AsJson


def demo(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where everything is put.")] = Path(
        "noisyclean-demo"
    ),
    as_json: AsJson = False,
) -> None:
    """Run the whole job on a corpus with known noise.

    Makes the corpus, fits, scores, compares with the truth, and makes the report page; about two and a half minutes on
    two cores.

    \b
    Examples:
      noisyclean demo
      noisyclean demo /tmp/demo --json
    """
    import time

    from rich.markup import escape

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.cli.evaluation import print_evaluation
    from noisyclean.cli.summary import print_summary
    from noisyclean.evaluation.demo import demo as run
    from noisyclean.report.page import report

    started = time.perf_counter()
    with progress_bar() as progress:
        done = run(directory, progress=progress)
        page = report(done.out, progress=progress)
    seconds = time.perf_counter() - started
    if as_json:
        print_json({**done.evaluation.to_dict(), "report": str(page), "seconds": round(seconds, 1)})
        return
    print_summary(done.summary, done.out)
    console.out.print("\nAgainst the truth, which neither fit nor score has seen:")
    print_evaluation(done.evaluation)
    console.out.print(escape(f"Shards:   {done.shards}  (the truth: {done.truth})"))
    console.out.print(escape(f"Run:      {done.run}"))
    console.out.print(escape(f"Report:   {page}"))
    console.out.print(f"Done in {seconds:,.0f} s")
