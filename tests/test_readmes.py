"""Tests of the READMEs: files, lines, headings, commands and names in them exist."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.papers import ROOT, choose_recipe, paper_module, papers, recipes
from common.recipe import override

PAGES = [ROOT / f"{name}.md" for name in ("README", "RESULTS", "CONTRIBUTING")]
FOUND = sorted([*PAGES, *ROOT.glob("*/README.md"), *ROOT.glob("benchmarks/*/README.md")])
READMES = [path for path in FOUND if not path.parent.name.startswith(".")]
each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())

FENCE = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^()\s]+)\)")
LINE = re.compile(r"\[(\w+\.py):(\d+)\]\(([^()\s#]+)#L(\d+)\)")
COMMAND = re.compile(r"(?:[A-Z_]+=\S* +)*((?:make|srun|torchrun|\S*python[\d.]*)(?: .*)?)")


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced code blocks of a Markdown text in the given languages."""
    return [code for language, code in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    """Return the text without its fenced code."""
    return FENCE.sub("", text)


def section(text: str, heading: str) -> str:
    """Return the text under a second-level heading."""
    (found,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def rows(text: str) -> list[list[str]]:
    """Return the cells of every table row in a text."""
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("|")]


def anchors(text: str) -> set[str]:
    """Return GitHub's link anchors of the headings of a Markdown text."""
    names: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.MULTILINE):
        heading = LINK.sub(r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        seen = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names)
        names.append(f"{name}-{seen}" if seen else name)
    return set(names)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every `make` and `python -m` command: in shell blocks, after "$ " in other blocks, and in inline code."""
    lines = "\n".join(blocks(text, "bash", "sh", "shell")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"^\$ (.*)", "\n".join(blocks(text, "", "console", "text")), re.MULTILINE)
    for line in [*lines, *re.findall(r"`([^`\n]+)`", prose(text))]:
        for part in re.split(r"&&|;", line):
            if command := COMMAND.fullmatch(part.strip()):
                words = shlex.split(command[1], comments=True)
                if words[0] == "make" or "-m" in words:
                    yield words


def make_words(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the targets and the variables of a `make` command."""
    variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    return [word for word in words[1:] if "=" not in word and not word.startswith("-")], variables


@lru_cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


@lru_cache
def known_flags(module: str) -> frozenset[str]:
    """Return the flags in a module's --help."""
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    asked = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert asked.returncode == 0, asked.stderr
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", asked.stdout))


@pytest.mark.parametrize("paper", papers())
def test_each_step_of_the_method_links_to_the_line_that_does_it(paper: str) -> None:
    steps = [cells for cells in rows(section((ROOT / paper / "README.md").read_text(encoding="utf-8"), "The method in ten lines"))[2:]]
    assert len(steps) == 10
    source = (ROOT / paper / "method.py").read_text(encoding="utf-8")
    for name, _, link, quoted in steps:
        label, number, target, anchor = LINE.fullmatch(link).groups()
        fragment = quoted.strip("`")
        assert label == target == "method.py" and number == anchor, name
        assert len(fragment) > 10 and source.count(fragment) == 1, f"{name}: {fragment!r} does not stand exactly once in {paper}/method.py"
        found = source[: source.index(fragment)].count("\n") + 1
        assert found == int(number), f"{name}: {fragment!r} is on line {found} of {paper}/method.py, not {number}"


@pytest.mark.parametrize(("paper", "prefix", "count"), [("droppos", 7, 17), ("mp3", 5, 12)])
def test_the_deviations_list_all_errors_of_the_other_implementation(paper: str, prefix: int, count: int) -> None:
    deviations = section((ROOT / paper / "README.md").read_text(encoding="utf-8"), "Deviations")
    faults = [cells for cells in rows(deviations) if re.match(r"\d+\.\d+( |$)", cells[0])]
    assert [cells[0].split()[0] for cells in faults] == [f"{prefix}.{number}" for number in range(1, count + 1)]
    for fault, *cells in faults:
        assert fault.split()[1:] in ([["H"], ["M"], ["L"]] if paper == "droppos" else [[]]), f"{fault}: severity, where it is known"
        assert len(cells) == 4 and all(cells), f"{fault}: paper, the other code, ours, why"
        assert re.search(r"\b(Executed|Read|[Nn]ot verified)\b", cells[-1]), f"{fault}: how is it known?"


def test_the_main_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 180 and len(text.encode()) < 14_000


def test_the_losses_in_the_main_readme_are_where_it_says() -> None:
    found = re.findall(r"\]\(([\w/]+\.py)#L(\d+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    lines = {path: (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1] for path, line in found}
    assert len(lines) == 6 and not [path for path, line in lines.items() if "loss" not in line]


@each_readme
def test_the_target_of_every_relative_link_exists(readme: Path) -> None:
    text = prose(readme.read_text(encoding="utf-8"))
    for label, target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (readme.parent / path).resolve() if path else readme
        assert file.is_relative_to(ROOT) and file.exists(), f"{target} does not exist"
        if line := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
            last = len(file.read_text(encoding="utf-8").splitlines())
            assert all(1 <= int(number) <= last for number in line.groups() if number), f"{target}: the file has {last} lines"
            assert not re.search(r":\d+$", label) or label.endswith(f":{line[1]}"), f"[{label}] leads to line {line[1]}"
        elif anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}: no such heading"


@each_readme
def test_every_make_command_uses_documented_targets_and_variables(readme: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", makefile(), re.MULTILINE))
    shown = set(re.findall(r"\b([A-Z_]+)=", "\n".join(re.findall(r"^#:.*", makefile(), re.MULTILINE))))
    for words in commands(readme.read_text(encoding="utf-8")):
        if words[0] == "make":
            wanted, variables = make_words(words)
            assert set(wanted) <= targets, f"{shlex.join(words)}: the targets are {sorted(targets)}"
            assert set(variables) <= shown, f"{shlex.join(words)}: the variables are {sorted(shown)}"


@each_readme
def test_every_named_paper_recipe_and_data_set_exists(readme: Path, tmp_path: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    default = readme.parent.name if readme.parent.name in papers() else re.search(r"^PAPER \?= (\w+)", makefile(), re.MULTILINE)[1]
    for words in commands(text):
        targets, variables = make_words(words) if words[0] == "make" else ([], {})
        if {"reproduce", "tokens"} & {*targets}:
            data = variables.get("DATA", "digits")
            name = re.fullmatch(r"\w+", variables.get("RECIPE", "")) and variables["RECIPE"]
            _, recipe = choose_recipe(paper_module(variables.get("PAPER", default)), str(tmp_path) if "/" in data else data, name or None)
            override(recipe, re.findall(r"--set (\S+)", variables.get("ARGS", "")))
    for line in text.splitlines():
        paper = re.search(r"\bPAPER=(\w+)|benchmarks\.reproduce (\w+)", line)
        module = paper_module((paper[1] or paper[2]) if paper else default)
        for name in re.findall(r"(?:\bRECIPE=|--recipe[ =])(\w+)", line):
            assert name in recipes(module), f"{name} is no recipe of {module.__package__}: {', '.join(recipes(module))}"


@each_readme
def test_every_module_in_a_command_exists_and_accepts_its_flags(readme: Path) -> None:
    for words in commands(readme.read_text(encoding="utf-8")):
        if words[0] == "make":
            targets, variables = make_words(words)
            run = re.search(rf"^{targets[0]}:.*\n\t.*-m (benchmarks\.\w+)", makefile(), re.MULTILINE) if targets else None
            module = run[1] if run else ""
            arguments = shlex.split(variables.get("ARGS", ""))
        else:
            module, *arguments = words[words.index("-m") + 1 :]
            assert find_spec(module), f"{shlex.join(words)}: there is no module {module}"
        flags = {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
        if module.startswith(("benchmarks.", *papers())) and flags:
            assert flags <= known_flags(module), f"{shlex.join(words)}: {module} knows {sorted(known_flags(module))}"


@each_readme
def test_python_blocks_compile_and_their_imports_exist(readme: Path) -> None:
    for code in blocks(readme.read_text(encoding="utf-8"), "py", "python"):
        compile(code, str(readme), "exec")
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or find_spec(f"{node.module}.{name.name}"), f"{node.module} has no {name.name}"
            elif isinstance(node, ast.Import):
                assert all(find_spec(name.name) for name in node.names), ast.unparse(node)
