"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from noisyclean.files import place

Shards: TypeAlias = Annotated[
    list[str],
    typer.Argument(metavar="SHARDS", help="A folder of .tar shards, a glob, a brace pattern, @list.txt, or a URL."),
]
Workers: TypeAlias = Annotated[
    int | None,
    typer.Option("--workers", min=0, help="Decoding processes.  [default: one a core]", show_default=False),
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 …  [default: a GPU if there is one]", show_default=False),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Out: TypeAlias = Annotated[
    Path, typer.Argument(metavar="[OUT]", parser=place, help="The folder that `noisyclean score` wrote.")
]
