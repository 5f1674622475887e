"""``noisyclean bench``: compare methods on known noise, measure retrieval and throughput."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from noisyclean.cli.options import AsJson, Device, Workers
from noisyclean.corpus.decoding import Decode

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T", int, float)


def detection(
    shards: Annotated[
        list[str] | None,
        typer.Argument(help="A corpus of true pairs.  [default: the embedded corpus]", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results, tables and figures.")] = Path(
        "noisyclean-bench"
    ),
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="The base recipe, the same for all methods.")] = "bench",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the base recipe; may be repeated."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas between.")
    ] = "srem,oracle,infonce,vse,ncr,decl,rcl,crcl,rince",
    noise: Annotated[str, typer.Option(help="Shares of the pairs to make wrong.")] = "0.2,0.4,0.6,0.8",
    protocol: Annotated[str, typer.Option(help="Noise protocols, as `corrupt` has them.")] = "caption",
    seeds: Annotated[str, typer.Option(help="Seeds, or how many (`3` is `0,1,2`).")] = "3",
    pairs: Annotated[int, typer.Option(min=500, help="Size of the embedded corpus.")] = 4000,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time.  [default: one a core; on a GPU one]", show_default=False)
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Methods × noise rates × seeds: who finds the mismatches?

    Every method trains the same encoder on the same pairs for as long. Interrupted, or with more methods or seeds, it
    goes on where it was.

    \b
    Examples:
      noisyclean bench detection
      noisyclean bench detection shards/ -o table/ --methods srem,infonce,ncr --noise 0.4 --seeds 1
    """
    from rich.markup import escape

    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.evaluation.bench.detection import bench_detection

    with progress_bar() as progress:
        tables = bench_detection(
            shards or None,
            out=out,
            recipe=recipe,
            overrides=set_ or (),
            methods=_words(methods),
            protocols=_words(protocol),
            rates=_numbers(noise, "--noise", float),
            seeds=_seeds(seeds),
            pairs=pairs,
            jobs=jobs,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(_records(tables.summary))
        return
    console.out.print(escape(tables.markdown.read_text(encoding="utf-8")))
    for path in (tables.markdown, tables.parquet, *tables.figures):
        console.out.print(escape(str(path)))


def embeddings(
    file: Annotated[Path, typer.Argument(help="An .npz with embeddings of true pairs.")],
    noise: Annotated[str, typer.Option(help="Shares of the pairs to make wrong.")] = "0.1,0.2,0.4,0.6,0.8",
    seeds: Annotated[str, typer.Option(help="Seeds, or how many (`3` is `0,1,2`).")] = "10",
    as_json: AsJson = False,
) -> None:
    """Training-free scores, and our estimate and split, on embeddings of true pairs.

    \b
    Examples:
      noisyclean bench embeddings coco500.npz
      noisyclean bench embeddings coco500.npz --noise 0,0.3,1 --seeds 3 --json
    """
    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.evaluation.embedding_bench import bench_embeddings, embeddings_markdown

    with progress_bar() as progress:
        found = bench_embeddings(file, rates=_numbers(noise, "--noise", float), seeds=_seeds(seeds), progress=progress)
    if as_json:
        print_json({name: _records(table) for name, table in found._asdict().items()})
        return
    console.out.print(embeddings_markdown(found), markup=False)


def retrieval(
    shards: Annotated[list[str], typer.Argument(help="Shards of true pairs, one sample a caption.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A RUN, or any open_clip model.")] = "noisyclean-run",
    five_fold: Annotated[bool, typer.Option(help="MS-COCO's 1K protocol: the mean of five fifths.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """R@1, R@5, R@10 both ways and their sum.

    Pairs with the same picture are one image with several captions.

    \b
    Examples:
      noisyclean bench retrieval test-shards/ -m run
      noisyclean bench retrieval coco-test/ -m ViT-B-32/laion2b_s34b_b79k --five-fold
    """
    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.evaluation.bench.retrieval import bench_retrieval

    with progress_bar() as progress:
        found = bench_retrieval(shards, model=model, five_fold=five_fold, device=device, progress=progress)
    if as_json:
        print_json([one.to_dict() for one in found])
        return
    for fold, one in enumerate(found):
        of = f"fold {fold}: " if len(found) > 1 else ""
        console.out.print(
            f"{of}image → text R@1/5/10 {_percentages(one.image_to_text)}, "
            f"text → image {_percentages(one.text_to_image)}, rSum {one.rsum:.1f}",
            markup=False,
        )


def throughput(
    shards: Annotated[
        list[str] | None,
        typer.Argument(help="Pairs to measure on, a few thousand.  [default: made-up photographs]", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="An open_clip name (its weights are random), or any open_clip model.  [default: ViT-S-16]",
            show_default=False,
        ),
    ] = None,
    times: Annotated[int, typer.Option(min=1, help="Rounds; medians are taken.")] = 5,
    workers: Workers = None,
    device: Device = None,
    decode: Annotated[Decode, typer.Option(help="How pictures are decoded where scoring is measured.")] = "fast",
    as_json: AsJson = False,
) -> None:
    """How fast are pairs scored and learned here, and what is the limit?

    Everything is compared within this one run, and beside a loop of webdataset, Pillow and open_clip where webdataset
    is installed. Some ten minutes; leave the machine alone meanwhile.

    \b
    Examples:
      noisyclean bench throughput
      noisyclean bench throughput shards/00000.tar -m ViT-B-32 --times 9 --json
    """
    from noisyclean.cli.console import console, print_json, progress_bar
    from noisyclean.evaluation.bench.throughput.measure import bench_throughput
    from noisyclean.evaluation.bench.throughput.result import throughput_markdown

    with progress_bar() as progress:
        found = bench_throughput(
            shards or None,
            model=model,
            times=times,
            workers=workers,
            device=device,
            decode=decode,
            progress=progress,
        )
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    console.out.print(throughput_markdown(found), markup=False)


def _records(table: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """The rows as JSON has them: null for what is missing."""
    table = table.astype(object)
    return table.where(table.notna(), None).to_dict("records")


def _percentages(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.1f}" for value in values)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, option: str, kind: type[T]) -> list[T]:
    from noisyclean.errors import UsageError

    try:
        numbers = [kind(word) for word in _words(text)]
    except ValueError as error:
        raise UsageError(f"{option} {text}: give numbers with commas between, such as 0.2,0.4") from error
    if not numbers:
        raise UsageError(f"{option}: give at least one number")
    return numbers


def _seeds(text: str) -> list[int]:
    from noisyclean.errors import UsageError

    numbers = _numbers(text, "--seeds", int)
    if "," in text:
        return numbers
    if numbers[0] < 1:
        raise UsageError(f"--seeds {text}: give at least one")
    return list(range(numbers[0]))
