"""Every table of numbers, made from the CSV files of results, published numbers and speed: in the READMEs, RESULTS.md and on the screen.

A page asks for a table with the line `<!-- table: NAME -->` and ends it with `<!-- /table -->`; what stands between is replaced.
`python -m benchmarks.ledger` writes, `--check` only says what is stale.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pandas
from rich.table import Table

from benchmarks.ledger.overview import digits_table, results_table, together_table
from benchmarks.ledger.published import (
    KIN,
    NOT_YET,
    claims,
    counted,
    log_link,
    markdown,
    matches,
    measured,
    number,
    protocol,
    published,
    run_name,
    title,
    with_baselines,
)
from benchmarks.ledger.rows import Row, frame, load, summary
from benchmarks.papers import BASELINES, ROOT, baselines, folder, papers
from benchmarks.speed.measure import wide
from common.run import console

MARKER = re.compile(r"^[ \t]*<!--[ \t]*(?:table:[ \t]*(.*?)|(/table))[ \t]*-->[ \t]*$", re.MULTILINE)
OPEN, CLOSE = "<!-- table: {} -->", "<!-- /table -->"
PRINTED = ["family", "dataset", "backbone", "pretrain_epochs", "setting", "protocol", "metric"]  # of one method, alone or with an addition
BESIDE = {"scratch": "", "random": ", random encoder", "pixels": ", raw pixels"}  # how a baseline is called beside its method


def show(paper: str, rows: Sequence[Row], root: Path = ROOT) -> None:
    """Print a run's numbers, in percent, with their baselines; arms side by side.

    Published numbers stand in the table only where they are of the same data. Else a line below it says what the paper reports.
    """
    ledger, first = frame(rows), rows[0]
    lines = summary(ledger)
    backbones = [name for name in ledger["backbone"].unique() if ledger["backbone"].nunique() == 1]
    training = "training" if first.protocol == "scratch" else "pre-training"
    what = [paper, first.data, *backbones, f"{first.pretrain_epochs} epochs of {training}", counted(ledger["seed"].nunique(), "seed")]
    scratch = "; from scratch: the same training without pre-training, for linear and knn a random encoder"
    if lines["arm"].nunique() > 1 or any(lines["base_arm"] != ""):
        table = side_by_side(paper, lines, root).query("Log != '-'").drop(columns=["Data", "Backbone", "Epochs", "Log"])
        table = table.loc[:, (table != "-").any()].assign(Family=table["Family"].str.partition(" ")[0])  # all share what --set changes
        caption = "in percent; in brackets the difference to alone" + (scratch if "From scratch" in table else "")
    else:
        table, caption = comparison(paper, ledger, root), f"top-1 in percent{scratch}"
    screen = Table(title=", ".join(what), caption=caption)
    for column in table.columns:
        screen.add_column(column, justify="left" if column in ("Family", "Protocol", "Published") else "right")
    for cells in table.itertuples(index=False):
        screen.add_row(*cells)
    console.print(screen, soft_wrap=False)
    if not any(column.startswith("Published") for column in table.columns):
        console.print(reported(paper, lines, root), markup=False, highlight=False)


def comparison(paper: str, rows: pandas.DataFrame, root: Path = ROOT) -> pandas.DataFrame:
    """Each protocol's number beside its baseline's and a published one of the same data and protocol; raw pixels in rows of their own.

    `rows` is a ledger. The published number is the nearest (same backbone, then same epochs), in a column that is absent where there is
    none. The difference is between our own two numbers.
    """
    lines, table = with_baselines(summary(rows)), []
    near = matches(claims(paper, root), lines).query("same_data").sort_values(["same_backbone", "same_epochs"], kind="stable", ascending=False)
    near = near.drop_duplicates("line").set_index("line")
    for line in lines.itertuples():
        scratch = number(line.untrained_mean, line.untrained_sd)
        cells = {
            "Protocol": protocol(line),
            "Ours": number(line.mean, line.sd),
            "From scratch": scratch or "-",
            "Difference": f"{line.mean - line.untrained_mean:+.2f}" if scratch else "-",
        }
        if len(near):
            cells["Published"] = printed(near.loc[line.Index]) if line.Index in near.index else "-"
        table.append(cells)
        if pixels := number(line.pixels_mean, line.pixels_sd):
            table.append(dict.fromkeys(cells, "-") | {"Protocol": f"{protocol(line)}, raw pixels", "From scratch": pixels})
    return pandas.DataFrame(table)


def printed(pair: pandas.Series) -> str:
    """A published number of `matches` with what it is of: 83.0 (ImageNet-1K, ViT-B/16, 200 ep)."""
    epochs = pair["pretrain_epochs_published"] or "?"
    return f"{pair['value']} ({title(pair['dataset'])}, {title(pair['backbone_published'])}, {epochs} ep)"


def reported(paper: str, lines: pandas.DataFrame, root: Path = ROOT) -> str:
    """A sentence on what the paper reports, on other data than ours where need be: of a protocol of ours if there is one, else the first."""
    own = claims(paper, root).query("metric == 'top1'")
    if own.empty:
        return f"No published number of {paper} is known."
    pairs = matches(own, lines)
    row = own.loc[pairs["row"].iloc[0] if len(pairs) else own.index[0]]
    of = [row["method"] * (row["added"] != ""), title(row["backbone"]), f"{row['pretrain_epochs']} epochs" * (row["pretrain_epochs"] != "")]
    what = f"{protocol(row)} {row['value']} on {title(row['dataset'])} ({', '.join(filter(None, of))})"
    return f"The paper reports {what}; all published numbers: {(folder(paper, root) / 'README.md').as_posix()}"


def side_by_side(paper: str, lines: pandas.DataFrame, root: Path = ROOT) -> pandas.DataFrame:
    """A method alone and with what is added to it in one row: the arms of a family in a summary, published methods "A" and "A + B".

    In brackets is the difference to the method alone, ours to ours and theirs to theirs. What was published of the same data and backbone
    stands beside ours; what nobody measured follows, without a log. Any metric but top-1 needs a published one of its data.
    """
    ours = with_baselines(lines)
    theirs = published(paper, root).query("confidence == 'first_hand' and metric in ('top1', 'top5')")
    theirs = theirs.assign(group=theirs.groupby(PRINTED, sort=False).ngroup())
    theirs = theirs[theirs["group"].isin(theirs.query("added != ''")["group"])]
    pairs = matches(theirs, ours).query("same_data")
    entries, seen = [], set()
    for _, own in ours.groupby([*KIN, "pretrain_epochs", "precision"], sort=False):
        known = pairs[pairs["line"].isin(own.index)]
        near = known.query("same_backbone")["group"].head(1)
        if own["metric"].iloc[0] == "top1" or len(known):
            entries.append((own, theirs[theirs["group"].isin(near)]))
            seen |= {*near}
    entries += [(ours[:0], rows) for group, rows in theirs.groupby("group") if group not in seen]
    variants = dict.fromkeys(["", *(name.upper() for entry in entries for part in entry for name in part["added"])])
    table = []
    for own, rows in entries:
        said = {line.added.upper(): (number(line.mean, line.sd), line.mean) for line in own.itertuples()}
        known = {row.added.upper(): (row.value, float(row.value)) for row in rows.itertuples()}
        one = next((own if len(own) else rows.rename(columns={"dataset": "data"})).itertuples())
        starts = [start for start in ("untrained", "pixels") if len(own) and pandas.notna(getattr(one, f"{start}_mean"))]
        logs = [*own.get("log", []), *(getattr(one, f"{start}_log") for start in starts)]
        beside = [(getattr(one, f"{start}_mean"), getattr(one, f"{start}_sd"), getattr(one, f"{start}_start")) for start in starts]
        cells = {
            "Data": title(one.data),
            "Family": " ".join(filter(None, [one.family, getattr(one, "overrides", "")])),
            "Backbone": title(one.backbone),
            "Epochs": str(one.pretrain_epochs),
            "Protocol": protocol(one),
            **{f"+ {added}" if added else "Alone": against(said, added, NOT_YET if added in known else "") for added in variants},
            "From scratch": "; ".join(number(mean, sd) + BESIDE[start] for mean, sd, start in beside),
            **{f"Published + {added}" if added else "Published alone": against(known, added) for added in variants},
            "Log": log_link(" ".join(logs), root, root / folder(paper, root)),
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
            "Log": log_link(line.log, root, root / folder(paper, root)),
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
        arms = load(root / folder(paper, root) / "results.csv")["base_arm"]
        return any(arms != "") or any(published(paper, root)["added"] != "")
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
        "README.md": {"digits": partial(digits_table, root), "speed": lambda: speed_table(root)},
        "RESULTS.md": {"results": partial(results_table, root), "together": partial(together_table, root)},
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
