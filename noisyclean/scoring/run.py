"""RUN: the folder that ``fit`` writes and ``score`` reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from noisyclean.encoders import CONFIG_FILE
from noisyclean.errors import UsageError
from noisyclean.files import replacing, write_json
from noisyclean.scoring.folds import FoldMap
from noisyclean.scoring.reference import ReferenceModel

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
FOLDS_FILE = "folds.safetensors"
DEFAULT_RUN = Path("noisyclean-run")


@dataclass(frozen=True)
class RunRecord:
    """``run.json``: what was fitted, and how it went. It is written last: its presence means the run is complete.

    Attributes:
        shards: the SHARDS that were given, absolute where local, so that ``score`` can find them again.
        corpus: fingerprint of the pairs.
        recipe: the recipe's name, or the path it was read from.
        pairs: usable pairs in the corpus.
        folds: fingerprint of each fold's model.
        seconds: time of the whole fit.
        device: where it ran.
        versions: of noisyclean and of what computes.
    """

    shards: list[str]
    corpus: str
    recipe: str
    pairs: int
    folds: list[str]
    seconds: float
    device: str
    versions: dict[str, str]
    damaged_shards: dict[str, str]


def is_run(model: str | Path) -> bool:
    """Whether ``model`` is meant to be a RUN: the default one, or a folder that is no open_clip model."""
    path = Path(model)
    return path == DEFAULT_RUN or (path.is_dir() and not (path / CONFIG_FILE).is_file())


def fold_directory(run: Path, fold: int) -> Path:
    """Where fold ``fold`` of RUN lies."""
    return run / f"fold-{fold}"


def write_folds(run: Path, folds: FoldMap, sketch: NDArray[np.uint64]) -> None:
    """Write the caption → fold map, and the sketch of the pairs that were fitted."""
    tensors = {
        "captions": folds.captions,
        "exceptions": folds.exceptions,
        "folds": np.array([folds.folds]),
        "holdout": np.array([folds.holdout]),
        "sketch": sketch.view(np.int64),  # safetensors' uint64 is not for every reader
    }
    with replacing(run / FOLDS_FILE) as temporary:
        save_file(tensors, temporary)


def write_record(run: Path, record: RunRecord) -> None:
    """Declare RUN complete."""
    write_json(run / RUN_FILE, asdict(record))


def read_record(run: Path) -> RunRecord:
    """Read ``run.json``.

    Raises:
        UsageError: the folder is no complete run.
    """
    path = run / RUN_FILE
    if not run.is_dir():
        raise UsageError(f"{run}: no such run; `noisyclean fit SHARDS -o {run}` makes one")
    if not path.is_file():
        unfinished = (run / RECIPE_FILE).is_file()
        remedy = "repeat the `noisyclean fit` command to finish it" if unfinished else "name a folder that `fit` wrote"
        raise UsageError(f"{run}: {'an unfinished run' if unfinished else 'not a run'} (no {RUN_FILE}); {remedy}")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: not a run record that this version of noisyclean can read ({error})") from error


@dataclass(frozen=True)
class Run:
    """What ``score`` needs of a complete RUN.

    Attributes:
        shards: where those lie that it was fitted to.
        models: one per fold.
        folds: which of them scores a pair.
        sketch: of the pairs that were fitted; see :func:`noisyclean.scoring.folds.sketch_pairs`.
    """

    shards: list[str]
    models: list[ReferenceModel]
    folds: FoldMap
    sketch: NDArray[np.uint64]


def load_run(run: Path) -> Run:
    """Read a complete run.

    Raises:
        UsageError: the folder is no complete run, or a part of it is missing or broken.
    """
    record = read_record(run)
    try:
        tensors = load_file(run / FOLDS_FILE)
        folds = FoldMap(
            int(tensors["folds"][0]), tensors["captions"], tensors["exceptions"], float(tensors["holdout"][0])
        )
        sketch = tensors["sketch"].view(np.uint64)
    except (OSError, SafetensorError, KeyError, IndexError) as error:
        raise UsageError(f"{run / FOLDS_FILE}: missing or broken; fit again ({error})") from error
    if folds.folds != len(record.folds):
        raise UsageError(f"{run / FOLDS_FILE}: of {folds.folds} folds, where {run / RUN_FILE} has others; fit again")
    models = [ReferenceModel.load(fold_directory(run, fold)) for fold in range(folds.folds)]
    for fold, (model, expected) in enumerate(zip(models, record.folds, strict=True)):
        if model.fingerprint() != expected:
            raise UsageError(f"{fold_directory(run, fold)}: not the model that was fitted here; fit again")
    return Run(record.shards, models, folds, sketch)
