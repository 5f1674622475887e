"""``noisyclean export``: write the clean pairs for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from noisyclean.cli.options import AsJson, Out


def export(
    to: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")],
    # As in noisyclean.manifest.exporting.export, whose import would slow every --help.
    layout: Annotated[
        Literal["shards", "datacomp", "keys", "csv", "jsonl"],
        typer.Option("--format", help="What to write; see above."),
    ],
    out: Out = Path("noisyclean-out"),
    split: Annotated[
        list[str] | None,
        typer.Option(help="Whose pairs: clean, noisy, uncertain, unreadable.  [default: clean]", show_default=False),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Add this column as `weight`, such as match_probability; see above."),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="shards: at most so many samples in a tar.  [default: the corpus's shards]", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be written (exactly: the shards are read), and write nothing."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the clean pairs for training.

    Interrupted, it goes on with the shards that are left when the same command is repeated. After another
    `noisyclean split`, only the shards whose pairs have changed are written anew.

    \b
    Formats:
      shards    WebDataset tars of whole samples, byte for byte, with sizes.json for open_clip and
                NNNNN_stats.json. With --weights, NNNNN.parquet has the weight of each key.
      datacomp  uids.npy, the sorted uids that DataComp's tools take for a subset.
      keys      keys.parquet with shard, key, index and uid; opens no shard, as the next two.
      csv       pairs.csv with all columns, made safe to open in a spreadsheet.
      jsonl     pairs.jsonl with all columns, one object a line.

    \b
    Examples:
      noisyclean export --format shards -o clean/
      noisyclean export scored --format shards -o soft/ --split clean,uncertain --weights match_probability
      noisyclean export --format shards -o clean/ --shard-size 10000 --dry-run
      noisyclean export --format datacomp -o subset/
    """
    from dataclasses import asdict

    from rich.filesize import decimal
    from rich.markup import escape

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.manifest.exporting.export import export as write

    splits = [one.strip() for word in split or ["clean"] for one in word.split(",")]
    with progress_bar() as progress:
        done = write(
            out,
            to=to,
            format=layout,
            splits=splits,
            weights=weights,
            shard_size=shard_size,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        print_json({**asdict(done), "dry_run": dry_run})
        return
    would = "Would write " if dry_run else ""
    files = f"{done.files:,} {'tars' if layout == 'shards' else 'file'}"
    console.out.print(f"{would}{done.rows:,} pairs ({', '.join(splits)}) in {files}, {decimal(done.bytes)}")
    for why, count in done.left_out.items():
        console.out.print(f"Left out: {count:,}, {escape(why)}")
    console.out.print(f"Folder: {escape(str(to))}")
