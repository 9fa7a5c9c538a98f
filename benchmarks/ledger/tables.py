"""Tables of one paper: what a run prints at its end, and what `make table` writes into the paper's README."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from rich.table import Table

from benchmarks.ledger.published import KIN, claims, matches, measured, published, reproductions, title, with_baselines
from benchmarks.ledger.rows import Row, frame, summary
from benchmarks.papers import ROOT, folder
from common.run import console

NOT_YET = "not measured yet"
FAMILY = [*KIN, "pretrain_epochs", "precision"]  # what our arms share that stand in one row
SAME = ["method", "backbone", "data", "pretrain_epochs", "protocol", "metric"]  # of a published number and what others report of it
PRINTED = ["family", "data", "backbone", "pretrain_epochs", "setting", "protocol", "metric"]  # the same of published numbers


def show(paper: str, rows: Sequence[Row], root: Path = ROOT) -> None:
    """Print a run's numbers, in percent, with their baselines; arms side by side.

    Published numbers stand in the table only where they are of the same data. Else a line below it says what the paper reports.
    """
    ledger, first = frame(rows), rows[0]
    lines = summary(ledger)
    backbones = [name for name in ledger["backbone"].unique() if ledger["backbone"].nunique() == 1]
    training = "training" if first.protocol == "scratch" else "pre-training"
    what = [paper, first.data, *backbones, f"{first.pretrain_epochs} epochs of {training}", counted(ledger["seed"].nunique(), "seed")]
    heading = ", ".join(what)
    scratch = "; from scratch: the same training without pre-training, for linear and knn a random encoder"
    if lines["arm"].nunique() > 1 or any(lines["base_arm"] != ""):
        table = side_by_side(paper, lines, root).query("Log != '-'").drop(columns=["Data", "Backbone", "Epochs", "Log"])
        table = table.loc[:, (table != "-").any()].assign(Family=table["Family"].str.partition(" ")[0])  # all share what --set changes
        caption = "in percent; in brackets the difference to alone" + (scratch if "From scratch" in table else "")
    else:
        table, caption = comparison(paper, ledger, root), f"top-1 in percent{scratch}"
    screen = Table(title=heading, caption=caption, min_width=min(len(heading), console.width))  # so that the title stays on one line
    for column in table.columns:
        screen.add_column(column, justify="left" if column in ("Family", "Protocol", "Published") else "right")
    for cells in table.itertuples(index=False):
        screen.add_row(*cells)
    console.print(screen, soft_wrap=False)
    if not any(column.startswith("Published") for column in table.columns):
        console.print(reported(paper, lines, root), markup=False, highlight=False)


def comparison(paper: str, rows: pandas.DataFrame, root: Path = ROOT) -> pandas.DataFrame:
    """One row per protocol: our number, its baseline, and a published number on the same data. Raw pixels have their own rows.

    `rows` is a ledger. The published number is the nearest (same backbone, then same epochs), in a column that is absent where there is
    none. The difference is between our own two numbers.
    """
    lines, table = with_baselines(summary(rows)), []
    near = matches(claims(paper, root), lines).query("same_data")
    near = near.sort_values(["same_backbone", "same_epochs"], kind="stable", ascending=False).drop_duplicates("line").set_index("line")
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
    """A published number of `matches` with its setting: 83.0 (ImageNet-1K, ViT-B/16, 200 ep)."""
    epochs = pair["pretrain_epochs_published"] or "?"
    return f"{pair['value']} ({title(pair['data_published'])}, {title(pair['backbone_published'])}, {epochs} ep)"


def reported(paper: str, lines: pandas.DataFrame, root: Path = ROOT) -> str:
    """A sentence with a published number on other data: of one of our protocols if there is one, else the first of the paper."""
    own = claims(paper, root).query("metric == 'top1'")
    if own.empty:
        return f"No published number of {paper} is known."
    pairs = matches(own, lines)
    row = own.loc[pairs["row"].iloc[0] if len(pairs) else own.index[0]]
    epochs = f"{row['pretrain_epochs']} epochs" * (row["pretrain_epochs"] != "")
    of = [row["method"] * (row["added"] != ""), title(row["backbone"]), epochs, row["setting"]]
    what = f"{protocol(row)} {row['value']} on {title(row['data'])} ({', '.join(filter(None, of))})"
    return f"The paper reports {what}; all published numbers: {(folder(paper, root) / 'README.md').as_posix()}"


def side_by_side(paper: str, lines: pandas.DataFrame, root: Path = ROOT) -> pandas.DataFrame:
    """One row for a method alone and with additions: the arms of a family in a summary, and published methods "A" and "A + B".

    In brackets is the difference to the method alone, ours to ours and theirs to theirs. What was published of the same data and backbone
    stands beside ours; what nobody measured follows, without a log. Any metric but top-1 needs a published one of its data.
    """
    ours = with_baselines(lines)
    theirs = published(paper, root).query("confidence == 'first_hand' and metric in ('top1', 'top5')")
    ours["group"], theirs["group"] = (part.groupby(by, sort=False).ngroup() for part, by in ((ours, FAMILY), (theirs, PRINTED)))
    day = ours.groupby("group")["date"].transform("max")  # of several devices the newest counts
    ours = ours[day == day.groupby([ours[name] for name in FAMILY if name != "device"]).transform("max")]
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
    """The number of a method with an addition, and in brackets the difference from the method alone."""
    text, value = numbers.get(added, (missing, 0.0))
    return f"{text} ({value - numbers[''][1]:+.2f})" if added in numbers and "" in numbers and added else text


def published_table(paper: str, root: Path) -> str:
    """All published numbers of a paper; numbers from other sources than the paper are marked. What others report stands in a last column.

    A report is beside the published number of the same method, backbone, data, epochs, protocol and metric; of several beside the one
    without a setting, else the first. Without such a number it has a row of its own.
    """
    theirs = published(paper, root)
    reports: dict[tuple[str, ...], list[str]] = {}
    for report in reproductions(paper, root).itertuples():
        said = f"{report.value} ([{report.who}]({report.link}){f', {report.setting}' * bool(report.setting)})"
        reports.setdefault(tuple(getattr(report, name) for name in SAME), []).append(said)
    first = theirs.sort_values("setting", key=lambda settings: settings != "", kind="stable").drop_duplicates(SAME)
    keys = pandas.MultiIndex.from_frame(theirs[SAME])
    theirs["others"] = [
        "<br>".join(reports.pop(key, [])) if row in first.index else "" for row, key in zip(theirs.index, keys, strict=True)
    ]
    alone = [dict(zip(SAME, key, strict=True)) | {"value": "-", "others": "<br>".join(said)} for key, said in reports.items()]
    frame = pandas.concat([theirs, pandas.DataFrame(alone).reindex(columns=theirs.columns, fill_value="")])
    columns = ["method", "backbone", "data", "pretrain_epochs", "setting", "protocol", "metric", "value", "source", "confidence"]
    frame = frame[[*columns, *["others"] * any(frame["others"] != "")]].rename(columns={"pretrain_epochs": "epochs"})
    frame = frame.assign(data=frame["data"].map(title)).replace(dict.fromkeys(["confidence", "protocol", "metric"], "_"), " ", regex=True)
    frame = frame.rename(columns=str.capitalize).rename(columns={"Others": "Others' reproductions"})
    return markdown(frame, nothing="no published number is known")


def measured_table(paper: str, root: Path) -> str:
    """All measured numbers of a paper and their baselines, with device, commit and log."""
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


def run_name(line: Any) -> str:
    """The name of a run: the recipe, the arm, and the overrides and files that were given."""
    given = [f"encoder={line.encoder_file}" * bool(line.encoder_file), f"split={line.split}" * bool(line.split)]
    return " ".join(filter(None, [line.recipe, line.arm, line.overrides, *given]))


def protocol(line: Any) -> str:
    """The protocol in words, with the metric if it is not top-1."""
    return (line.protocol if line.metric == "top1" else f"{line.protocol} ({line.metric})").replace("_", " ")


def number(mean: float, sd: float) -> str:
    """Mean and standard deviation with two decimals; only the mean for one seed; empty without a number."""
    if pandas.isna(mean):
        return ""
    return f"{mean:.2f}" if pandas.isna(sd) else f"{mean:.2f} ± {sd:.2f}"


def counted(many: int, what: str) -> str:
    """A count with its noun: "1 seed", "3 seeds"."""
    return f"{many} {what}{'' if many == 1 else 's'}"


def baseline_text(line: Any) -> str:
    """The baselines of a line of `with_baselines`: "40.00, random encoder; 95.00, raw pixels"."""
    beside = [(line.untrained_mean, line.untrained_sd, ", random encoder" * (line.untrained_start == "random"))]
    beside += [(line.pixels_mean, line.pixels_sd, ", raw pixels")]
    return "; ".join(number(mean, sd) + what for mean, sd, what in beside if pandas.notna(mean))


def log_link(logs: Iterable[str], root: Path, folder: Path) -> str:
    """A link to the first of the logs, relative to a README in `folder`, with the number of logs. Empty without a log.

    `logs` are those of several summary lines, each with spaces between its own.
    """
    paths = [*dict.fromkeys(" ".join(logs).split())]
    label = "log" if len(paths) == 1 else f"log 1 of {len(paths)}"
    return f"[{label}]({Path(os.path.relpath(root / paths[0], folder)).as_posix()})" if paths else ""


def markdown(frame: pandas.DataFrame, nothing: str = NOT_YET) -> str:
    """A data frame of text and integers as a Markdown table. An empty cell is a dash; a table without rows is `nothing`."""
    if frame.empty:
        return f"{nothing}\n"
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.replace("", "-").itertuples(index=False)]
    return "".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |\n" for row in rows)
