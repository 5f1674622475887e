"""Training one fold's model: the optimiser, its schedule and one epoch of steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from noisyclean.corpus.source import Batch, PairSource
from noisyclean.device import choose_dtype
from noisyclean.encoders import DualEncoder
from noisyclean.errors import NoisycleanError
from noisyclean.recipe import OptimiserRecipe
from noisyclean.srem import agreement, weighted_contrastive_loss
from noisyclean.training.distributed import ALONE, Parts, World, share_batch_norm
from noisyclean.training.memory import EmbeddingMemory
from noisyclean.training.objectives import Objective, Step

MAX_LOGIT_SCALE = math.log(100)
"""open_clip's own bound: τ never falls below 0.01."""


class FoldTrainer:
    """One fold's encoder with its optimiser; steps through epochs of the pairs it may see.

    In a training of several processes each has one, and all of these stay equal.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        optimiser: OptimiserRecipe,
        objective: Objective,
        memory: EmbeddingMemory | None = None,
        *,
        world: World = ALONE,
    ) -> None:
        """Take over ``encoder``.

        Args:
            memory: the teacher of soft targets; None: there are none.
            world: the processes of this training.

        Raises:
            UsageError: an encoder that several processes cannot train.
        """
        share_batch_norm(encoder.model, world)
        self.world = world
        self.encoder = encoder
        self.recipe = optimiser
        self.objective = objective
        self.memory = memory
        self.progress = 0.0
        """The share of the whole training that is done, over which the learning rate runs its course."""
        self.optimiser = torch.optim.AdamW(
            _parameter_groups(encoder.model, optimiser.weight_decay), lr=optimiser.learning_rate, fused=True
        )
        encoder.dtype = choose_dtype(optimiser.precision, encoder.device)
        # Only float16 can overflow or vanish; bfloat16 has float32's range.
        self.scaler = torch.amp.GradScaler(encoder.device.type, enabled=encoder.dtype is torch.float16)

    @property
    def learning_rate(self) -> float:
        """The learning rate now: linear warm-up, then half a cosine down to zero."""
        peak, warmup = self.recipe.learning_rate, self.recipe.warmup
        if self.progress < warmup:
            return peak * self.progress / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (self.progress - warmup) / (1 - warmup)))

    def train_epoch(
        self,
        source: PairSource,
        rows: NDArray[np.int64],
        weights: Tensor | None,
        *,
        epoch: int,
        seed: int,
        on_step: Callable[[int, float], None],
    ) -> dict[str, float]:
        """One pass over ``rows`` in an order drawn from ``seed``.

        Args:
            epoch: which of the recipe's epochs, from 0.
            weights: (N,) float32 over the whole index, how clean each pair is held to be; None: all count as clean.
            on_step: called after each step with its number of pairs and its loss.

        Returns:
            Means over the steps, of the objective's terms and the gradient's norm.

        Raises:
            NoisycleanError: the loss is no longer finite.
        """
        self.encoder.model.train()
        generator = torch.Generator().manual_seed(seed + self.world.rank)
        totals: Counter[str] = Counter()
        steps = seen = 0
        batches = source.batches(rows, self.recipe.batch_size, shuffle=seed)
        for batch, parts in self.world.in_step(batches):
            # A handful of left-over pairs would be a classification among too few; they have their turn next epoch.
            if parts.total < self.recipe.batch_size // 2 and steps:
                continue
            seen += parts.total
            self.progress = min((epoch + seen / len(rows)) / self.recipe.epochs, 1.0)
            figures = self._step(shift_pictures(batch, self.recipe.shift, generator), parts, weights, epoch)
            if not math.isfinite(figures["loss"]):
                raise NoisycleanError(
                    f"the loss became {figures['loss']} in epoch {epoch + 1}; lower optimiser.learning_rate and fit "
                    "again"
                )
            totals.update(figures)
            steps += 1
            on_step(parts.total, figures["loss"])
        return {name: total / steps for name, total in totals.items()}

    def _step(self, batch: Batch, parts: Parts, weights: Tensor | None, epoch: int) -> dict[str, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        rows = self.world.gather(batch.rows, parts)
        image, text, similarity = self.world.embed(self.encoder, batch, parts)
        taught = None
        if self.memory is not None:
            taught = self.memory.similarity(rows, parts.own, similarity.gather)
            self.memory.remember(rows, image, text)
        terms = self.objective.terms(
            Step(
                similarity=similarity,
                temperature=self.encoder.temperature,
                rows=rows,
                weights=None if weights is None else weights[rows].to(image.device),
                taught=None if taught is None else taught.map(lambda cosines: cosines.to(image.device)),
                epoch=epoch,
                progress=self.progress,
            )
        )
        self.scaler.scale(terms["loss"]).backward()  # type: ignore[no-untyped-call]
        self.world.average_gradients(self.encoder.model.parameters())
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.encoder.model.parameters(), self.recipe.gradient_clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.encoder.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)  # type: ignore[operator]
        return {**{name: term.item() for name, term in terms.items()}, "gradient_norm": norm.item()}

    def hold_out(self, source: PairSource, rows: NDArray[np.int64]) -> dict[str, float]:
        """How pairs that no model trains on, noise and all, are told apart; nothing if there are not even two.

        Figures of equal batches compare; what is left over after whole batches is left out.

        Returns:
            ``holdout_loss``, the mean InfoNCE; ``holdout_recall_at_1``, the share of pictures that find their caption,
            and of captions that find their picture, of all in the batch; ``holdout_candidates``, how many these are.
        """
        width = min(self.recipe.batch_size, len(rows))
        if width < 2:
            return {}
        losses: list[float] = []
        found: list[float] = []
        with self.encoder.inference():
            for batch, parts in self.world.in_step(source.batches(rows, width)):
                if parts.total == width:
                    *_, similarity = self.world.embed(self.encoder, batch, parts)
                    losses.append(weighted_contrastive_loss(similarity / self.encoder.temperature).item())
                    found.append(torch.stack(agreement(similarity)).float().mean().item())
        if not losses:
            return {}
        return {
            "holdout_loss": float(np.mean(losses)),
            "holdout_recall_at_1": float(np.mean(found)),
            "holdout_candidates": width,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs, tensors and numbers only."""
        return {
            "model": self.encoder.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "objective": self.objective.state,
            "memory": {} if self.memory is None else self.memory.state,
            "progress": self.progress,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.encoder.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.objective.state.update(state["objective"])
        if self.memory is not None:
            self.memory.state = state["memory"]
        self.progress = state["progress"]


def shift_pictures(batch: Batch, pixels: int, generator: torch.Generator) -> Batch:
    """Move each picture by up to ``pixels`` in either direction, its edge repeated: a mild augmentation."""
    if pixels == 0 or not len(batch):
        return batch
    count, height, width, _ = batch.pixels.shape
    down, right = torch.randint(-pixels, pixels + 1, (2, count, 1), generator=generator)
    y = (torch.arange(height) + down).clamp_(0, height - 1)
    x = (torch.arange(width) + right).clamp_(0, width - 1)
    moved = batch.pixels[torch.arange(count)[:, None, None], y[:, :, None], x[:, None, :]]
    return Batch(batch.rows, moved, batch.tokens)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    # As open_clip trains: gains, biases and the temperature are not decayed.
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if parameter.ndim >= 2 and "logit_scale" not in name]
    others = [parameter for name, parameter in named if parameter.ndim < 2 or "logit_scale" in name]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
