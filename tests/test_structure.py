"""Tests of the structure of the repository: allowed imports, docstrings and annotations."""

import ast
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from benchmarks.papers import ROOT, papers

PACKAGES = ["common", "benchmarks", *papers()]
FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
IMPORTER = Path("benchmarks/papers.py")


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """Return the top-level packages that a file imports anywhere; a relative import is of its own package."""
    found = set()
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(path.parts[0] if node.level else node.module.split(".")[0])
    return found


def imports_by_name(path: Path, root: Path = ROOT) -> bool:
    """Whether a file imports modules by computed names: with importlib, runpy, or a builtin that runs code from text."""
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.Name) and node.id in {"__import__", "exec", "eval", "import_module", "run_module", "run_path"}:
            return True
        if isinstance(node, ast.Attribute) and node.attr in {"import_module", "__import__", "run_module", "run_path"}:
            return True
    return False


def forbidden(path: Path, packages: list[str], root: Path = ROOT) -> set[str]:
    """Return forbidden imports: a paper and benchmarks may import common and themselves, common only itself."""
    return imported(path, root) & set(packages) - {"common", path.parts[0]}


def public(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_package_imports_a_package_above_it(path):
    assert not forbidden(path, PACKAGES)


def test_only_one_file_imports_papers_by_name():
    assert [path for path in FILES if imports_by_name(path)] == [IMPORTER]


def test_a_forbidden_import_is_detected(tmp_path):
    for path, text in {
        "common/a.py": "def f():\n    from droppos.method import DropPos\n",
        "droppos/b.py": "import benchmarks.table as t, common.vit\n",
        "droppos/c.py": "from mp3 import method\nfrom . import method\n",
        "droppos/d.py": "from common.vit import ViT\nimport torch\nfrom .method import DropPos\n",
        "benchmarks/e.py": "import importlib\nimportlib.import_module('droppos.recipe')\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    packages = ["common", "benchmarks", "droppos", "mp3"]
    seen = {path: forbidden(Path(path), packages, tmp_path) for path in ("common/a.py", "droppos/b.py", "droppos/c.py", "droppos/d.py")}
    assert seen == {"common/a.py": {"droppos"}, "droppos/b.py": {"benchmarks"}, "droppos/c.py": {"mp3"}, "droppos/d.py": set()}
    assert imports_by_name(Path("benchmarks/e.py"), tmp_path) and not imports_by_name(Path("droppos/d.py"), tmp_path)


def test_a_new_paper_is_found_by_its_recipe_file(tmp_path):
    for name in ("mp3", "droppos", "positional_label", "stop", "mapet", "sixth"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.py").touch()
    for name in ("common", "tests", "benchmarks", "docs"):
        (tmp_path / name).mkdir()
    (tmp_path / "common" / "recipe.py").touch()
    assert papers(tmp_path) == ["droppos", "mapet", "mp3", "positional_label", "sixth", "stop"]


def test_every_folder_with_a_recipe_is_a_paper_and_has_a_method():
    folders = {path.parent.name for path in ROOT.glob("*/recipe.py")} - {"common"}
    assert set(papers()) == folders and "droppos" in folders
    assert all((ROOT / paper / "method.py").exists() for paper in papers())


@pytest.mark.parametrize("paper", papers())
def test_every_method_file_has_at_most_200_lines(paper):
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
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


def test_no_module_has_a_meaningless_name():
    meaningless = {"util", "utils", "misc", "helper", "helpers", "tools"}
    assert not [path for path in FILES if path.stem in meaningless or set(path.parts[:-1]) & meaningless]


def torch_names(code: str) -> set[str]:
    """Return every dotted name of torch in the code, such as cuda.synchronize."""
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
def test_every_torch_name_exists_also_in_code_for_gpus_only(path):
    def absent(name: str) -> bool:
        try:
            attrgetter(name)(torch)
        except AttributeError:
            return True
        return False

    assert absent("cuda.get_device_nam") and not absent("cuda.get_device_name")
    assert not {name for name in torch_names((ROOT / path).read_text()) if absent(name)}
