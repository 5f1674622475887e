"""``noisyclean score``: score every pair, and split the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noisyclean.cli.options import AsJson, Device, Workers


def score(
    shards: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SHARDS]",
            help="A folder of .tar shards, a glob, a brace pattern, @list.txt, or a URL.  "
            "[default: the shards the RUN was fitted to]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A RUN folder, or any open_clip model with weights: NAME/TAG, NAME/FILE, local-dir:PATH.",
        ),
    ] = "noisyclean-run",
    out: Annotated[Path, typer.Option("--out", "-o", help="The OUT folder to write.")] = Path("noisyclean-out"),
    fdr: Annotated[float, typer.Option(min=0, max=1, help="Mismatch rate asked of the clean part.")] = 0.05,
    batch_size: Annotated[int, typer.Option(min=32, help="Pairs in a forward pass; scores do not depend on it.")] = 64,
    workers: Workers = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score every pair and split the corpus.

    Each is scored against a reference bank, then ranked and split: clean, noisy, uncertain.

    Interrupted, it goes on with the shards that are left when the same command is repeated.

    \b
    Examples:
      noisyclean score
      noisyclean score shards/ -m ViT-B-32/laion2b_s34b_b79k -o scored --fdr 0.01
    """
    from dataclasses import asdict

    from noisyclean.cli.console import print_json, progress_bar
    from noisyclean.cli.summary import print_summary
    from noisyclean.scoring.score import score as run

    with progress_bar() as progress:
        summary = run(
            shards,
            model=model,
            out=out,
            fdr=fdr,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(asdict(summary))
    else:
        print_summary(summary, out)
