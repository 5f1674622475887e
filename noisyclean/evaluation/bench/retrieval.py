"""``bench retrieval``: a model by the field's retrieval protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from noisyclean.corpus.index import index_corpus
from noisyclean.corpus.locate import ShardSpec, find_shards
from noisyclean.corpus.parallel import default_workers
from noisyclean.corpus.source import StreamSource
from noisyclean.device import choose_device
from noisyclean.encoders import load_encoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.evaluation import retrieval as metrics
from noisyclean.evaluation.retrieval import Retrieval, group_captions
from noisyclean.progress import SILENT, Progress
from noisyclean.scoring.reference import embed
from noisyclean.scoring.run import is_run, load_run


def bench_retrieval(
    shards: ShardSpec,
    *,
    model: str | Path,
    five_fold: bool = False,
    device: str | None = None,
    progress: Progress = SILENT,
) -> list[Retrieval]:
    """Retrieval figures of each fold's model of a RUN, or of one open_clip model.

    Args:
        shards: true pairs; those that share a picture, byte for byte, are one image with several captions.
        model: a RUN folder, or what :func:`noisyclean.encoders.load_encoder` takes.
        five_fold: MS-COCO's 1K protocol, see :func:`noisyclean.evaluation.retrieval.five_fold`.
        device: a torch device; None: CUDA if there is one, else the CPU.
        progress: who is told how it goes.

    Raises:
        UsageError: the shards or the model cannot be what is meant, or there are no five pictures for five fifths.
        NoisycleanError: no pair can be read.
    """
    place = choose_device(device)
    found = find_shards(shards)
    encoders = [one.encoder for one in load_run(Path(model)).models] if is_run(model) else [load_encoder(str(model))]
    index = index_corpus(found, workers=default_workers(), progress=progress)
    rows = np.flatnonzero(index.usable)
    figures = []
    for encoder in encoders:
        source = StreamSource(index, encoder.preprocessor, workers=default_workers())
        with progress.task("embedding the pairs", len(rows), "pairs") as task:
            at, image, text = embed(encoder.to(place), source, rows, on_batch=task.advance)
        if not len(at):
            raise NoisycleanError(f"{found[0]} and the other {len(found) - 1} shards: no pair can be read")
        order = np.argsort(at)  # that of the shards, by which the fifths go
        first, image_of_text = group_captions(index.image[at[order]])
        if five_fold and len(first) < 5:
            raise UsageError(f"--five-fold: {len(first)} different pictures in {found[0]} …; at least 5 are needed")
        pictures, captions = torch.from_numpy(order[first]), torch.from_numpy(order)
        measure = metrics.five_fold if five_fold else metrics.retrieval
        figures.append(measure(image.cpu()[pictures], text.cpu()[captions], image_of_text))
    return figures
