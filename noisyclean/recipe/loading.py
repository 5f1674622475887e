"""Reading a recipe from YAML and ``--set key=value``, with errors that name the key."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from noisyclean.errors import UsageError
from noisyclean.recipe.objectives import OBJECTIVES
from noisyclean.recipe.recipe import Recipe

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # aliases can nest a few lines of YAML into gigabytes


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
    package = Path(__file__).parents[1]
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
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply") from error
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
    if key == "objective.name" and str(value) in OBJECTIVES and value != values.get("name", "srem"):
        # Another objective is meant: of the recipe's own it keeps the keys that both have.
        for other in set(values) - set(OBJECTIVES[value].model_fields):
            del values[other]
    values[leaf] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    objective = None
    if where[:1] == ["objective"]:
        # The keys of a union have the name of the member in them, which is no key of the file.
        objective = where.pop(1) if len(where) > 1 else str(first.get("ctx", {}).get("tag"))
    key = ".".join(where)
    if first["type"] == "union_tag_invalid":
        near = difflib.get_close_matches(str(objective), OBJECTIVES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(OBJECTIVES)}"
        return f"objective.name: no such objective {objective!r}; {hint}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; {_nearest(key, objective or 'srem')}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key}: {message[:1].lower()}{message[1:]} (got {_SHORT.repr(first['input'])})"


def _nearest(key: str, objective: str) -> str:
    leaf = key.rpartition(".")[2]
    if key.startswith("objective."):
        keys = list(OBJECTIVES[objective].model_fields)
        # What is a key of another objective is no slip of the pen.
        if others := [name for name, other in OBJECTIVES.items() if leaf in other.model_fields]:
            return f"that is a key of objective {', '.join(others)}; {objective} has {', '.join(keys)}"
        near = difflib.get_close_matches(leaf, keys, 1)
        return f"did you mean objective.{near[0]}?" if near else f"objective {objective} has {', '.join(keys)}"
    known = [*_keys(Recipe), *_keys(OBJECTIVES[objective], "objective.")]
    near = difflib.get_close_matches(key, known, 1) or [
        one for one in known if difflib.get_close_matches(leaf, [one.rpartition(".")[2]], 1)
    ]
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(Recipe.model_fields)}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(info.annotation, f"{prefix}{name}.")
