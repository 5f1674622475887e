"""``noisyclean fit``: train encoders that do not learn the mismatches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noisyclean.cli.options import AsJson, Device, Shards


def fit(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", "-o", help="The RUN folder to write.")] = Path("noisyclean-run"),
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe's name (icons, cpu, gpu …) or a YAML file.  [default: chosen for corpus and device]",
            show_default=False,
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="How many models, each trained on the folds of all others; the same as --set folds=K. "
            "With 1 the model scores what it has trained on.  [default: the recipe's, mostly 2]",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train encoders that do not learn the mismatches.

    SREM, cross-fitted: no pair is judged by a model that has trained on it.

    Interrupted, it goes on from the last epoch when the same command is repeated.

    \b
    Examples:
      noisyclean fit shards/
      noisyclean fit shards/ --folds 4
      noisyclean fit 'shards/{00000..00099}.tar' -o run -r gpu --set optimiser.epochs=5
      torchrun --nproc-per-node 8 -m noisyclean fit shards/  (on 8 GPUs; docs/scale.md has several machines)
    """
    from contextlib import nullcontext
    from dataclasses import asdict

    from rich.markup import escape

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.progress import SILENT
    from noisyclean.training.distributed import FailedElsewhereError, leads
    from noisyclean.training.fit import fit as train

    overrides = [*(set_ or ()), *([] if folds is None else [f"folds={folds}"])]
    try:
        with progress_bar() if leads() else nullcontext(SILENT) as progress:
            record = train(shards, out=out, recipe=recipe, overrides=overrides, device=device, progress=progress)
    except FailedElsewhereError as error:
        raise typer.Exit(error.exit_code) from error
    if not leads():
        return
    if as_json:
        print_json(asdict(record))
        return
    models = "1 model" if len(record.folds) == 1 else f"{len(record.folds)} folds"
    console.out.print(f"Fitted {models} on {record.pairs:,} pairs in {record.seconds:,.0f} s")
    for shard, damage in record.damaged_shards.items():
        console.out.print(escape(f"  shard {shard}: {damage}"))
    console.out.print(escape(f"Run:  {out}"))
    where = "" if out == Path("noisyclean-run") else f" -m {out}"
    console.out.print(escape(f"Next: noisyclean score{where}"))
