"""``noisyclean corrupt``: plant known noise in a copy of a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from noisyclean.cli.options import AsJson, Shards


def corrupt(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the copy and its truth.parquet.")],
    rate: Annotated[float, typer.Option(help="Share of the readable pairs to make wrong, 0 to 1.")],
    # As in noisyclean.corpus.noise, whose import would slow every --help.
    protocol: Annotated[
        Literal["caption", "image", "hard", "uninformative"],
        typer.Option(help="Permute captions or images, take a near neighbour's caption, or one that says nothing."),
    ] = "caption",
    seed: Annotated[int, typer.Option(min=0, help="The same seed plants the same noise.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; one a core by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plant known noise in a copy of the shards.

    The truth is written beside it.

    \b
    Examples:
      noisyclean corrupt shards/ -o noisy/ --rate 0.2
      noisyclean corrupt 'shards/{00000..00099}.tar' -o hard/ --rate 0.4 --protocol hard --seed 1
    """
    from rich.markup import escape

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.corpus.noise import corrupt as plant

    with progress_bar() as progress:
        truth = plant(shards, out, rate=rate, protocol=protocol, seed=seed, workers=workers, progress=progress)
    kinds, wrong = _count(truth)
    samples = sum(kinds.values())
    if as_json:
        print_json({"truth": str(truth), "samples": samples, "wrong": wrong, "kinds": kinds})
        return
    listing = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    console.out.print(f"{samples:,} samples, of which {wrong:,} wrong ({escape(listing)})")
    console.out.print(f"Truth: {escape(str(truth))}")


def _count(truth: Path) -> tuple[dict[str, int], int]:
    """How many samples there are of each kind, the commonest first, and how many are mismatched in all."""
    import pyarrow.parquet as pq

    table = pq.read_table(truth, columns=["kind", "matched"])
    counts = table.group_by("kind").aggregate([([], "count_all")]).to_pylist()
    kinds = {row["kind"]: row["count_all"] for row in sorted(counts, key=lambda row: (-row["count_all"], row["kind"]))}
    return kinds, table["matched"].to_pylist().count(False)
