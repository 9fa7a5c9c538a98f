"""`make table`: write every table of numbers, from the CSV files of results, published numbers and speed, into the READMEs and RESULTS.md.

A page asks for a table with the line `<!-- table: NAME -->` and ends it with `<!-- /table -->`; the text between is replaced.
`python -m benchmarks.ledger` writes; with `--check` it only names the tables that are not up to date.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas

from benchmarks.compare.arena import ARENAS
from benchmarks.compare.scores import load as load_scores
from benchmarks.compare.table import accuracies, claims, competing, costs, location, main_table
from benchmarks.compare.units import read_plan
from benchmarks.ledger.downstream import DOWNSTREAM, downstream_table
from benchmarks.ledger.overview import comparisons_table, results_table, together_table
from benchmarks.ledger.published import measured, published
from benchmarks.ledger.rows import load
from benchmarks.ledger.tables import markdown, measured_table, published_table, side_by_side
from benchmarks.papers import BASELINES, ROOT, baselines, folder, papers
from benchmarks.speed.measure import wide

MARKER = re.compile(r"^[ \t]*<!--[ \t]*(?:table:[ \t]*(.*?)|(/table))[ \t]*-->[ \t]*$", re.MULTILINE)
OPEN, CLOSE = "<!-- table: {} -->", "<!-- /table -->"
Tables = dict[str, Callable[..., str]]  # by name


def pages(root: Path) -> dict[str, Tables]:
    """The tables of every page, by its path."""
    found: dict[str, Tables] = {
        "README.md": {"speed": partial(speed_table, root)},
        "RESULTS.md": {
            "results": partial(results_table, root),
            "together": partial(together_table, root),
            "comparisons": partial(comparisons_table, root),
        },
        "benchmarks/README.md": {
            "speed": partial(speed_table, root),
            "attention": partial(attention_table, root),
            "loop": partial(speed_table, root, "loop"),
        },
    }
    compared: Tables = {
        path.parent.name: partial(comparison_table, path.parent) for path in sorted(root.glob("benchmarks/compare/*/scores.csv"))
    }
    found |= {"benchmarks/compare/README.md": compared} if compared else {}
    if "cifar10" in compared:
        found["README.md"]["cifar10"] = partial(means_table, root / "benchmarks/compare/cifar10")
    for task in (task for task in DOWNSTREAM if (root / "benchmarks" / task).is_dir()):
        found[f"benchmarks/{task}/README.md"] = {task: partial(downstream_table, task, root)}
    for name in [*papers(root), *baselines(root)]:
        tables, behind = found.setdefault(f"{folder(name, root)}/README.md", {}), f" {name}" * (folder(name, root) == BASELINES)
        tables |= {f"published{behind}": partial(published_table, name, root), f"measured{behind}": partial(measured_table, name, root)}
        if not behind:
            tables["side by side"] = lambda name=name: markdown(side_by_side(name, measured(name, root), root))
    return found


def fill(text: str, tables: Mapping[str, Callable[[], str]], where: str) -> tuple[str, list[str]]:
    """Put each table between its markers. Returns the new text and a line for each table that was stale.

    Raises ValueError, naming `where` and the line, for an unknown name and for a marker without its partner.
    """
    filled, stale, end = "", [], 0
    markers = MARKER.finditer(text)
    for opening in markers:
        name, line = opening[1], f"{where}:{text.count(chr(10), 0, opening.start()) + 1}"
        if opening[2]:
            raise ValueError(f"{line}: this marker closes a table that was never opened")
        if name not in tables:
            raise ValueError(f"{line}: there is no table {name!r}; the tables here are {', '.join(tables)}")
        closing = next(markers, None)
        if closing is None or not closing[2]:
            raise ValueError(f"{line}: table {name!r} is not closed by {CLOSE}")
        table = f"\n\n{tables[name]()}\n"  # blank lines, so that Markdown does not take the table for the comment's tail
        if table != text[opening.end() : closing.start()]:
            stale.append(f"{line}: table {name!r}")
        filled += text[end : opening.end()] + table
        end = closing.start()
    return filled + text[end:], stale


def update(root: Path, check: bool = False) -> tuple[list[str], list[str]]:
    """Write every table, or with `check` none. Returns a line for each stale table and one for each fault that writing cannot fix."""
    stale, faults = [], []
    for where, tables in pages(root).items():
        page = root / where
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        present = {marker[1] for marker in MARKER.finditer(text)}
        try:
            filled, old = fill(text, tables, where)
            if old and not check:
                page.write_text(filled, encoding="utf-8")
            stale += old
            optional = {"speed", "attention", "loop"}
            if any(name.startswith("measured") for name in tables):
                ledger = load(page.parent / "results.csv")
                lost = [log for log in ledger["log"].unique() if not (root / log).is_file()]
                faults += [f"{page.parent.name}/results.csv: the log {log!r} is missing, so no number of it is shown" for log in lost]
                adds = any(ledger["base_arm"] != "") or any(published(page.parent.name, root)["added"] != "")
                optional |= set() if adds else {"side by side"}  # a paper that adds nothing to another method needs none
        except ValueError as error:
            faults.append(str(error))
            optional = {*tables}
        absent = sorted(tables.keys() - optional - present)
        faults += [f"{where}: table {name!r} is missing: add the lines {OPEN.format(name)} and {CLOSE}" for name in absent]
    return stale, list(dict.fromkeys(faults))


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line. Returns 1 where something is wrong, with --check also where a table is stale; else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description="Write the READMEs' tables from the CSV files.")
    parser.add_argument("--check", action="store_true", help="write nothing; name every table that is not current and exit with 1")
    check = parser.parse_args(argv).check
    stale, faults = update(root, check)
    for line in stale:
        print(f"{line} is out of date: update it with `make table`" if check else f"{line} written")
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return int(bool(faults or (check and stale)))


def speed_table(root: Path, name: str = "steps") -> str:
    """The committed measurements of one file of benchmarks/speed."""
    path = root / f"benchmarks/speed/{name}.csv"
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pandas.DataFrame()
    return markdown(frame.drop(columns=["GFLOP", "GEMM GFLOP/s"], errors="ignore").rename(columns=str.capitalize))


def comparison_table(folder: Path) -> str:
    """Accuracies, costs, and how to read them, of a recorded comparison."""
    plan, scores = read_plan(folder), load_scores(folder / "scores.csv")
    devices = "; ".join(scores[["device", "precision"]].drop_duplicates().agg(", ".join, axis=1))
    about = f"{plan.data}, {plan.budget}, arena {plan.hash}; {devices}; commit {', '.join(scores['commit'].unique())}."
    table, reading = main_table(scores, plan)
    cells = table.map(lambda cell: cell.replace("\n", "<br>"))
    if ARENAS[plan.arena].held_out:  # trials of one evaluation, whose costs are in the ledger
        return f"{about} {reading}\n\n{markdown(cells)}"
    depth = f"Location probe after each block, chance {100 / plan.cells:.1f}:\n\n{markdown(location(scores))}"
    said = f"What the papers claim, as differences of two methods:\n\n{markdown(claims(scores))}"
    return f"{about} {reading}\n\n{markdown(cells)}\n{said}\n{depth}\n{markdown(costs(scores, plan))}"


def means_table(folder: Path) -> str:
    """Of a comparison only the accuracies of classifiers, and of a cell only the mean with its interval."""
    table = accuracies(competing(load_scores(folder / "scores.csv"))).drop(columns=["shuffled", "location"], errors="ignore")
    return markdown(table.map(lambda cell: re.split(", rank|\n", cell)[0]))


def attention_table(root: Path) -> str:
    """The committed attention measurements: milliseconds, and how many times the floor of moved bytes that is."""
    path = root / "benchmarks/speed/attention.csv"
    if not path.exists():
        return markdown(pandas.DataFrame())
    parts = [wide(lines).assign(device=device) for device, lines in pandas.read_csv(path).groupby("device", sort=False)]
    return markdown(pandas.concat(parts).astype(str).rename(columns=str.capitalize))


if __name__ == "__main__":
    sys.exit(main())
