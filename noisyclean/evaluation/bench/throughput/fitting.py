"""Training steps beside a bare loop, and a filtering pass beside an epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from noisyclean.corpus.index import index_corpus
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.source import MemorySource, StreamSource
from noisyclean.encoders import DualEncoder
from noisyclean.recipe import OptimiserRecipe, Recipe, SremObjective
from noisyclean.training.crossfit import make_encoder
from noisyclean.training.filtration import judge, srem_filter
from noisyclean.training.memory import EmbeddingMemory
from noisyclean.training.objectives import make_objective
from noisyclean.training.trainer import FoldTrainer


class FittingWays(NamedTuple):
    """Three ways through the same pairs in memory; each returns how many it took."""

    fit: Callable[[], int]
    bare: Callable[[], int]
    refilter: Callable[[], int]


def fitting_ways(tars: Sequence[Path], device: torch.device, workers: int) -> FittingWays:
    """SREM's training with the default recipe, the same batches in a bare loop, and the weighing of the pairs."""
    recipe, optimiser, objective = Recipe(), OptimiserRecipe(), SremObjective()
    encoder = make_encoder(recipe.encoder, device, seed=0)
    index = index_corpus(find_shards(list(map(str, tars))), workers=workers)
    source = MemorySource(StreamSource(index, encoder.preprocessor, workers=workers))
    usable = np.flatnonzero(index.usable)
    rows = usable[: len(usable) - len(usable) % optimiser.batch_size]
    trainer = FoldTrainer(encoder, optimiser, make_objective(objective, len(index)), EmbeddingMemory(rows))
    weights = torch.ones(len(index))

    def fit() -> int:
        trainer.train_epoch(source, rows, weights, epoch=objective.warmup_epochs, seed=0, on_step=_nothing)
        return len(rows)

    bare_encoder = make_encoder(recipe.encoder, device, seed=0)
    batches = list(source.batches(rows, optimiser.batch_size, shuffle=0))
    adam = torch.optim.AdamW(bare_encoder.model.parameters(), lr=optimiser.learning_rate, fused=True)

    def bare() -> int:
        bare_encoder.model.train()
        for batch in batches:
            loss = _contrastive(bare_encoder, batch.pixels, batch.tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            adam.zero_grad(set_to_none=True)
        loss.item()
        return len(rows)

    def refilter() -> int:
        srem_filter(judge(encoder, source, rows, recipe.bank.size, neighbours=objective.neighbours), objective)
        return len(rows)

    fit()  # so that there are soft targets to learn from
    return FittingWays(fit, bare, refilter)


def _contrastive(encoder: DualEncoder, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    image, text = encoder.encode(pixels, tokens)
    logits = image @ text.T / encoder.temperature
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def _nothing(pairs: int, loss: float) -> None:
    pass
