"""Every table of numbers, made from the CSV files of results, published numbers and speed: in the READMEs and in RESULTS.md.

A page asks for a table with the line `<!-- table: NAME -->` and ends it with `<!-- /table -->`; what stands between is replaced.
`python -m benchmarks.ledger` writes, `--check` only says what is stale.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas

from benchmarks.ledger.cells import NOT_YET, baseline_text, counted, log_link, markdown, number, protocol, run_name
from benchmarks.ledger.overview import digits_table, results_table, together_table
from benchmarks.ledger.published import KIN, matches, measured, published, title, with_baselines
from benchmarks.ledger.rows import load
from benchmarks.papers import BASELINES, ROOT, baselines, folder, papers
from benchmarks.speed.measure import wide

MARKER = re.compile(r"^[ \t]*<!--[ \t]*(?:table:[ \t]*(.*?)|(/table))[ \t]*-->[ \t]*$", re.MULTILINE)
OPEN, CLOSE = "<!-- table: {} -->", "<!-- /table -->"
FAMILY = [*KIN, "pretrain_epochs", "precision"]  # what our arms share that stand in one row
PRINTED = ["family", "data", "backbone", "pretrain_epochs", "setting", "protocol", "metric"]  # the same of published numbers
Tables = dict[str, Callable[[], str]]  # by name


def side_by_side(paper: str, lines: pandas.DataFrame, root: Path = ROOT) -> pandas.DataFrame:
    """A method alone and with what is added to it in one row: the arms of a family in a summary, published methods "A" and "A + B".

    In brackets is the difference to the method alone, ours to ours and theirs to theirs. What was published of the same data and backbone
    stands beside ours; what nobody measured follows, without a log. Any metric but top-1 needs a published one of its data.
    """
    ours = with_baselines(lines)
    theirs = published(paper, root).query("confidence == 'first_hand' and metric in ('top1', 'top5')")
    ours["group"], theirs["group"] = (part.groupby(by, sort=False).ngroup() for part, by in ((ours, FAMILY), (theirs, PRINTED)))
    theirs = theirs[theirs["group"].isin(theirs.query("added != ''")["group"])]
    pairs = matches(theirs, ours).query("same_data")
    ours = ours[(ours["metric"] == "top1") | ours["group"].isin(pairs["group"])]
    near = (
        pairs.query("same_backbone").drop_duplicates("group").set_index("group")["group_published"]
    )  # of each group of ours one of theirs
    entries = [(own, theirs[theirs["group"] == near.get(group)]) for group, own in ours.groupby("group")]
    entries += [(ours[:0], rows) for group, rows in theirs.groupby("group") if group not in near.to_numpy()]
    variants = dict.fromkeys(["", *(added.upper() for entry in entries for part in entry for added in part["added"])])
    table = []
    for own, rows in entries:
        one = next((own if len(own) else rows).itertuples())
        said = {line.added.upper(): (number(line.mean, line.sd), line.mean) for line in own.itertuples()}
        printed = {row.added.upper(): (row.value, float(row.value)) for row in rows.itertuples()}
        cells = {
            "Data": title(one.data),
            "Family": f"{one.family} {one.overrides}".strip() if said else one.family,
            "Backbone": title(one.backbone),
            "Epochs": str(one.pretrain_epochs),
            "Protocol": protocol(one),
            **{f"+ {added}" if added else "Alone": against(said, added, NOT_YET if added in printed else "") for added in variants},
            "From scratch": baseline_text(one) if said else "",
            **{f"Published + {added}" if added else "Published alone": against(printed, added) for added in variants},
            "Log": log_link([*own["log"], *own["untrained_log"].dropna(), *own["pixels_log"].dropna()], root, root / folder(paper, root)),
        }
        table.append({name: cell or "-" for name, cell in cells.items()})
    return pandas.DataFrame(table)


def against(numbers: Mapping[str, tuple[str, float]], added: str, missing: str = "") -> str:
    """The number with something added to the method, in brackets the difference to the method alone."""
    text, value = numbers.get(added, (missing, 0.0))
    return f"{text} ({value - numbers[''][1]:+.2f})" if added in numbers and "" in numbers and added else text


def published_table(paper: str, root: Path) -> str:
    """A paper's published numbers, second-hand and third-party ones marked as such."""
    frame = published(paper, root).rename(columns={"pretrain_epochs": "epochs"})
    frame = frame[["method", "backbone", "data", "epochs", "setting", "protocol", "metric", "value", "source", "confidence"]]
    frame = frame.assign(data=frame["data"].map(title)).replace(dict.fromkeys(["confidence", "protocol", "metric"], "_"), " ", regex=True)
    return markdown(frame.rename(columns=str.capitalize), nothing="no published number is known")


def measured_table(paper: str, root: Path) -> str:
    """A paper's measured numbers, baselines included, with what is needed to repeat them."""
    table = [
        {
            "Data": title(line.data),
            "Run": run_name(line),
            "Backbone": line.backbone,
            "Epochs": line.pretrain_epochs,
            "Protocol": line.protocol.replace("_", " "),
            "Start": line.start,
            "Metric": line.metric.replace("_", " "),
            "Mean ± sd": f"{number(line.mean, line.sd)} ({counted(line.seeds, 'seed')})",
            "Device": f"{line.device}, {line.precision}",
            "Hours": f"{line.hours:.2g}" if line.hours < 10 else f"{line.hours:.0f}",
            "Commit": line.commit,
            "Log": log_link([line.log], root, root / folder(paper, root)),
        }
        for line in measured(paper, root).itertuples()
    ]
    return markdown(pandas.DataFrame(table))


def speed_table(root: Path) -> str:
    """The committed speed measurements, in seconds a step."""
    path = root / "benchmarks/speed/steps.csv"
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pandas.DataFrame()
    return markdown(frame.drop(columns=["GFLOP", "GEMM GFLOP/s"], errors="ignore").rename(columns=str.capitalize))


def attention_table(root: Path) -> str:
    """The committed attention measurements: milliseconds, and how many times the floor of moved bytes that is."""
    path = root / "benchmarks/speed/attention.csv"
    if not path.exists():
        return markdown(pandas.DataFrame())
    parts = [wide(lines).assign(device=device) for device, lines in pandas.read_csv(path).groupby("device", sort=False)]
    return markdown(pandas.concat(parts).astype(str).rename(columns=str.capitalize))


def pages(root: Path) -> dict[str, Tables]:
    """The tables of every page, by its path."""
    found: dict[str, Tables] = {
        "README.md": {"digits": partial(digits_table, root), "speed": partial(speed_table, root)},
        "RESULTS.md": {"results": partial(results_table, root), "together": partial(together_table, root)},
        "benchmarks/README.md": {"speed": partial(speed_table, root), "attention": partial(attention_table, root)},
    }
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
            optional = {"speed", "attention"}
            if any(name.startswith("measured") for name in tables):
                ledger = load(page.parent / "results.csv")
                lost = [log for log in ledger["log"].unique() if not (root / log).is_file()]
                faults += [f"{page.parent.name}/results.csv: the log {log!r} is missing, so no number of it is shown" for log in lost]
                adds = any(ledger["base_arm"] != "") or any(published(page.parent.name, root)["added"] != "")
                optional |= set() if adds else {"side by side"}  # a paper that adds nothing to another method needs none
        except ValueError as error:
            faults.append(str(error))
            optional = tables.keys()
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
        print(f"{line} is stale: mend it with `make table`" if check else f"{line} written")
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return int(bool(faults or (check and stale)))
