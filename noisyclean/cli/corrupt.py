"""``noisyclean corrupt``: plant known noise in a copy of a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from noisyclean.cli.options import AsJson, Shards


def corrupt(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the copy and its truth.parquet.")],
    rate: Annotated[float | None, typer.Option(help="Share of the readable pairs to make wrong, 0 to 1.")] = None,
    # As in noisyclean.corpus.noise, whose import would slow every --help.
    protocol: Annotated[
        Literal["caption", "image", "hard", "uninformative"] | None,
        typer.Option(
            help="Permute captions or images, take a near neighbour's caption, or one that says nothing."
            "  [default: caption]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed plants the same noise.  [default: 0]", show_default=False)
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Instead of these three: a benchmark's noise index file (.npy).")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; one a core by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plant known noise in a copy of the shards.

    The truth is written beside it.

    --index takes the files in which the noisy-correspondence papers (NCR, L2RM, PC2, RCL …) exchange their noise: an
    image number for each caption, or for each image. The shards are those of `noisyclean convert`.

    \b
    Examples:
      noisyclean corrupt shards/ -o noisy/ --rate 0.2
      noisyclean corrupt 'shards/{00000..00099}.tar' -o hard/ --rate 0.4 --protocol hard --seed 1
      noisyclean corrupt flickr30k/ -o noisy/ --index f30k_precomp_0.4.npy
    """
    from rich.markup import escape

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.corpus.noise import corrupt as plant
    from noisyclean.corpus.noise_index import apply_index
    from noisyclean.errors import UsageError

    if index is None and rate is None:
        raise UsageError("give --rate, the share of pairs to make wrong, or --index, a noise index file")
    if index is not None and (rate, protocol, seed) != (None, None, None):
        raise UsageError("--index says all that --rate, --protocol and --seed would; give the one or the others")
    with progress_bar() as progress:
        if index is not None:
            truth = apply_index(shards, out, index, workers=workers, progress=progress)
        else:
            truth = plant(
                shards,
                out,
                rate=rate or 0.0,
                protocol=protocol or "caption",
                seed=seed or 0,
                workers=workers,
                progress=progress,
            )
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
