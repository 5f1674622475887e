"""``fit``: cross-fitted SREM training, from shards to a RUN folder."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import noisyclean
from noisyclean.calibration import NoiseRate
from noisyclean.corpus.index import CorpusIndex, index_corpus
from noisyclean.corpus.locate import Shard, ShardSpec, find_shards
from noisyclean.corpus.parallel import default_workers
from noisyclean.corpus.source import MemorySource, PairSource, StreamSource, fits_in_memory
from noisyclean.device import choose_device
from noisyclean.encoders import DualEncoder, create_encoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.progress import SILENT, Progress, Task
from noisyclean.recipe import Recipe, load_recipe
from noisyclean.scoring.folds import FoldMap, assign_folds
from noisyclean.scoring.reference import MIN_BANK, ReferenceModel, build_bank
from noisyclean.scoring.run import (
    DEFAULT_RUN,
    METRICS_FILE,
    RECIPE_FILE,
    RUN_FILE,
    RunRecord,
    fold_directory,
    read_record,
    write_folds,
    write_record,
)
from noisyclean.training.checkpoint import Checkpoint
from noisyclean.training.filtration import refilter
from noisyclean.training.log import MetricsLog
from noisyclean.training.trainer import FoldTrainer

GPU_PAIRS = 500_000
"""With fewer pairs a ViT-B/32 from scratch would learn nothing."""
SMALL_PAIRS = 5_000
SCRATCH_TEMPERATURE = 0.05


def fit(
    shards: ShardSpec,
    *,
    out: Path | str = DEFAULT_RUN,
    recipe: Recipe | str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    progress: Progress = SILENT,
) -> RunRecord:
    """Train encoders with SREM on noisy pairs, cross-fitted, and freeze what ``score`` needs.

    The pairs are split into folds, and fold k's model trains on the pairs of all other folds. After the warm-up the
    weight of a pair in each epoch is the match probability that the model of its own fold, which never trains on it,
    gives it. At the end each model's reference bank and null are drawn from its own fold.

    An interrupted fit goes on from its last epoch when it is called again with the same arguments.

    Args:
        shards: the corpus; see :func:`noisyclean.corpus.locate.find_shards`.
        out: the RUN folder.
        recipe: a :class:`Recipe`, the name of one that comes with noisyclean, or a path; None: chosen for the corpus.
        overrides: ``key=value`` changes to a recipe given by name, path or None.
        device: a torch device; None: CUDA if there is one, else the CPU.
        progress: who is told how it goes.

    Raises:
        UsageError: the shards, the recipe or ``out`` cannot be what is meant.
        NoisycleanError: too few readable pairs, a shard that cannot be opened, or a diverged training.
    """
    started = time.perf_counter()
    out = Path(out)
    found = find_shards(shards)
    place = choose_device(device)
    if not isinstance(recipe, Recipe):
        load_recipe(recipe, overrides)  # a mistake in it is told before the corpus is read
    index = index_corpus(found, workers=default_workers(), progress=progress)
    pairs = int(index.usable.sum())
    progress.say(f"{pairs:,} of {len(index):,} samples are image–text pairs, in {len(found):,} shards")
    if isinstance(recipe, Recipe):
        chosen, name = recipe, "given"
    elif recipe is None:
        name, why = choose_recipe(pairs, place)
        chosen = load_recipe(name, overrides)
        progress.say(f"recipe {name}: {why}")
    else:
        chosen, name = load_recipe(recipe, overrides), str(recipe)
    if pairs < MIN_BANK * chosen.folds * 2:
        raise NoisycleanError(
            f"{pairs} image–text pairs in {found[0].path} and the other {len(found) - 1} shards: too few to fit; "
            f"`noisyclean inspect` says what is in them"
        )

    corpus = index.fingerprint()
    if (record := _finished(out, chosen, corpus)) is not None:
        progress.say(f"{out} is already fitted with this recipe to these shards")
        return record
    checkpoint = Checkpoint(out, key=f"{corpus} {chosen.model_dump_json()}")
    state = checkpoint.load()  # what is there may be of another recipe: said before the corpus is decoded
    if not (out / METRICS_FILE).is_file() and (out / RECIPE_FILE).is_file():
        raise UsageError(f"{out}: holds a {RECIPE_FILE} that no fit wrote; give another folder with -o")
    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE_FILE).write_text(chosen.to_yaml(), encoding="utf-8")
    (out / METRICS_FILE).touch()

    fit_ = _CrossFit(chosen, index, place, progress)
    fit_.train(out, checkpoint, state)
    models = fit_.freeze()
    for fold, model in enumerate(models):
        model.save(fold_directory(out, fold))
    write_folds(out, fit_.folds)
    record = RunRecord(
        shards=_absolute(found),
        corpus=corpus,
        recipe=name,
        pairs=pairs,
        folds=[model.fingerprint() for model in models],
        seconds=round(time.perf_counter() - started, 1),
        device=str(place),
        versions=_versions(),
        damaged_shards=index.damaged,
    )
    write_record(out, record)
    checkpoint.remove()
    return record


def choose_recipe(pairs: int, device: torch.device) -> tuple[str, str]:
    """The recipe for a corpus of ``pairs`` pairs on ``device``, and why, in words."""
    if device.type == "cuda" and pairs >= GPU_PAIRS:
        return "gpu", f"a GPU and at least {GPU_PAIRS:,} pairs: a ViT-B/32 from scratch, at 224 px"
    why = f"a GPU, but under {GPU_PAIRS:,} pairs" if device.type == "cuda" else "no GPU"
    if pairs < SMALL_PAIRS:
        return "cpu-small", f"{why}, and under {SMALL_PAIRS:,} pairs: a tiny encoder from scratch, many epochs"
    return "cpu", f"{why}: a tiny encoder from scratch, at 64 px"


class _CrossFit:
    """K models, each training on all folds but its own and judging the pairs of its own."""

    def __init__(self, recipe: Recipe, index: CorpusIndex, device: torch.device, progress: Progress) -> None:
        self.recipe = recipe
        self.index = index
        self.progress = progress
        usable = np.flatnonzero(index.usable)
        self.folds: FoldMap = assign_folds(index.caption[usable], index.image[usable], recipe.folds)
        fold = self.folds.fold_of(index.caption)
        held_out = _holdout(index.caption, recipe.data.holdout)
        # Judged by model k (its own fold) and trained on by model k (all others).
        self.judged = [usable[fold[usable] == k] for k in range(recipe.folds)]
        self.trained = [usable[(fold[usable] != k) & ~held_out[usable]] for k in range(recipe.folds)]
        self.held_out = usable[held_out[usable]]
        if min(map(len, self.judged)) < MIN_BANK:
            raise NoisycleanError("almost all pairs share one caption or picture: no two folds can be made of them")
        encoders = [self._new_encoder(device) for _ in range(recipe.folds)]
        self.source = self._open_source(encoders[0])
        self.trainers = [FoldTrainer(encoder, recipe.optimiser, recipe.objective) for encoder in encoders]
        # None during the warm-up, when all pairs count as clean.
        self.weights: torch.Tensor | None = None

    def train(self, out: Path, checkpoint: Checkpoint, state: dict[str, Any] | None) -> None:
        """Run all epochs, going on from ``state``, which the checkpoint held, if there is one."""
        epochs = self.recipe.optimiser.epochs
        first = 0
        if state is not None:
            first = state["epoch"] + 1
            self.weights = state["weights"]
            for trainer, trainer_state in zip(self.trainers, state["trainers"], strict=True):
                trainer.load_state_dict(trainer_state)
            self.progress.say(f"going on after epoch {first} of {epochs}")
        else:
            (out / METRICS_FILE).unlink(missing_ok=True)
        per_epoch = sum(map(len, self.trained))
        filters = sum(self._refilters_after(epoch) for epoch in range(first, epochs))
        total = (epochs - first) * per_epoch + filters * sum(map(len, self.judged))
        with (
            MetricsLog(out / METRICS_FILE) as log,
            self.progress.task("training", total, "pairs") as task,
        ):
            for epoch in range(first, epochs):
                figures = [self._train_fold(epoch, k, task) for k in range(self.recipe.folds)]
                if self._refilters_after(epoch):
                    for k, noise in enumerate(self._refilter(task)):
                        figures[k] |= {
                            "estimated_noise": noise.estimate,
                            "noise_low": noise.low,
                            "noise_high": noise.high,
                        }
                for k, row in enumerate(figures):
                    log.write(epoch, k, row)
                checkpoint.save(
                    {
                        "epoch": epoch,
                        "weights": self.weights,
                        "trainers": [trainer.state_dict() for trainer in self.trainers],
                    }
                )

    def freeze(self) -> list[ReferenceModel]:
        """Each model with a bank and null of pairs it never saw."""
        return [
            ReferenceModel(
                trainer.encoder,
                build_bank(trainer.encoder, self.source, rows, self.recipe.bank.size, progress=self.progress),
            )
            for trainer, rows in zip(self.trainers, self.judged, strict=True)
        ]

    def _train_fold(self, epoch: int, fold: int, task: Task) -> dict[str, float | None]:
        trainer, rows = self.trainers[fold], self.trained[fold]
        epochs = self.recipe.optimiser.epochs

        def on_step(pairs: int, loss: float) -> None:
            task.advance(pairs, f"epoch {epoch + 1}/{epochs}, fold {fold}, loss {loss:.3f}")

        started = time.perf_counter()
        means = trainer.train_epoch(
            self.source,
            rows,
            self.weights,
            epoch=epoch,
            seed=(self.recipe.seed * 1_000_003 + epoch) * self.recipe.folds + fold,
            on_step=on_step,
        )
        seconds = time.perf_counter() - started
        return {
            "loss": means.loss,
            "contrastive": means.contrastive,
            "complementary": means.complementary,
            "gradient_norm": means.gradient_norm,
            "holdout_loss": trainer.holdout_loss(self.source, self.held_out),
            "temperature": trainer.encoder.temperature.item(),
            "learning_rate": trainer.learning_rate,
            "mean_weight": 1.0 if self.weights is None else self.weights[torch.from_numpy(rows)].mean().item(),
            "seconds": round(seconds, 3),
            "pairs_per_second": round(len(rows) / seconds, 1),
        }

    def _refilters_after(self, epoch: int) -> bool:
        # After the last epoch the weights would be of no use.
        return self.recipe.objective.warmup_epochs - 1 <= epoch < self.recipe.optimiser.epochs - 1

    def _refilter(self, task: Task) -> list[NoiseRate]:
        # What cannot be decoded is in no batch; its weight is never read.
        weights = torch.zeros(len(self.index))
        rates = []
        for trainer, rows in zip(self.trainers, self.judged, strict=True):
            judged = refilter(trainer.encoder, self.source, rows, self.recipe.bank.size, on_batch=task.advance)
            weights[torch.from_numpy(judged.rows)] = torch.from_numpy(judged.probability)
            rates.append(judged.noise)
        self.weights = weights
        return rates

    def _new_encoder(self, device: torch.device) -> DualEncoder:
        # Every fold starts from the same weights, so that folds differ by their data alone.
        torch.manual_seed(self.recipe.seed)
        wanted = self.recipe.encoder
        temperature = wanted.temperature
        if temperature is None and wanted.pretrained is None and ":" not in wanted.name:
            temperature = SCRATCH_TEMPERATURE
        return create_encoder(
            wanted.name,
            wanted.pretrained,
            image_size=wanted.image_size,
            context_length=wanted.context_length,
            temperature=temperature,
        ).to(device)

    def _open_source(self, encoder: DualEncoder) -> PairSource:
        data = self.recipe.data
        stream = StreamSource(
            self.index,
            encoder.preprocessor,
            workers=default_workers() if data.workers is None else data.workers,
            shuffle_buffer=data.shuffle_buffer,
        )
        context = encoder.preprocessor.tokens([""]).shape[1]
        cached = data.cache == "memory" or (
            data.cache == "auto" and fits_in_memory(self.index, encoder.image_size, context)
        )
        return MemorySource(stream, progress=self.progress) if cached else stream


def _holdout(caption: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    # By the upper half of the hash: folds go by its remainder, and the two must not depend on each other.
    return (caption.view(np.uint64) >> np.uint64(32)) % np.uint64(10_000) < np.uint64(round(share * 10_000))


def _finished(out: Path, recipe: Recipe, corpus: str) -> RunRecord | None:
    if not (out / RUN_FILE).is_file():
        return None
    record = read_record(out)
    same_recipe = load_recipe(out / RECIPE_FILE) == recipe
    if record.corpus == corpus and same_recipe:
        return record
    what = "another recipe" if record.corpus == corpus else "other shards"
    raise UsageError(f"{out}: holds a model fitted with {what}; give another folder with -o, or remove this one")


def _absolute(shards: Sequence[Shard]) -> list[str]:
    return [shard.path if "://" in shard.path else str(Path(shard.path).absolute()) for shard in shards]


def _versions() -> dict[str, str]:
    import open_clip

    return {
        "noisyclean": noisyclean.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }
