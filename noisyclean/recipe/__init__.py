"""The typed recipe: everything ``fit`` can be told, read from YAML and ``--set key=value``."""

from noisyclean.recipe.loading import load_recipe, parse_recipe, recipe_names
from noisyclean.recipe.objectives import (
    OBJECTIVES,
    CrclObjective,
    DeclObjective,
    InfoNCEObjective,
    NcrObjective,
    ObjectiveRecipe,
    RclObjective,
    RinceObjective,
    SremObjective,
    VseObjective,
)
from noisyclean.recipe.recipe import BankRecipe, DataRecipe, EncoderRecipe, OptimiserRecipe, Recipe

__all__ = [
    "OBJECTIVES",
    "BankRecipe",
    "CrclObjective",
    "DataRecipe",
    "DeclObjective",
    "EncoderRecipe",
    "InfoNCEObjective",
    "NcrObjective",
    "ObjectiveRecipe",
    "OptimiserRecipe",
    "RclObjective",
    "Recipe",
    "RinceObjective",
    "SremObjective",
    "VseObjective",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
]
