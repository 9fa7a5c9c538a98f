"""Claims about how the repository is built: which floor knows which, and what every public name carries."""

import ast
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from benchmarks.papers import ROOT, papers

FLOORS = ["common", "benchmarks", *papers()]
FILES = [path.relative_to(ROOT) for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
ONE_DOOR = Path("benchmarks/papers.py")


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """Top-level packages that a file imports, anywhere in it; a relative import is of the file's own."""
    found = set()
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(path.parts[0] if node.level else node.module.split(".")[0])
    return found


def imports_by_name(path: Path, root: Path = ROOT) -> bool:
    """Whether a file imports modules whose names are computed: with importlib or runpy, or with a builtin that takes code as text."""
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.Name) and node.id in {"__import__", "exec", "eval", "import_module", "run_module", "run_path"}:
            return True
        if isinstance(node, ast.Attribute) and node.attr in {"import_module", "__import__", "run_module", "run_path"}:
            return True
    return False


def upward(path: Path, floors: list[str], root: Path = ROOT) -> set[str]:
    """Floors that a file imports and must not: a paper knows common and itself, benchmarks knows common and itself, common only itself."""
    return imported(path, root) & set(floors) - {"common", path.parts[0]}


def public(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down_only(path):
    assert not upward(path, FLOORS)


def test_papers_are_reached_by_name_from_one_file_only():
    assert [path for path in FILES if imports_by_name(path)] == [ONE_DOOR]


def test_an_upward_import_would_be_seen(tmp_path):
    for path, text in {
        "common/a.py": "def f():\n    from droppos.method import DropPos\n",
        "droppos/b.py": "import benchmarks.table as t, common.vit\n",
        "droppos/c.py": "from mp3 import method\nfrom . import method\n",
        "droppos/d.py": "from common.vit import ViT\nimport torch\nfrom .method import DropPos\n",
        "benchmarks/e.py": "import importlib\nimportlib.import_module('droppos.recipe')\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    floors = ["common", "benchmarks", "droppos", "mp3"]
    seen = {path: upward(Path(path), floors, tmp_path) for path in ("common/a.py", "droppos/b.py", "droppos/c.py", "droppos/d.py")}
    assert seen == {"common/a.py": {"droppos"}, "droppos/b.py": {"benchmarks"}, "droppos/c.py": {"mp3"}, "droppos/d.py": set()}
    assert imports_by_name(Path("benchmarks/e.py"), tmp_path) and not imports_by_name(Path("droppos/d.py"), tmp_path)


def test_a_sixth_paper_is_found_by_its_recipe_alone(tmp_path):
    for name in ("mp3", "droppos", "positional_label", "stop", "mapet", "sixth"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.py").touch()
    for name in ("common", "tests", "benchmarks", "docs"):
        (tmp_path / name).mkdir()
    (tmp_path / "common" / "recipe.py").touch()
    assert papers(tmp_path) == ["droppos", "mapet", "mp3", "positional_label", "sixth", "stop"]


def test_every_folder_with_a_recipe_is_a_paper_and_has_its_method():
    folders = {path.parent.name for path in ROOT.glob("*/recipe.py")} - {"common"}
    assert set(papers()) == folders and "droppos" in folders
    assert all((ROOT / paper / "method.py").exists() for paper in papers())


@pytest.mark.parametrize("paper", papers())
def test_a_method_can_be_read_in_one_sitting(paper):
    assert len((ROOT / paper / "method.py").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_public_function_has_a_docstring_and_annotated_parameters(path):
    for node in public(path):
        assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"
        if not isinstance(node, ast.ClassDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            bare = [argument.arg for argument in every if argument is not None and argument.annotation is None]
            assert not bare, f"{path}:{node.lineno} {node.name} has parameters without a type: {', '.join(bare)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


def test_no_module_is_named_after_nothing():
    empty = {"util", "utils", "misc", "helper", "helpers", "tools"}
    assert not [path for path in FILES if path.stem in empty or set(path.parts[:-1]) & empty]


def torch_names(code: str) -> set[str]:
    """Every dotted name below torch that code spells out, such as torch.cuda.synchronize."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        name, parts = node, []
        while isinstance(name, ast.Attribute):
            parts.append(name.attr)
            name = name.value
        if isinstance(name, ast.Name) and name.id == "torch" and parts:
            found.add(".".join(reversed(parts)))
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_torch_has_what_is_asked_of_it_even_where_only_a_gpu_would_tell(path):
    def absent(name: str) -> bool:
        try:
            attrgetter(name)(torch)
        except AttributeError:
            return True
        return False

    assert absent("cuda.get_device_nam") and not absent("cuda.get_device_name")
    assert not {name for name in torch_names((ROOT / path).read_text()) if absent(name)}
