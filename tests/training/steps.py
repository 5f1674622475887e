"""Trains models step by step and writes down each step: the script that tests start with torchrun, or alone.

``steps.py PLAN OUT``: PLAN is JSON, name → [shards, [override, …]]. Training is as ``fit`` does it, but in float64, and
without clipping, which would hide how long a gradient is. OUT/NAME.pt has the loss of every step, how many pairs each
step of the last epoch had, and the gradients of the last two.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import deque
from pathlib import Path

import numpy as np
import open_clip
import torch

from noisyclean.corpus.index import index_corpus
from noisyclean.corpus.locate import find_shards
from noisyclean.recipe import load_recipe
from noisyclean.training.crossfit import make_encoders
from noisyclean.training.distributed import World, joined_world
from noisyclean.training.fit import open_source
from noisyclean.training.memory import EmbeddingMemory
from noisyclean.training.objectives import make_objective
from noisyclean.training.trainer import FoldTrainer


def main(plan: Path, out: Path) -> None:
    """Train what ``plan`` names."""
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]  # encoders make float32 of all they take
    torch.set_default_dtype(torch.float64)
    open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)
    for config in ("pico.json", "pico-vit.json"):
        open_clip.add_model_config(Path(__file__).parents[1] / config)
    with joined_world() as world:
        for name, (shards, overrides) in json.loads(plan.read_text()).items():
            steps = train(shards, overrides, world)
            if world.rank == 0:
                torch.save(steps, out / f"{name}.pt")


def train(shards: str, overrides: list[str], world: World) -> dict[str, object]:
    """Train one model."""
    recipe = load_recipe(None, ["optimiser.gradient_clip=1e9", "data.workers=0", "folds=1", *overrides])
    index = index_corpus(find_shards(shards), workers=1)
    encoder = make_encoders(recipe, torch.device("cpu"))[0]
    encoder.model.double()
    source = open_source(recipe, index, encoder, Path(), world=world)
    rows = np.flatnonzero(index.usable)
    objective = make_objective(recipe.objective, len(index))
    trainer = FoldTrainer(encoder, recipe.optimiser, objective, EmbeddingMemory(rows), world=world)
    pairs: list[int] = []
    losses: list[float] = []
    gradients: deque[dict[str, torch.Tensor]] = deque(maxlen=2)

    def keep(*_: object) -> None:
        named = encoder.model.named_parameters()
        gradients.append({name: one.grad.clone() for name, one in named if one.grad is not None})

    def on_step(count: int, loss: float) -> None:
        pairs.append(count)
        losses.append(loss)

    trainer.optimiser.register_step_pre_hook(keep)
    weights = torch.linspace(0, 1, len(index))
    for epoch in range(recipe.optimiser.epochs):
        pairs.clear()
        trainer.train_epoch(source, rows, weights, epoch=epoch, seed=epoch, on_step=on_step)
    return {"pairs": pairs, "losses": losses, "gradients": list(gradients)}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
