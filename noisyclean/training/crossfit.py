"""Cross-fitting: K folds of the pairs, and for each a model that trains on all the others and judges its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.corpus.source import PairSource
from noisyclean.encoders import DualEncoder, create_encoder
from noisyclean.errors import NoisycleanError
from noisyclean.progress import SILENT, Progress, Task
from noisyclean.recipe import EncoderRecipe, NcrObjective, Recipe, SremObjective
from noisyclean.scoring.folds import FoldMap, assign_folds
from noisyclean.scoring.reference import MIN_BANK, ReferenceModel, build_bank
from noisyclean.training.distributed import ALONE, World
from noisyclean.training.filtration import FOLD_BANK_SHARE, Filtered, fold_bank_size, judge, ncr_filter, srem_filter
from noisyclean.training.frozen import FrozenEncoder
from noisyclean.training.memory import EmbeddingMemory
from noisyclean.training.objectives import make_objective
from noisyclean.training.trainer import FoldTrainer

SCRATCH_TEMPERATURE = 0.05


@dataclass
class _Student:
    """One model in training.

    Attributes:
        fold: the fold it never trains on.
        trained: (R,) int64 rows it trains on.
        weights: (N,) over the index, how clean each pair is held to be; None during the warm-up.
    """

    trainer: FoldTrainer
    fold: int
    trained: NDArray[np.int64]
    weights: Tensor | None = None


class CrossFit:
    """K folds in training. After each epoch the pairs are filtered anew, by default each by its own fold's model.

    Attributes:
        folds: which caption is in which fold.
        judged: K arrays of rows: those of each fold, which its model never trains on; with a single fold it does on
            all but the hold-out.
        held_out: rows that no model trains on.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: PairSource,
        device: torch.device,
        *,
        rows: NDArray[np.int64] | None = None,
        trainable: NDArray[np.int64] | None = None,
        encoders: Sequence[DualEncoder] | None = None,
        progress: Progress = SILENT,
        world: World = ALONE,
    ) -> None:
        """Divide the pairs and make the models; equal recipes start from equal weights.

        Args:
            source: where the pairs come from, prepared for the recipe's encoder.
            rows: the rows of the index that take part; None: all that are usable.
            trainable: of these, the rows that may be trained on; None: all. (An oracle trains on true pairs only.)
            encoders: models of the recipe's making; None: made here.
            progress: who is told how it goes.
            world: the processes of this training; ``source`` gives each its part of the pairs.

        Raises:
            NoisycleanError: no two folds can be made.
            UsageError: an encoder that several processes cannot train.
        """
        self.recipe = recipe
        self.source = source
        self.progress = progress
        self.world = world
        index = source.index
        rows = np.flatnonzero(index.usable) if rows is None else rows
        self.folds: FoldMap = assign_folds(
            index.caption[rows], index.image[rows], recipe.folds, holdout=recipe.data.holdout
        )
        fold = self.folds.fold_of(index.caption)
        held_out = self.folds.is_held_out(index.caption)
        may_train = ~held_out
        if trainable is not None:
            may_train &= np.isin(np.arange(len(index)), trainable)
        self.judged = [rows[fold[rows] == k] for k in range(recipe.folds)]
        self.held_out = rows[held_out[rows]]
        if min(map(len, self.judged)) < MIN_BANK:
            raise NoisycleanError("almost all pairs share one caption or picture: no two folds can be made of them")
        if recipe.folds == 1 and len(self.held_out) < MIN_BANK / FOLD_BANK_SHARE:
            raise NoisycleanError(
                f"{len(self.held_out)} pairs are held out, too few to be a single fold's reference; "
                "raise data.holdout, or cross-fit (folds 2)"
            )
        objective = recipe.objective
        peers = 2 if isinstance(objective, NcrObjective) and objective.co_teaching else 1
        remembers = isinstance(objective, SremObjective) and objective.soft_targets > 0
        self._students = []
        for peer in range(peers):
            made = encoders if encoders and not peer else make_encoders(recipe, device, seed=recipe.seed + peer)
            for k, encoder in enumerate(made):
                own = (fold[rows] == k) & (recipe.folds > 1)
                trained = rows[~own & may_train[rows]]
                trainer = FoldTrainer(
                    encoder,
                    recipe.optimiser,
                    make_objective(objective, len(index)),
                    EmbeddingMemory(trained) if remembers else None,
                    world=world,
                )
                self._students.append(_Student(trainer, k, trained))

    @property
    def encoders(self) -> list[DualEncoder]:
        """The models that score, one a fold; the k-th never trains on ``judged[k]``."""
        return [student.trainer.encoder for student in self._students[: self.recipe.folds]]

    @property
    def weights(self) -> list[tuple[NDArray[np.int64], Tensor | None]]:
        """For each scoring model, the rows it trains on and the (N,) weights over the index; None: all count alike."""
        return [(student.trained, student.weights) for student in self._students[: self.recipe.folds]]

    def pairs_to_come(self, epoch: int) -> int:
        """How many pairs pass through a model from this epoch on, in training and in filtering."""
        epochs = self.recipe.optimiser.epochs
        trained = sum(len(student.trained) for student in self._students)
        filtered = sum(map(len, self.judged)) if self._judges_out_of_fold() else trained
        filters = sum(self._filters_after(one) for one in range(epoch, epochs))
        return (epochs - epoch) * trained + filters * filtered

    def train_epoch(self, epoch: int, task: Task) -> list[dict[str, Any]]:
        """Train every model for one epoch, then filter.

        Returns:
            Figures of each scoring model.
        """
        figures = [self._train(student, epoch, task) for student in self._students]
        if self._filters_after(epoch):
            started = time.perf_counter()
            for row, one in zip(figures, self._filter(epoch, task.advance), strict=False):
                if one.noise is not None:
                    row |= {
                        "estimated_noise": one.noise.estimate,
                        "noise_low": one.noise.low,
                        "noise_high": one.noise.high,
                    }
            figures[0]["filter_seconds"] = round(time.perf_counter() - started, 3)
        return figures[: self.recipe.folds]

    def freeze(self) -> list[ReferenceModel]:
        """Each model with a bank and null of pairs it never saw: its fold, or the hold-out where there is but one."""
        models = []
        never_seen = self.judged if self.recipe.folds > 1 else [self.held_out]
        for encoder, rows in zip(self.encoders, never_seen, strict=True):
            size = fold_bank_size(self.recipe.bank.size, len(rows))
            bank = build_bank(encoder, self.source, rows, size, progress=self.progress, joined=self.world.joined)
            models.append(ReferenceModel(encoder, bank))
        return models

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs."""
        return {
            "weights": [student.weights for student in self._students],
            "trainers": [student.trainer.state_dict() for student in self._students],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for student, weights, trainer in zip(self._students, state["weights"], state["trainers"], strict=True):
            student.weights = weights
            student.trainer.load_state_dict(trainer)

    def _train(self, student: _Student, epoch: int, task: Task) -> dict[str, Any]:
        trainer, rows, epochs = student.trainer, student.trained, self.recipe.optimiser.epochs

        def on_step(pairs: int, loss: float) -> None:
            task.advance(pairs, f"epoch {epoch + 1}/{epochs}, fold {student.fold}, loss {loss:.3f}")

        started = time.perf_counter()
        means = trainer.train_epoch(
            self.source,
            rows,
            student.weights,
            epoch=epoch,
            seed=(self.recipe.seed * 1_000_003 + epoch) * self.recipe.folds + student.fold,
            on_step=on_step,
        )
        seconds = time.perf_counter() - started
        weights = student.weights
        return {
            **means,
            **trainer.hold_out(self.source, self.held_out),
            "temperature": trainer.encoder.temperature.item(),
            "learning_rate": trainer.learning_rate,
            "mean_weight": 1.0 if weights is None else weights[torch.from_numpy(rows)].mean().item(),
            "seconds": round(seconds, 3),
            "pairs_per_second": round(len(rows) / seconds, 1),
        }

    def _filters_after(self, epoch: int) -> bool:
        objective = self.recipe.objective
        if not isinstance(objective, SremObjective | NcrObjective):
            return False
        # After the last epoch the weights would be of no use.
        return objective.warmup_epochs - 1 <= epoch < self.recipe.optimiser.epochs - 1

    def _judges_out_of_fold(self) -> bool:
        objective = self.recipe.objective
        return isinstance(objective, SremObjective) and objective.judge == "out-of-fold" and self.recipe.folds > 1

    def _filter(self, epoch: int, on_batch: Callable[[int], None]) -> list[Filtered]:
        """Weigh the pairs for the next epoch; what the models said, one by one."""
        objective = self.recipe.objective
        size = self.recipe.bank.size
        if isinstance(objective, NcrObjective):
            found = [
                ncr_filter(
                    student.trainer.encoder,
                    self.source,
                    student.trained,
                    self.recipe.optimiser.batch_size,
                    objective,
                    seed=self.recipe.seed * 1_000_003 + epoch,
                    on_batch=on_batch,
                    world=self.world,
                )
                for student in self._students
            ]
            # With peers, each learns what the other selects.
            selected = found[self.recipe.folds :] + found[: self.recipe.folds]
        else:
            assert isinstance(objective, SremObjective)
            out_of_fold = self._judges_out_of_fold()
            found = [
                srem_filter(
                    judge(
                        student.trainer.encoder,
                        self.source,
                        rows if out_of_fold else student.trained,
                        size,
                        neighbours=objective.neighbours if objective.threshold in ("posterior", "q_value") else 0,
                        on_batch=on_batch,
                        world=self.world,
                    ),
                    objective,
                )
                for student, rows in zip(self._students, self.judged, strict=True)
            ]
            if out_of_fold:
                weights = self._spread(found)
                for student in self._students:
                    student.weights = weights
                return found
            selected = found
        for student, one in zip(self._students, selected, strict=True):
            student.weights = self._spread([one])
        return found

    def _spread(self, parts: list[Filtered]) -> Tensor:
        # What cannot be decoded is in no batch; its weight is never read.
        weights = torch.zeros(len(self.source.index))
        for part in parts:
            weights[torch.from_numpy(part.rows)] = torch.from_numpy(part.weight)
        return weights


def make_encoders(recipe: Recipe, device: torch.device, *, seed: int | None = None) -> Sequence[DualEncoder]:
    """The models of a recipe, one a fold, all with the same weights, so that folds differ by their data alone.

    Raises:
        UsageError: a model cannot be loaded, or not be trained as the recipe has it.
    """
    seed = recipe.seed if seed is None else seed
    if recipe.encoder.frozen:
        base = make_encoder(recipe.encoder, device, seed=seed)
        return [FrozenEncoder(base) for _ in range(recipe.folds)]
    return [make_encoder(recipe.encoder, device, seed=seed) for _ in range(recipe.folds)]


def make_encoder(wanted: EncoderRecipe, device: torch.device, *, seed: int) -> DualEncoder:
    """One model; what weights are not loaded are drawn from ``seed``."""
    temperature = wanted.temperature
    if temperature is None and wanted.pretrained is None and ":" not in wanted.name:
        temperature = SCRATCH_TEMPERATURE
    torch.manual_seed(seed)
    encoder = create_encoder(
        wanted.name,
        wanted.pretrained,
        image_size=wanted.image_size,
        context_length=wanted.context_length,
        temperature=temperature,
    ).to(device)
    encoder.decode_as(wanted.decode)
    return encoder
