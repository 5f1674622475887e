"""``noisyclean calibrate``: hold a manifest against human labels of a random sample."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noisyclean.cli.options import AsJson, Out

if TYPE_CHECKING:
    from noisyclean.evaluation.labelling import Calibration


def calibrate(
    out: Out = Path("noisyclean-out"),
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Draw N pairs to label from each of clean, uncertain, noisy.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("-o", metavar="FILE", help="The sample to write, .csv or .parquet.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same sample.")] = 0,
    labels: Annotated[
        Path | None,
        typer.Option(help="The sample with its column matched filled in: .csv, .parquet or .jsonl."),
    ] = None,
    target: Annotated[
        float, typer.Option(help="The mismatch rate that the part to keep is certified not to exceed.")
    ] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Say by human labels how clean the clean part really is.

    First draw a sample and fill in its column matched with true or false, from the top as far as you get: decide the
    hard ones too, since without them the sample is not random. Then read the labels: the share that matches in each
    split, the mismatch rate of the corpus, and the largest part that, with 95 % confidence, holds no more mismatches
    than the target.

    Other labels will do if they too are of pairs drawn at random from each split. OUT is only read. A larger sample of
    the same seed holds the smaller one: --sample with --labels takes over the labels that you have.

    \b
    Examples:
      noisyclean calibrate --sample 300 -o labels.csv
      noisyclean calibrate --labels labels.csv
      noisyclean calibrate scored --labels labels.parquet --target 0.02 --json
      noisyclean calibrate --sample 600 --labels labels.csv -o more.csv
    """
    from noisyclean.cli.console import print_json, progress_bar
    from noisyclean.errors import UsageError
    from noisyclean.evaluation.labelling import calibrate as read_labels
    from noisyclean.evaluation.labelling import draw_sample

    if (sample is None) != (to is None):
        raise UsageError("--sample N and -o FILE go together: how many pairs of each split, and where to write them")
    if sample is not None and to is not None:
        with progress_bar() as progress:
            drawn = draw_sample(out, sample=to, pairs=sample, seed=seed, labels=labels, progress=progress)
        if as_json:
            print_json({"sample": str(to), "drawn": drawn})
        else:
            _print_drawn(drawn, out, to)
        return
    if labels is None:
        raise UsageError("give --sample N -o FILE to draw pairs to label, or --labels FILE to read the labels")
    with progress_bar() as progress:
        found = read_labels(out, labels=labels, target=target, progress=progress)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_calibration(found, out, labels)


def _print_drawn(drawn: dict[str, int], out: Path, to: Path) -> None:
    from rich.markup import escape

    from noisyclean.cli.console import console

    listing = ", ".join(f"{count:,} {split}" for split, count in drawn.items())
    console.out.print(escape(f"Sample: {to} ({listing})"))
    console.out.print("Write true or false in its column matched, from the top as far as you get. Then:")
    console.out.print(escape(f"  noisyclean calibrate {_quoted(out)} --labels {_quoted(to)}"))


def _print_calibration(found: Calibration, out: Path, labels: Path) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from noisyclean.cli.console import console

    table = Table("split", box=box.SIMPLE_HEAD)
    for name in ("pairs", "labelled", "match", "95 % interval"):
        table.add_column(name, justify="right")
    for name, split in found.splits.items():
        share = "–" if split.precision is None else f"{split.precision:.1%}"
        table.add_row(name, f"{split.pairs:,}", f"{split.labelled:,}", share, _interval(split.interval))
    console.out.print(table)
    for line in _sentences(found, out, labels):
        console.out.print(escape(line))


def _sentences(found: Calibration, out: Path, labels: Path) -> Iterator[str]:
    if found.mismatch_rate is None:
        yield "Mismatch rate by the labels: not known, as a split has none"
    else:
        interval = _interval(found.mismatch_interval)
        yield f"Mismatch rate by the labels: {found.mismatch_rate:.1%} (95 % interval {interval})"
    yield f"Estimated without labels:    {found.estimated_noise:.1%} (95 % interval {_interval(found.noise_interval)})"
    if found.clean_as_asked is not None:
        verdict = "the labels allow that" if found.clean_as_asked else "by the labels it is more"
        yield f"Mismatch rate asked of the clean part: {found.target_fdr:.1%}; {verdict}"
    yield ""
    goal = f"to hold at most {found.target:.1%} mismatches"
    if found.cutoff is not None:
        keep, rank = found.cutoff.keep, found.cutoff.rank
        yield f"Certified {goal}, with 95 % confidence: rank ≤ {rank:,}, the best {keep:.1%} of the readable pairs"
        yield f"  noisyclean split {_quoted(out)} --keep {keep:g}"
    elif found.labels_needed is None:
        yield f"No part can be certified {goal}, and more labels will not help"
    else:
        needed = found.labels_needed
        yield f"No part can be certified {goal}. If the rates stay as observed, some {needed:,} a split would do:"
        yield f"  noisyclean calibrate {_quoted(out)} --sample {needed} --labels {_quoted(labels)} -o more.csv"


def _interval(limits: tuple[float, float] | None) -> str:
    return "–" if limits is None else f"{limits[0]:.1%} to {limits[1]:.1%}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
