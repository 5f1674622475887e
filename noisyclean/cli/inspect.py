"""``noisyclean inspect``: what is in a corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from noisyclean.cli.options import AsJson, Shards

if TYPE_CHECKING:
    from noisyclean.corpus.inspection import Inspection, Spread

_LISTED = 10  # damaged shards, and reasons; --json has them all


def inspect(
    shards: Shards,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; one a core by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is in the shards, without a model.

    Counts, sizes, captions, and what cannot be read, and why.

    \b
    Examples:
      noisyclean inspect shards/
      noisyclean inspect 's3://bucket/shards/{00000..00099}.tar' --json
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.corpus.inspection import inspect as look

    with progress_bar() as progress:
        found = look(shards, workers=workers, progress=progress)
    if as_json:
        print_json(found.to_dict())
        return
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, *lines in _facts(found):
        table.add_row(name, escape("\n".join(lines)))
    console.out.print(table)


def _facts(found: Inspection) -> Iterator[tuple[str, ...]]:
    """Each fact's name, and its lines."""
    from rich.filesize import decimal

    yield "Shards", f"{found.shards:,} ({decimal(found.tar_bytes)})"
    if found.damaged_shards:
        yield "Damaged", *_listed(found.damaged_shards)
    yield "Samples", f"{found.samples:,}"
    yield "Readable pairs", f"{found.readable:,} ({_share(found.readable, found.samples)})"
    if found.unreadable:
        yield "Unreadable", *_listed({reason: f"{count:,}" for reason, count in found.unreadable.items()})
    yield "uid, url", f"{_share(found.with_uid, found.samples)}, {_share(found.with_url, found.samples)} of the samples"
    if found.duplicate_uids:
        yield "Duplicate uids", f"{found.duplicate_uids:,}"
    if not found.readable:
        return
    yield "Image formats", ", ".join(f"{count:,} {name}" for name, count in found.image_formats.items())
    yield "Image width", _spread(found.width)
    yield "Image height", _spread(found.height)
    yield "Image bytes", _spread(found.image_bytes)
    yield "Caption characters", _spread(found.caption_characters)
    yield "Caption words", _spread(found.caption_words)
    yield "Distinct captions", f"{found.distinct_captions:,}"
    yield (
        "Repeated",
        (f"captions of {found.repeated_caption_share:.1%} and images of {found.repeated_image_share:.1%} of the pairs"),
    )
    if found.repeated_captions:
        yield "Most repeated", *(f"{times:,} × {_shorten(caption)}" for caption, times in found.repeated_captions)


def _listed(facts: Mapping[str, str]) -> list[str]:
    lines = [f"{name}: {fact}" for name, fact in list(facts.items())[:_LISTED]]
    return [*lines, f"… and {len(facts) - _LISTED:,} more (--json lists all)"] if len(facts) > _LISTED else lines


def _spread(spread: Spread | None) -> str:
    return f"{spread.min:,} to {spread.max:,}, median {spread.median:,}" if spread else "–"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _shorten(caption: str, length: int = 100) -> str:
    line = " ".join(caption.split())
    return line if len(line) <= length else line[: length - 1] + "…"
