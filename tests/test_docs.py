"""docs/method.md names every key of every objective with its current default, so that it cannot go stale."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from noisyclean.recipe import OBJECTIVES

METHOD = (Path(__file__).parents[1] / "docs" / "method.md").read_text(encoding="utf-8")


def documented() -> dict[str, dict[str, tuple[Any, str]]]:
    """Objective → key → (default, meaning), from the tables of keys; that without objectives is SREM's."""
    found: dict[str, dict[str, tuple[Any, str]]] = {name: {} for name in OBJECTIVES}
    heads = re.compile(r"^\| (?:objective \| )?key \| default \| meaning \|\n\|[-|]+\n((?:\|.*\n)+)", re.M)
    for row in "".join(heads.findall(METHOD)).splitlines():
        cells = re.fullmatch(r"(?:\| `(\w+)` )?\| `(\w+)` \| `([^`|]+)` \| ([^|]+) \|", row)
        assert cells, f"not `key`, `default` and meaning: {row}"
        objective, key, default, meaning = cells.groups()
        keys = found[objective or "srem"]
        assert key not in keys, f"there twice: {row}"
        keys[key] = yaml.safe_load(default), meaning
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
class TestMethod:
    def test_objective_is_described(self, objective: str) -> None:
        assert re.search(rf"^(#|- ).*`{objective}`", METHOD, re.M)

    def test_every_key_is_there_with_its_default(self, objective: str) -> None:
        fields = {key: field for key, field in OBJECTIVES[objective].model_fields.items() if key != "name"}
        stated = {key: (type(default), default) for key, (default, _) in documented()[objective].items()}
        assert stated == {key: (type(field.default), field.default) for key, field in fields.items()}

    def test_every_option_is_named(self, objective: str) -> None:
        for key, (_, meaning) in documented()[objective].items():
            for option in get_args(OBJECTIVES[objective].model_fields[key].annotation):
                assert f"`{option}`" in meaning, f"{objective}.{key}: {option}"
