"""Recipes: what is written is what is used, and a slip of the pen is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import noisyclean
from noisyclean.errors import UsageError
from noisyclean.recipe import Recipe, load_recipe, parse_recipe, recipe_names

ROOT = Path(__file__).parents[1]
Write = Callable[..., Path]
FILES = sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: path.stem)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_(text: str | bytes, name: str = "my.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_


class TestOurs:
    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_every_recipe_loads_and_means_what_it_says(self, path: Path) -> None:
        recipe = load_recipe(path.stem)
        assert recipe == load_recipe(path)
        values = recipe.model_dump()
        for section, given in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            if isinstance(given, dict):
                assert values[section].items() >= given.items()
            else:
                assert values[section] == given

    def test_all_are_named(self) -> None:
        assert recipe_names() == [path.stem for path in FILES]
        assert "demo" in recipe_names()

    def test_installed_package_has_them_too(self, tmp_path: Path) -> None:
        """The package laid out as pyproject.toml has the wheel laid out, away from the repository."""
        package = Path(noisyclean.__file__).parent
        shutil.copytree(package, tmp_path / "noisyclean", ignore=shutil.ignore_patterns("__pycache__", "recipes"))
        wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
        for source, target in wheel["force-include"].items():
            shutil.copytree(ROOT / source, tmp_path / target)
        script = (
            "import json, noisyclean, noisyclean.recipe as r;"
            "print(json.dumps([noisyclean.__file__, {n: r.load_recipe(n).to_yaml() for n in r.recipe_names()}]))"
        )
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        found = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, check=True
        )
        where, recipes = json.loads(found.stdout)
        assert Path(where).is_relative_to(tmp_path)
        assert recipes == {path.stem: load_recipe(path).to_yaml() for path in FILES}


class TestFinding:
    def test_none_is_all_defaults(self) -> None:
        assert load_recipe(None) == Recipe()

    @pytest.mark.parametrize("name", ["my.yaml", "my.yml"])
    def test_path(self, write: Write, name: str) -> None:
        path = write("seed: 3", name)
        assert load_recipe(path).seed == load_recipe(str(path)).seed == 3

    def test_file_in_the_working_directory_does_not_hide_a_recipe(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "demo").write_text("seed: 99")
        (tmp_path / "demo.yaml").write_text("seed: 98")
        monkeypatch.chdir(tmp_path)
        assert load_recipe("demo").seed == 0
        assert load_recipe("demo.yaml").seed == 98

    def test_unknown_name(self) -> None:
        with pytest.raises(UsageError, match=r"demoo: no such recipe; did you mean demo\?"):
            load_recipe("demoo")
        with pytest.raises(UsageError, match=r"xyzzy: no such recipe; there are .*demo"):
            load_recipe("xyzzy")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no such recipe file"):
            load_recipe(tmp_path / "missing.yaml")
        with pytest.raises(UsageError, match="no such recipe file"):
            load_recipe("folder/demo")


class TestOverrides:
    def test_types(self) -> None:
        recipe = load_recipe(
            "demo",
            [
                "optimiser.epochs=20",
                "optimiser.learning_rate=1e-3",  # a string to YAML 1.1
                "encoder.pretrained=weights/a=b.pt",
                "encoder.temperature=null",
                "data.cache=stream",
                "folds=3",
            ],
        )
        assert recipe.optimiser.epochs == 20
        assert recipe.optimiser.learning_rate == 1e-3
        assert recipe.encoder.pretrained == "weights/a=b.pt"
        assert recipe.encoder.temperature is None
        assert recipe.data.cache == "stream"
        assert recipe.folds == 3
        untouched = load_recipe("demo")
        assert recipe.optimiser.batch_size == untouched.optimiser.batch_size
        assert recipe.bank == untouched.bank

    def test_last_one_wins(self) -> None:
        assert load_recipe(None, ["seed=1", "seed=2"]).seed == 2

    def test_whole_section(self) -> None:
        assert load_recipe("demo", ["bank={size: 99}"]).bank.size == 99

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("optimiser.epochs", "--set optimiser.epochs: give key=value"),
            ("=3", "give key=value"),
            ("optimiser.epochs=[", "not valid YAML"),
            ("seed.deeper=3", "seed"),
            ("optimiser.epoch=3", "unknown key optimiser.epoch; did you mean optimiser.epochs?"),
            ("optimizer.epochs=3", "unknown key optimizer; did you mean optimiser?"),
            ("epochs=3", "unknown key epochs; did you mean optimiser.epochs?"),
            ("xyzzy=3", "unknown key xyzzy; there are encoder, data"),
            ("optimiser.epochs=0", "optimiser.epochs: input should be greater than or equal to 1 .*got 0"),
            ("optimiser.epochs=many", "optimiser.epochs: .*got 'many'"),
            ("data.cache=disk", "data.cache: input should be 'auto', 'memory' or 'stream'"),
            ("encoder=tiny", "encoder: .*got 'tiny'"),
        ],
    )
    def test_mistakes_are_named_in_one_line(self, override: str, message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            load_recipe(None, [override])
        assert "\n" not in str(caught.value)


class TestFiles:
    def test_empty_file_is_all_defaults(self, write: Write) -> None:
        assert load_recipe(write("# nothing yet\n")) == Recipe()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seed: 1\nfolds: [2", "not valid YAML at line 2"),
            ("seed: 1\n\tfolds: 2", "not valid YAML at line 2"),
            ("- seed\n- folds", "a recipe is a mapping"),
            ("just words", "a recipe is a mapping"),
            ("optimiser: {epoch: 3}", "unknown key optimiser.epoch; did you mean optimiser.epochs?"),
            ("seeds: 3", "unknown key seeds; did you mean seed?"),
            ("1: 2", "1"),
            ("folds: 1", "folds: input should be greater than or equal to 2"),
            ("seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
            (b"\xff\xfe\x00", "cannot read the recipe|not valid YAML"),
        ],
    )
    def test_mistakes_are_named_with_the_file(self, write: Write, text: str | bytes, message: str) -> None:
        path = write(text)
        with pytest.raises(UsageError, match=message) as caught:
            load_recipe(path)
        assert str(caught.value).startswith(f"{path}: ")

    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"encoder": {"name": "ViT-B-32", "pretrained": "ü.pt"}, "folds": 5},
            {"optimiser": {"learning_rate": 1e-7, "weight_decay": 0}, "data": {"workers": 0, "holdout": 0.125}},
        ],
    )
    def test_round_trip_spells_out_the_defaults(self, write: Write, values: dict[str, object]) -> None:
        recipe = parse_recipe(values, "test")
        text = recipe.to_yaml()
        assert load_recipe(write(text)) == recipe
        assert yaml.safe_load(text) == recipe.model_dump(mode="json")

    def test_recipes_do_not_change(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            Recipe().seed = 3  # type: ignore[misc]
