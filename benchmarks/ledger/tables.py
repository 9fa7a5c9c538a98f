"""Every table of numbers in the READMEs, made from the CSV files of results, published numbers and speed.

A README asks for a table with the line `<!-- table: NAME -->` and ends it with `<!-- /table -->`; what stands between is replaced.
`python -m benchmarks.ledger` writes, `--check` only says what is stale.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from benchmarks.ledger.overview import results_table, together_table
from benchmarks.ledger.published import (
    NOT_YET,
    STARTS,
    alike,
    arm_of,
    claims,
    closeness,
    links,
    markdown,
    measured,
    number,
    of_arm,
    pairs,
    protocol,
    published,
    stem,
    title,
)
from benchmarks.ledger.rows import GROUP, load, summary
from benchmarks.papers import BASELINES, ROOT, baselines, folder, papers
from benchmarks.speed.measure import wide

MARKER = re.compile(r"^[ \t]*<!--[ \t]*(?:table:[ \t]*(.*?)|(/table))[ \t]*-->[ \t]*$", re.MULTILINE)
OPEN, CLOSE = "<!-- table: {} -->", "<!-- /table -->"


def comparison(paper: str, rows: pandas.DataFrame, root: Path = ROOT) -> pandas.DataFrame:
    """What a run says at its end: each protocol's number beside its baseline's and beside a published one of the same protocol.

    `rows` has the columns of `benchmarks.ledger.rows.Row`. The published number is the one nearest to the run (same data, then backbone,
    then epochs) and carries its setting; it is there to be read, and the difference is between our own two numbers.
    """
    table, own = [], list(claims(paper, root).itertuples())
    for line, others in pairs(summary(rows)):
        near = max((row for row in own if of_arm(row, line) and alike(row, line)), key=partial(closeness, line=line), default=None)
        scratch = next(others[others["start"].isin(["scratch", "random"])].itertuples(), None)
        table.append(
            {
                "Protocol": protocol(line),
                "Ours": number(line, seeds=False),
                "From scratch": number(scratch, seeds=False) if scratch else "-",
                "Difference": f"{line.mean - scratch.mean:+.2f}" if scratch else "-",
                "Published": f"{near.value} ({title(near.dataset)}, {title(near.backbone)}, {near.pretrain_epochs or '?'} ep)"
                if near
                else "-",
            }
        )
        for pixels in others[others["start"] == "pixels"].itertuples():
            table.append(
                dict.fromkeys(table[-1], "-") | {"Protocol": f"{protocol(line)}, raw pixels", "From scratch": number(pixels, seeds=False)}
            )
    return pandas.DataFrame(table)


def side_by_side(paper: str, lines: pandas.DataFrame, root: Path = ROOT) -> pandas.DataFrame:
    """A method alone and with what is added to it in one row: our arms "a" and "a+b" of a summary, published methods "A" and "A + B".

    In brackets is the difference to the method alone, ours to ours and theirs to theirs. What was published of the same data and backbone
    stands beside every arm; what nobody measured follows, without a log. Any metric but top-1 needs a published one of its data.
    """
    own: dict[tuple, dict[str, tuple[Any, pandas.DataFrame]]] = {}  # by what is added: our line and its baselines
    for line, others in pairs(lines):
        key = (stem(line.recipe), *(getattr(line, name) for name in GROUP if name not in ("recipe", "start")))
        own.setdefault(key, {})[arm_of(line.recipe).partition("+")[2].upper()] = line, others
    known: dict[tuple, dict[str, Any]] = {}  # by what is added: the published row
    for row in published(paper, root).query("confidence == 'first_hand' and metric in ('top1', 'top5')").itertuples():
        alone, added = (part.strip() for part in row.method.partition("+")[::2])
        key = (alone, row.dataset, row.backbone, row.pretrain_epochs, row.setting, row.protocol, row.metric)
        known.setdefault(key, {})[added.upper()] = row
    varied = [(next(iter(theirs.values())), theirs) for theirs in known.values() if any(theirs)]
    entries: list[tuple[dict, dict]] = []
    for ours in own.values():
        line, _ = next(iter(ours.values()))
        near = [theirs for row, theirs in varied if alike(row, line) and all(closeness(row, line)[:2])]
        if line.metric == "top1" or any(row.metric == line.metric and closeness(row, line)[0] for row, _ in varied):
            entries.append((ours, near[0] if near else {}))
    entries += [({}, theirs) for _, theirs in varied if all(theirs is not beside_ours for _, beside_ours in entries)]
    variants = dict.fromkeys(["", *(added for entry in entries for numbers in entry for added in numbers)])
    table = []
    for ours, theirs in entries:
        line, others = next(iter(ours.values()), (None, lines[:0]))
        starts = others[others["start"] != getattr(line, "start", "")].itertuples()
        row = next(iter(theirs.values()), None)
        said = {added: (number(one, seeds=False), one.mean) for added, (one, _) in ours.items()}
        printed = {added: (one.value, float(one.value)) for added, one in theirs.items()}
        logs = " ".join([*(one.log for one, _ in ours.values()), *others["log"]])
        cells = {
            "Data": title(line.data if line else row.dataset),
            "Family": stem(line.recipe).partition(" ")[2] if line else row.method.partition("+")[0].strip(),
            "Backbone": title((line or row).backbone),
            "Epochs": str((line or row).pretrain_epochs),
            "Protocol": protocol(line or row),
            **{f"+ {added}" if added else "Alone": against(said, added, NOT_YET if added in theirs else "") for added in variants},
            "From scratch": "; ".join(number(start, seeds=False) + STARTS[start.start] for start in starts),
            **{f"Published + {added}" if added else "Published alone": against(printed, added) for added in variants},
            "Log": links(logs, root, root / folder(paper, root)),
        }
        table.append({name: cell or "-" for name, cell in cells.items()})
    return pandas.DataFrame(table)


def published_table(paper: str, root: Path) -> str:
    """A paper's published numbers, second-hand and third-party ones marked as such."""
    frame = published(paper, root)
    names = ["method", "backbone", "dataset", "pretrain_epochs", "setting", "protocol", "metric", "value", "source", "confidence"]
    frame = frame[names].replace({"confidence": "_", "protocol": "_", "metric": "_"}, " ", regex=True)
    frame["dataset"] = [title(name) for name in frame["dataset"]]
    frame = frame.rename(columns={"dataset": "data", "pretrain_epochs": "epochs"}).rename(columns=str.capitalize)
    return markdown(frame, nothing="no published number is known")


def measured_table(paper: str, root: Path) -> str:
    """A paper's measured numbers, baselines included, with what is needed to repeat them."""
    table = [
        {
            "Data": title(line.data),
            "Recipe": line.recipe,
            "Backbone": line.backbone,
            "Epochs": line.pretrain_epochs,
            "Protocol": line.protocol.replace("_", " "),
            "Start": line.start,
            "Metric": line.metric.replace("_", " "),
            "Mean ± sd": number(line),
            "Device": f"{line.device}, {line.precision}",
            "Hours": f"{line.hours:.2g}" if line.hours < 10 else f"{line.hours:.0f}",
            "Commit": line.commit,
            "Log": links(line.log, root, root / folder(paper, root)),
        }
        for line in measured(paper, root).itertuples()
    ]
    return markdown(pandas.DataFrame(table))


def speed_table(root: Path) -> str:
    """The committed speed measurements."""
    path = root / "benchmarks/speed/steps.csv"
    if not path.exists():
        return markdown(pandas.DataFrame())
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False).drop(columns=["GFLOP", "GEMM GFLOP/s"], errors="ignore")
    return markdown(frame.rename(columns=str.capitalize))


def attention_table(root: Path) -> str:
    """The committed attention measurements: milliseconds, and how many times the floor of moved bytes that is."""
    path = root / "benchmarks/speed/attention.csv"
    if not path.exists():
        return markdown(pandas.DataFrame())
    frame = pandas.read_csv(path)
    parts = [wide(lines).assign(device=device) for device, lines in frame.groupby("device", sort=False)]
    return markdown(pandas.concat(parts).astype(str).rename(columns=str.capitalize))


def adds(paper: str, root: Path) -> bool:
    """Whether a paper adds something to other methods, in what was published or measured."""
    with suppress(ValueError):  # a broken ledger is named by the tables that are made from it
        return "+" in " ".join([*published(paper, root)["method"], *load(root / folder(paper, root) / "results.csv")["recipe"].map(arm_of)])
    return False


def against(numbers: Mapping[str, tuple[str, float]], added: str, missing: str = "") -> str:
    """The number with something added to the method, in brackets the difference to the method alone."""
    text, value = numbers.get(added, (missing, 0.0))
    return f"{text} ({value - numbers[''][1]:+.2f})" if added in numbers and "" in numbers and added else text


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
    """Write every table, or with `check` none. Returns a line for each stale table and one for each fault that writing cannot mend."""
    readmes: dict[str, dict[str, Callable[[], str]]] = {
        "README.md": {
            "results": partial(results_table, root),
            "together": partial(together_table, root),
            "speed": lambda: speed_table(root),
        },
        "benchmarks/README.md": {"speed": lambda: speed_table(root), "attention": lambda: attention_table(root)},
    }
    for paper in papers(root):
        readmes[f"{paper}/README.md"] = {
            "published": partial(published_table, paper, root),
            "measured": partial(measured_table, paper, root),
            "side by side": lambda paper=paper: markdown(side_by_side(paper, measured(paper, root), root)),
        }
    for name in baselines(root):
        readmes.setdefault(f"{BASELINES}/README.md", {}).update(
            {
                f"published {name}": partial(published_table, name, root),
                f"measured {name}": partial(measured_table, name, root),
            }
        )
    stale, faults = [], []
    for where, tables in readmes.items():
        readme = root / where
        text = readme.read_text(encoding="utf-8") if readme.exists() else ""
        optional = {"speed", "attention", *([] if adds(Path(where).parent.name, root) else ["side by side"])}
        absent = tables.keys() - optional - {marker[1] for marker in MARKER.finditer(text)}
        faults += [f"{where}: table {name!r} is missing: add the lines {OPEN.format(name)} and {CLOSE}" for name in sorted(absent)]
        try:
            filled, old = fill(text, tables, where)
            if old and not check:
                readme.write_text(filled, encoding="utf-8")
            stale += old
            if any(name.startswith("measured") for name in tables):
                logs = load(readme.parent / "results.csv")["log"].unique()
                lost = [log for log in logs if not (root / log).is_file()]
                faults += [f"{readme.parent.name}/results.csv: the log {log!r} is missing, so no number of it is shown" for log in lost]
        except ValueError as error:
            faults.append(str(error))
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
