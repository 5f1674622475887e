"""``noisyclean show``: some pairs of a split, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noisyclean.cli.options import AsJson, Out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.text import Text

    from noisyclean.report.gallery import Card

_PICTURE = 24
"""Columns that a picture may take, of two pixels above one another each."""


def show(
    out: Out = Path("noisyclean-out"),
    split: Annotated[str, typer.Option(help="Whose pairs: clean, noisy, uncertain or unreadable.")] = "noisy",
    pairs: Annotated[int, typer.Option("--pairs", "-n", min=1, help="How many.")] = 12,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The worst by this column, instead of a random draw.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show some pairs of a split.

    With their pictures, where the output is a terminal and the shards are still there.

    \b
    Examples:
      noisyclean show
      noisyclean show scored --split clean -n 5 --by swapped_entropy
      noisyclean show --split uncertain --seed 1 --json
    """
    from rich.table import Table
    from rich.text import Text

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.report.gallery import draw

    with progress_bar() as progress:
        cards = draw(out, split=split, pairs=pairs, by=by, seed=seed, progress=progress)
    if as_json:
        print_json({"split": split, "pairs": [{**card.row, "best_caption": card.best_caption} for card in cards]})
        return
    terminal = console.out
    for card in cards:
        row = Table.grid(padding=(0, 2))
        words = Text("\n").join(_lines(card))
        if terminal.is_terminal and card.picture is not None:
            row.add_row(_paint(card.picture), words)
        else:
            row.add_row(words)
        terminal.print(row)
        terminal.print()
    if not cards:
        terminal.print(f"No pair is {split}")


def _lines(card: Card) -> Iterator[Text]:
    from rich.text import Text

    from noisyclean.report.gallery import legible

    row = card.row
    yield Text(legible(f"{row['shard']}/{row['key']}"), style="bold")
    yield Text(legible(row["caption"] or "no caption"))
    yield Text(legible(f"{row['split']}: {row['reason']}"))
    if row["rank"] is not None:
        yield Text(
            f"rank {row['rank']:,}, match score {row['match_score']:.2f}, q-value {row['q_value']:.3g}, "
            f"match probability {row['match_probability']:.3g}",
            style="dim",
        )
    if card.best_caption is not None:
        yield Text(
            legible(f"Of the bank, most like its picture ({row['best_text_similarity']:.3g}): {card.best_caption}")
        )
    if row["best_image_key"] is not None:
        yield Text(
            legible(
                f"Most like its caption ({row['best_image_similarity']:.3g}): the picture of {row['best_image_key']}"
            )
        )


def _paint(picture: bytes) -> Text:
    """A picture in half blocks, two pixels a character."""
    import io

    import numpy as np
    from PIL import Image
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((_PICTURE, _PICTURE))
    pixels = np.asarray(image).tolist()
    text = Text(no_wrap=True)
    for y in range(0, image.height - 1, 2):
        for x in range(image.width):
            upper, lower = (Color.from_rgb(*pixels[y + below][x]) for below in (0, 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    text.right_crop(1)
    return text
