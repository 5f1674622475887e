"""The typed recipe: everything ``fit`` can be told, read from YAML and ``--set key=value``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from noisyclean.errors import UsageError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EncoderRecipe(_Section):
    """Which dual encoder is trained, and from what weights."""

    name: str = Field("noisyclean-tiny", description="an open_clip model name, or one of noisyclean's own")
    pretrained: str | None = Field(None, description="an open_clip tag or a weights file to start from; null: scratch")
    image_size: int | None = Field(None, ge=16, description="side of the input picture in pixels; null: the model's")
    context_length: int | None = Field(None, ge=4, description="caption tokens kept; null: the model's")
    temperature: float | None = Field(
        None, gt=0, description="initial softmax temperature; null: that of the pretrained weights, from scratch 0.05"
    )


class DataRecipe(_Section):
    """How pairs reach the model."""

    workers: int | None = Field(None, ge=0, description="decoding processes; null: chosen for the machine")
    cache: Literal["auto", "memory", "stream"] = Field(
        "auto", description="hold decoded pictures in memory, or decode them each epoch; auto: memory if they fit"
    )
    holdout: float = Field(0.03, ge=0, lt=0.5, description="share of the pairs that no model trains on, for validation")
    shuffle_buffer: int = Field(8192, ge=1, description="pairs shuffled together while streaming")


class OptimiserRecipe(_Section):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of all steps over which the learning rate rises")
    gradient_clip: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    shift: int = Field(0, ge=0, description="augmentation: each picture moved by up to this many pixels")


class ObjectiveRecipe(_Section):
    """The SREM objective: clean-weighted contrastive loss + λ · complementary loss."""

    warmup_epochs: int = Field(2, ge=1, description="epochs in which every pair counts as clean; fewer than the epochs")
    complementary_weight: float = Field(0.05, ge=0, description="λ of the complementary loss over all pairs")
    complementary: Literal["simple", "transition"] = Field(
        "simple", description="form of the complementary loss: of each p alone, or through a transition matrix"
    )
    complementary_bias: float = Field(
        0.0, ge=0, description="0: all negatives count alike; 1: in proportion to the softmax over the negatives"
    )
    entropy_weighting: Literal["none", "swapped"] = Field(
        "none", description="swapped: the other modality's prediction entropy weights this modality's loss"
    )


class BankRecipe(_Section):
    """The reference bank each pair is scored against."""

    size: int = Field(8192, ge=16, description="pairs in the bank of each fold")


class Recipe(_Section):
    """Everything ``fit`` can be told. Unknown keys are errors."""

    encoder: EncoderRecipe = EncoderRecipe()
    data: DataRecipe = DataRecipe()
    optimiser: OptimiserRecipe = OptimiserRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    bank: BankRecipe = BankRecipe()
    folds: int = Field(
        2, ge=2, le=16, description="cross-fitting folds: each pair is scored by a model that never saw it"
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _filters_at_all(self) -> Recipe:
        if self.objective.warmup_epochs >= self.optimiser.epochs:
            raise ValueError(
                f"objective.warmup_epochs is {self.objective.warmup_epochs} and optimiser.epochs "
                f"{self.optimiser.epochs}: nothing would ever be filtered; lower the one or raise the other"
            )
        return self

    def to_yaml(self) -> str:
        """The whole recipe, defaults spelt out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(name: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (``icons``) or path (``my.yaml``) and apply ``key=value`` overrides; None: all defaults.

    Raises:
        UsageError: no such recipe, not YAML, an unknown key or a value out of range; names the file and the key.
    """
    source = "the default recipe" if name is None else str(name)
    values: dict[str, Any] = {}
    if name is not None:
        path = _find(str(name))
        source = str(path)
        values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, source)


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Validate ``values``; ``source`` names them in errors.

    Raises:
        UsageError: as for :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{source}: {_explain(error)}") from error


def recipe_names() -> list[str]:
    """The recipes that come with noisyclean."""
    return sorted(path.stem for path in _home().glob("*.yaml"))


def _home() -> Path:
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _find(name: str) -> Path:
    if Path(name).suffix in {".yaml", ".yml"} or "/" in name:
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such recipe file")
        return Path(name)
    path = _home() / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), 1)
        hint = (
            f"did you mean {near[0]}?" if near else f"there are {', '.join(recipe_names())}, and files ending in .yaml"
        )
        raise UsageError(f"{name}: no such recipe; {hint}")
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the recipe ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}: not valid YAML{where}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {override}: give key=value, such as optimiser.epochs=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: the value is not valid YAML") from error
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {override}: {parent} holds a value, not keys")
    values[leaf] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; {_nearest(key)}"
    if not key:
        return first["msg"].removeprefix("Value error, ")
    return f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {first['input']!r})"


def _nearest(key: str) -> str:
    known = list(_keys(Recipe))
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, 1) or [
        one for one in known if difflib.get_close_matches(leaf, [one.rpartition(".")[2]], 1)
    ]
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(Recipe.model_fields)}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(info.annotation, f"{prefix}{name}.")
