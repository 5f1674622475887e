"""``fit``: cross-fitted SREM training, from shards to a RUN folder."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import noisyclean
from noisyclean.corpus.device_decoding import require_decoder
from noisyclean.corpus.index import CorpusIndex, index_corpus
from noisyclean.corpus.locate import ShardSpec, absolute_paths, find_shards
from noisyclean.corpus.parallel import default_workers
from noisyclean.corpus.source import PairSource, StreamSource, fits_in_memory
from noisyclean.device import choose_device
from noisyclean.encoders import DualEncoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import local_place, replacing
from noisyclean.progress import SILENT, Progress
from noisyclean.recipe import Recipe, load_recipe
from noisyclean.scoring.folds import FoldMap, sketch_pairs
from noisyclean.scoring.reference import MIN_BANK, ReferenceModel
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
from noisyclean.training.crossfit import CrossFit, make_encoders
from noisyclean.training.distributed import ALONE, World, joined_world, own_device
from noisyclean.training.frozen import EmbeddedPairs, FrozenEncoder, remove_embeddings
from noisyclean.training.log import MetricsLog
from noisyclean.training.sharing import SharedMemory, SharedStream

GPU_PAIRS = 500_000
"""With fewer pairs a ViT-B/32 from scratch would learn nothing."""
SMALL_PAIRS = 5_000


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

    In processes that ``torchrun`` has started, which must all call it alike, they train together. Where the corpus is
    kept in memory and pictures are not shifted, what comes of it is the same but for rounding, however many they are;
    else the order of the pairs, or their shifts, are others. The first writes RUN.

    Args:
        shards: the corpus; see :func:`noisyclean.corpus.locate.find_shards`.
        out: the RUN folder.
        recipe: a :class:`Recipe`, the name of one that comes with noisyclean, or a path; None: chosen for the corpus.
        overrides: ``key=value`` changes to a recipe given by name, path or None.
        device: a torch device; None: CUDA if there is one, else the CPU; CUDA without a number: one a process.
        progress: who is told how it goes.

    Raises:
        UsageError: the shards, the recipe or ``out`` cannot be what is meant.
        NoisycleanError: too few readable pairs, a shard that cannot be opened, or a diverged training.
        FailedElsewhereError: another process has failed first.
    """
    started = time.perf_counter()
    out = local_place(out)
    with joined_world() as world:
        if world.rank > 0:
            progress = SILENT
        place = own_device(choose_device(device), world)
        plan = world.once(partial(_plan, shards, out, recipe, overrides, place, world, progress))
        if isinstance(plan, RunRecord):
            return plan
        encoders = make_encoders(plan.recipe, place)
        source = open_source(plan.recipe, plan.index, encoders[0], out, progress=progress, world=world)
        crossfit = CrossFit(plan.recipe, source, place, encoders=encoders, progress=progress, world=world)
        _train(crossfit, out, plan)
        models = crossfit.freeze()
        return world.once(partial(_finish, out, plan, crossfit.folds, models, place, started))


@dataclass(frozen=True)
class _Plan:
    """What is to be done.

    Attributes:
        name: of the recipe, or the path it was read from.
        checkpoint: where the training leaves its state.
    """

    index: CorpusIndex
    recipe: Recipe
    name: str
    checkpoint: Checkpoint


def _plan(
    shards: ShardSpec,
    out: Path,
    recipe: Recipe | str | Path | None,
    overrides: Sequence[str],
    place: torch.device,
    world: World,
    progress: Progress,
) -> _Plan | RunRecord:
    """Look at all that was given, and begin RUN; what is there already, if it is complete."""
    found = find_shards(shards)
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
    if chosen.encoder.decode == "gpu":
        require_decoder(place)
    if chosen.optimiser.batch_size < world.size:
        raise UsageError(
            f"optimiser.batch_size is {chosen.optimiser.batch_size}, which {world.size} processes share: "
            "raise it, or start torchrun with fewer"
        )
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
    checkpoint.check()  # what is there may be of another recipe: said before the corpus is decoded
    if not (out / METRICS_FILE).is_file() and (out / RECIPE_FILE).is_file():
        raise UsageError(f"{out}: holds a {RECIPE_FILE} that no fit wrote; give another folder with -o")
    out.mkdir(parents=True, exist_ok=True)
    (out / METRICS_FILE).touch()  # first: it tells that a recipe is of a fit
    with replacing(out / RECIPE_FILE) as temporary:
        temporary.write_text(chosen.to_yaml(), encoding="utf-8")
    return _Plan(index, chosen, name, checkpoint)


def _finish(
    out: Path, plan: _Plan, folds: FoldMap, models: Sequence[ReferenceModel], place: torch.device, started: float
) -> RunRecord:
    """Write what the training has made, and declare RUN complete."""
    for fold, model in enumerate(models):
        model.save(fold_directory(out, fold))
    index, usable = plan.index, plan.index.usable
    write_folds(out, folds, sketch_pairs(index.caption[usable], index.image[usable]))
    record = RunRecord(
        shards=absolute_paths(index.shards),
        corpus=index.fingerprint(),
        recipe=plan.name,
        pairs=int(usable.sum()),
        folds=[model.fingerprint() for model in models],
        seconds=round(time.perf_counter() - started, 1),
        device=str(place),
        versions=_versions(),
        damaged_shards=index.damaged,
    )
    write_record(out, record)
    plan.checkpoint.remove()
    remove_embeddings(out)
    return record


def choose_recipe(pairs: int, device: torch.device) -> tuple[str, str]:
    """The recipe for a corpus of ``pairs`` pairs on ``device``, and why, in words."""
    if device.type == "cuda" and pairs >= GPU_PAIRS:
        return "gpu", f"a GPU and at least {GPU_PAIRS:,} pairs: a ViT-B/32 from scratch, at 224 px"
    why = f"a GPU, but under {GPU_PAIRS:,} pairs" if device.type == "cuda" else "no GPU"
    if pairs < SMALL_PAIRS:
        return "cpu-small", f"{why}, and under {SMALL_PAIRS:,} pairs: a tiny encoder from scratch, many epochs"
    return "cpu", f"{why}: a tiny encoder from scratch, at 64 px"


def _train(crossfit: CrossFit, out: Path, plan: _Plan) -> None:
    """Run all epochs, going on from the state that the checkpoint held, if there is one."""
    epochs, world = crossfit.recipe.optimiser.epochs, crossfit.world
    first = _resume(crossfit, plan.checkpoint)
    if first:
        crossfit.progress.say(f"going on after epoch {first} of {epochs}")
    metrics = out / METRICS_FILE
    world.once(partial(_forget_from, first, metrics))
    with (
        MetricsLog(metrics) if world.rank == 0 else nullcontext() as log,
        crossfit.progress.task("training", crossfit.pairs_to_come(first), "pairs") as task,
    ):
        for epoch in range(first, epochs):
            figures = crossfit.train_epoch(epoch, task)
            if log is not None:
                for k, row in enumerate(figures):
                    log.write(epoch, k, row)
            world.once(partial(plan.checkpoint.save, {"epoch": epoch, **crossfit.state_dict()}))


def _resume(crossfit: CrossFit, checkpoint: Checkpoint) -> int:
    """Bring back the state that the checkpoint holds, if there is one; returns how many epochs are done."""
    world = crossfit.world
    state = world.spread(checkpoint.load() if world.rank == 0 else None)
    if state is None:
        return 0
    crossfit.load_state_dict(state)
    return int(state["epoch"]) + 1


def open_source(
    recipe: Recipe,
    index: CorpusIndex,
    encoder: DualEncoder,
    out: Path,
    *,
    progress: Progress = SILENT,
    world: World = ALONE,
) -> PairSource:
    """The corpus as the model takes it, decoded once into memory where it fits, else streamed, as the recipe says.

    What a frozen encoder takes are embeddings, which are kept in ``out``. Each process of ``world`` has its part.
    """
    data = recipe.data
    stream = StreamSource(
        index,
        encoder.preprocessor,
        workers=max(default_workers() // world.local_size, 1) if data.workers is None else data.workers,
        shuffle_buffer=data.shuffle_buffer,
    )
    shared = stream if world.size == 1 else SharedStream(stream, world)
    if isinstance(encoder, FrozenEncoder):
        return EmbeddedPairs(shared, encoder.base, out, progress=progress, world=world)
    context = encoder.preprocessor.tokens([""]).shape[1]
    here = world.local_size / world.size
    # Of every machine that has a part of it: all must take the same way.
    fits = all(world.everyone(fits_in_memory(index, encoder.image_size, context, share=here)))
    if data.cache == "memory" or (data.cache == "auto" and fits):
        return SharedMemory(stream, world, progress=progress)
    return shared


def _forget_from(epoch: int, metrics: Path) -> None:
    """Drop the figures of epochs that come again: a killed fit may have logged one that it did not save."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < epoch]
    with replacing(metrics) as temporary:
        temporary.write_text("".join(whole), encoding="utf-8")


def _finished(out: Path, recipe: Recipe, corpus: str) -> RunRecord | None:
    if not (out / RUN_FILE).is_file():
        return None
    record = read_record(out)
    same_recipe = load_recipe(out / RECIPE_FILE) == recipe
    if record.corpus == corpus and same_recipe:
        return record
    what = "another recipe" if record.corpus == corpus else "other shards"
    raise UsageError(f"{out}: holds a model fitted with {what}; give another folder with -o, or remove this one")


def _versions() -> dict[str, str]:
    import open_clip

    return {
        "noisyclean": noisyclean.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }
