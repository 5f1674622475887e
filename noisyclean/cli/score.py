"""``noisyclean score``: score every pair, and split the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from noisyclean.cli.options import AsJson, Device, Workers
from noisyclean.corpus.decoding import Decode
from noisyclean.errors import NoisycleanError
from noisyclean.files import place
from noisyclean.scoring.engines import EngineName


def score(
    shards: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SHARDS]",
            help="A folder of .tar shards, a glob, a brace pattern, @list.txt, or a URL.  "
            "[default: the shards the RUN was fitted to]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A RUN folder, or any open_clip model with weights: NAME/TAG, NAME/FILE, local-dir:PATH.  "
            "[default: noisyclean-run]",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            "--embeddings",
            metavar="PATH",
            help="Instead of SHARDS and a model: pairs that are embedded already, in .npz files (img and txt, or "
            "DataComp's), a clip-retrieval folder, or Parquet with columns image_embedding and text_embedding; "
            "a file, a folder or a glob.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            help="That of the model which made the embeddings.  [default: as --save-embeddings recorded it, else 0.01]",
            show_default=False,
        ),
    ] = None,
    save_embeddings: Annotated[
        Path | None,
        typer.Option(
            "--save-embeddings",
            metavar="DIR",
            help="Write the embeddings of the readable pairs too, an .npz and a .parquet a shard. "
            "Not for the shards that a RUN of several folds was fitted to, each pair of which is embedded by its own "
            "fold's model: name one of them, RUN/fold-0/encoder.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PATH", parser=place, help="The OUT folder to write.")
    ] = Path("noisyclean-out"),
    fdr: Annotated[float, typer.Option(min=0, max=1, help="Mismatch rate asked of the clean part.")] = 0.05,
    rematch: Annotated[
        bool,
        typer.Option(
            "--rematch",
            help="Name for each noisy pair the caption of the bank that suits its picture best, and the picture "
            "that suits its caption best.",
        ),
    ] = False,
    decode: Annotated[
        Decode | None,
        typer.Option(
            "--decode",
            help="fast: nearly open_clip's pixels, large JPEGs decoded at a smaller scale; exact: its very pixels; "
            "gpu: as fast, but JPEGs are decoded by the GPU with the model (without one, by the CPU, and slower).  "
            "[default: as the RUN was fitted, else fast]",
            show_default=False,
        ),
    ] = None,
    max_unreadable: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Exit with code 1 if more of the samples cannot be read; all is done and written before.",
        ),
    ] = 0.1,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Pairs in a pass; scores do not depend on it.  [default: 64; on a GPU 512; 256 with --embeddings]",
            show_default=False,
        ),
    ] = None,
    workers: Workers = None,
    device: Device = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            "--engine",
            help="local: in this process; ray: by models on each GPU of a Ray cluster, or on each node where there are "
            "none. What one has begun, the other finishes.",
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="The Ray cluster: HOST:PORT, or auto for the one this machine is in. All of its nodes must reach "
            "shards and OUT by the same paths.  [default: this machine alone]",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score every pair and split the corpus.

    Each is scored against a reference bank, then ranked and split: clean, noisy, uncertain.

    Interrupted, it goes on with the shards that are left when the same command is repeated.

    \b
    Examples:
      noisyclean score
      noisyclean score shards/ -m ViT-B-32/laion2b_s34b_b79k -o scored --fdr 0.01
      noisyclean score shards/ -m ViT-B-32/laion2b_s34b_b79k -o scored --save-embeddings embedded
      noisyclean score --embeddings embedded -o scored-again --rematch
      noisyclean score --embeddings 'metadata/*.npz' --temperature 0.01 -o scored
      noisyclean score -m /mnt/run -o /mnt/out --engine ray --address auto
    """
    from dataclasses import asdict

    from noisyclean.cli.console import print_json, progress_bar
    from noisyclean.cli.summary import print_summary
    from noisyclean.scoring.score import score as run

    with progress_bar() as progress:
        summary = run(
            shards,
            model=model,
            embeddings=embeddings,
            temperature=temperature,
            save_embeddings=save_embeddings,
            out=out,
            fdr=fdr,
            rematch=rematch,
            decode=decode,
            batch_size=batch_size,
            workers=workers,
            device=device,
            engine=engine,
            address=address,
            progress=progress,
        )
    if as_json:
        print_json(asdict(summary))
    else:
        print_summary(summary, out)
    if summary.unreadable > max_unreadable * summary.pairs:
        raise NoisycleanError(
            f"{out}: all is done, but {summary.unreadable:,} of {summary.pairs:,} samples are unreadable, more than "
            f"--max-unreadable {max_unreadable:g}"
        )
