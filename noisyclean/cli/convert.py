"""``noisyclean convert``: make shards of a benchmark in its own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from noisyclean.cli.options import AsJson


def convert(
    annotations: Annotated[Path, typer.Argument(metavar="ANNOTATIONS", help="The benchmark's file of captions.")],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="The folder of its images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")],
    # As in noisyclean.corpus.layouts, whose import would slow every --help.
    layout: Annotated[Literal["karpathy", "cc"], typer.Option("--format", help="The layout; see above.")],
    split: Annotated[
        list[str] | None,
        typer.Option(help="karpathy: the splits to take, in this order.  [default: train]", show_default=False),
    ] = None,
    captions: Annotated[int, typer.Option(min=1, help="karpathy: captions of each image, the first ones.")] = 5,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Make shards of a benchmark in its own layout.

    One sample a caption, in the order of the field's precomputed features. Images are copied as they are; a pair
    whose image cannot be read is kept without one, and counted as unreadable by every command.

    \b
    Formats:
      karpathy  dataset_flickr30k.json, dataset_coco.json. The usual training split of COCO is
                --split train,restval, in this order.
      cc        Conceptual Captions: lines of caption, url (Google's), or of id, caption or id, caption, url
                (CC152K's train_caps.tsv, train_caps_img_urls.csv), with tabs between and no header.
                Images are found anywhere under IMAGES, by the id, or else by the line's number, counted
                from 0: 17.jpg, 000000017.jpg, or 17_<CRC-32 of the url>; with any extension or none.

    \b
    Examples:
      noisyclean convert dataset_flickr30k.json flickr30k-images/ -o flickr30k/ --format karpathy
      noisyclean convert dataset_coco.json coco/ -o coco-train/ --format karpathy --split train,restval
      noisyclean convert train_caps_img_urls.csv images/ -o cc152k/ --format cc
    """
    from rich.markup import escape

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.corpus.convert import convert as make
    from noisyclean.errors import UsageError

    if layout == "cc" and split:
        raise UsageError("--split is for --format karpathy; a Conceptual Captions file is one split")
    splits = [one.strip() for word in split or ["train"] for one in word.split(",")]
    with progress_bar() as progress:
        done = make(
            annotations,
            images,
            out,
            layout=layout,
            splits=splits,
            captions=captions,
            shard_size=shard_size,
            progress=progress,
        )
    if as_json:
        print_json(
            {"shards": done.shards, "samples": done.samples, "images": done.images, "missing_images": done.missing}
        )
        return
    console.out.print(f"{done.samples:,} samples of {done.images:,} images, {done.missing:,} of them missing")
    console.out.print(f"Shards: {escape(str(out))} ({done.shards:,})")
