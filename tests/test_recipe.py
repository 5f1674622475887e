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
from noisyclean.recipe import (
    OBJECTIVES,
    CrclObjective,
    InfoNCEObjective,
    NcrObjective,
    Recipe,
    SremObjective,
    load_recipe,
    parse_recipe,
    recipe_names,
)

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


class TestFrozen:
    @pytest.mark.parametrize(
        "encoder",
        [{"name": "ViT-B-32", "pretrained": "openai"}, {"name": "local-dir:my-model"}, {"name": "hf-hub:a/b"}],
    )
    def test_any_model_that_comes_with_weights(self, encoder: dict[str, str]) -> None:
        assert parse_recipe({"encoder": {**encoder, "frozen": True}}, "test").encoder.frozen

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["encoder.frozen=true"], "encoder.frozen is set, but noisyclean-tiny has no weights .*encoder.pretrained"),
            (["encoder.frozen=true", "encoder.name=local-dir:m", "optimiser.shift=2"], "optimiser.shift is 2, but"),
            (["encoder.frozen=towers"], "encoder.frozen: input should be a valid boolean.*got 'towers'"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, overrides: list[str], message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            load_recipe(None, overrides)
        assert "\n" not in str(caught.value)


class TestObjectives:
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_each_can_be_chosen_and_written_down(self, write: Write, name: str) -> None:
        recipe = load_recipe("demo", [f"objective.name={name}"])
        assert type(recipe.objective) is OBJECTIVES[name]
        assert recipe.objective.name == name
        assert load_recipe(write(recipe.to_yaml())) == recipe
        assert recipe.model_copy(update={"objective": SremObjective(warmup_epochs=1)}) == load_recipe("demo")

    def test_a_file_without_a_name_means_srem(self, write: Write) -> None:
        for text in ("objective: {}", "objective: {filter_fdr: 0.3}", "seed: 0"):
            assert isinstance(load_recipe(write(text)).objective, SremObjective)
        assert load_recipe(write("objective: {name: ncr, co_teaching: true}")).objective == NcrObjective(
            name="ncr", co_teaching=True
        )

    def test_another_name_keeps_the_keys_that_both_have(self, write: Write) -> None:
        path = write("objective: {warmup_epochs: 3, complementary_weight: 0.2, margin: 0.4, filter_fdr: 0.3}")
        kept = load_recipe(path, ["objective.name=crcl"]).objective
        assert kept == CrclObjective(name="crcl", warmup_epochs=3, complementary_weight=0.2)
        assert load_recipe(path, ["objective.name=infonce"]).objective == InfoNCEObjective(name="infonce")
        assert load_recipe(path, ["objective.name=srem"]) == load_recipe(path)
        there_and_back = load_recipe(path, ["objective.name=crcl", "objective.name=srem"]).objective
        assert there_and_back == SremObjective(warmup_epochs=3, complementary_weight=0.2)

    def test_keys_before_and_after_the_name(self) -> None:
        words = [
            "objective.warmup_epochs=3",
            "objective.soft_targets=1",
            "objective.name=ncr",
            "objective.mixture=beta",
        ]
        expected = NcrObjective(name="ncr", warmup_epochs=3, mixture="beta")
        assert load_recipe(None, words).objective == expected

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ("name=srme", r"objective.name: no such objective 'srme'; did you mean srem\?"),
            ("name=xyzzy", "no such objective 'xyzzy'; there are srem, infonce, vse"),
            ("name=[srem]", "no such objective"),
            ("name=null", "no such objective"),
            ("filter_fd=0.1", r"unknown key objective.filter_fd; did you mean objective.filter_fdr\?"),
            ("name=ncr mixtur=beta", r"unknown key objective.mixtur; did you mean objective.mixture\?"),
            ("name=rince expoent=1", r"did you mean objective.exponent\?"),
            ("name=ncr filter_fdr=0.1", "that is a key of objective srem; ncr has name, warmup_epochs, mixture"),
            (
                "name=infonce warmup_epochs=1",
                "that is a key of objective srem, vse, ncr, decl, crcl; infonce has name$",
            ),
            ("name=rcl x.y=1", "unknown key objective.x; objective rcl has name$"),
            ("margin=0", r"objective.margin: input should be greater than 0 \(got 0\)"),
            ("name=ncr mixture=gamma", r"objective.mixture: input should be 'gaussian' or 'beta' \(got 'gamma'\)"),
            ("warmup_epochs=10", "objective.warmup_epochs is 10 and optimiser.epochs 10"),
            ("name=ncr warmup_epochs=10", "nothing would ever be filtered"),
        ],
    )
    def test_mistakes_name_the_key_and_not_the_union(self, overrides: str, message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            load_recipe(None, [f"objective.{one}" for one in overrides.split()])
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", ["ncr", "null", "[]"])
    def test_a_section_that_is_none(self, value: str) -> None:
        with pytest.raises(UsageError, match=r"^the default recipe: objective"):
            load_recipe(None, [f"objective={value}"])

    def test_baselines_may_warm_up_for_ever(self) -> None:
        """Only what filters must come to filtering."""
        assert load_recipe(None, ["optimiser.epochs=1", "objective.name=vse"]).optimiser.epochs == 1


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
            ("folds: 0", "folds: input should be greater than or equal to 1"),
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
