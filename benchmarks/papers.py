"""Which papers there are: every top-level folder with a recipe.py is one."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from common.recipe import Recipe, RecipeError, nearest
from common.results import ROOT


def papers(root: Path = ROOT) -> list[str]:
    """Names of the papers, sorted."""
    return sorted(path.parent.name for path in root.glob("*/recipe.py") if path.parent.name != "common")


def paper_module(name: str) -> ModuleType:
    """The recipe module of a paper. Raises RecipeError for a name that is none, offering the nearest."""
    if name not in papers():
        raise RecipeError(f"PAPER={name!r} is not known; {nearest(name, papers())}")
    return importlib.import_module(f"{name}.recipe")


def recipes(module: ModuleType) -> dict[str, Callable[[], Recipe]]:
    """The recipes of a paper by name, in the order of its file: its public functions of no arguments that return a Recipe."""
    return {name: value for name, value in vars(module).items() if _makes_recipe(value, module) and not name.startswith("_")}


def choose_recipe(module: ModuleType, data: str, name: str | None) -> tuple[str, Recipe]:
    """The named recipe, or the first that is meant for the data set (any folder counts as "folder").

    Raises RecipeError for an unknown name, or data that no recipe is meant for.
    """
    known = recipes(module)
    if name is not None:
        if name not in known:
            raise RecipeError(f"RECIPE={name!r} is not known for {module.__package__}; {nearest(name, known)}")
        return name, known[name]()
    wanted = "folder" if Path(data).is_dir() else data
    made = {name: function() for name, function in known.items()}
    for name, recipe in made.items():
        if wanted in recipe.data:
            return name, recipe
    datasets = sorted({d for recipe in made.values() for d in recipe.data})
    raise RecipeError(f"DATA={data!r} is no folder and has no recipe in {module.__package__}; {nearest(data, datasets)}")


def _makes_recipe(value: object, module: ModuleType) -> bool:
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    signature = inspect.signature(value)
    return signature.return_annotation is Recipe and not signature.parameters
