"""Which papers there are: every top-level folder with a recipe.py, and as baselines the files in benchmarks/baselines."""

import importlib
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from common.environment import ROOT
from common.recipe import Recipe, RecipeError, nearest

BASELINES = Path("benchmarks/baselines")


def papers(root: Path = ROOT) -> list[str]:
    """Names of the papers, sorted."""
    return sorted(path.parent.name for path in root.glob("*/recipe.py") if path.parent.name != "common")


def baselines(root: Path = ROOT) -> list[str]:
    """Names of the baselines, sorted."""
    return sorted(path.stem for path in (root / BASELINES).glob("*.py") if path.stem != "__init__")


def folder(name: str, root: Path = ROOT) -> Path:
    """The folder of the README, published.csv and results.csv of a paper or baseline, relative to the root."""
    return BASELINES if name in baselines(root) else Path(name)


def paper_module(name: str) -> ModuleType:
    """Import the module with the recipes of a paper or baseline. Raises RecipeError for an unknown name, with the nearest known one."""
    known = [*papers(), *baselines()]
    if name not in known:
        raise RecipeError(f"PAPER={name!r} is not known; {nearest(name, known)}")
    return importlib.import_module(f"benchmarks.baselines.{name}" if name in baselines() else f"{name}.recipe")


def paper_name(module: ModuleType) -> str:
    """The name under which `paper_module` finds a module."""
    return module.__name__.removesuffix(".recipe").rpartition(".")[2]


def recipes(module: ModuleType) -> dict[str, Callable[[], Recipe]]:
    """The recipes of a paper by name, in the order of its file: its public functions without parameters that return a Recipe."""
    return {name: value for name, value in vars(module).items() if _makes_recipe(value, module) and not name.startswith("_")}


def choose_recipe(module: ModuleType, data: str, name: str | None) -> tuple[str, Recipe]:
    """Return the named recipe, or the default one of the data set, which the paper declares in DEFAULTS ("folder" is any ImageFolder).

    Raises RecipeError for an unknown name, for data without a default recipe, and for a paper without recipes.
    """
    known = recipes(module)
    if not known:
        what = "a recipe is a public function without parameters that is annotated as returning common.recipe.Recipe"
        raise RecipeError(f"{paper_name(module)} has no recipe: {what}, such as def digits() -> Recipe")
    if name is not None:
        if name not in known:
            raise RecipeError(f"RECIPE={name!r} is not known for {paper_name(module)}; {nearest(name, known)}")
        return name, known[name]()
    wanted = "folder" if Path(data).is_dir() else data
    defaults = getattr(module, "DEFAULTS", {})
    if wanted not in defaults:
        fault = f"DATA={data!r} is no folder and has no default recipe in {paper_name(module)}"
        raise RecipeError(f"{fault}; name one with RECIPE=, or use other data: {nearest(data, defaults)}")
    function = defaults[wanted]
    return function.__name__, function()


def _makes_recipe(value: object, module: ModuleType) -> bool:
    """Whether a value is a function of this module, decorated or not, without parameters, that returns a Recipe."""
    function = inspect.unwrap(value) if callable(value) else value
    if not inspect.isfunction(function) or function.__module__ != module.__name__ or inspect.signature(function).parameters:
        return False
    annotation = function.__annotations__.get("return")
    try:
        annotation = typing.get_type_hints(function).get("return")  # also resolves annotations that are strings
    except Exception:  # e.g. a name that is imported for type checkers only
        return str(annotation).strip("\"'").rpartition(".")[2] == Recipe.__name__
    return isinstance(annotation, type) and issubclass(annotation, Recipe)
