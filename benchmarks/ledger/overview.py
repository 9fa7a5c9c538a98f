"""The tables of RESULTS.md: our top-1 beside published numbers, and all our runs."""

from pathlib import Path, PurePosixPath
from typing import Any

import pandas

from benchmarks.compare.scores import load as load_scores
from benchmarks.compare.units import read_plan
from benchmarks.ledger.published import claims, matches, measured, title, with_baselines
from benchmarks.ledger.rows import GIVEN
from benchmarks.ledger.tables import NOT_YET, counted, markdown, number, protocol, run_name
from benchmarks.papers import baselines, papers

TASKS = ["classification", "low_shot", "linear_probe", "transfer"]
HEADINGS = {  # of protocols, in order; scratch is supervised training
    "finetune": "All labels",
    "scratch": "All labels",
    "finetune_20_per_class": "20 per class",
    "finetune_5_per_class": "5 per class",
    "linear": "Linear",
    "logistic": "Logistic",
    "knn": "k-NN",
    "location": "Location",
}
PIXELS = "raw pixels"
RUN = ["Data", "Method", "Backbone", "Epochs", "Device"]  # what tells one run from another, in words


def results_table(root: Path) -> str:
    """One row per published number that we measured too. The others are folded by paper; of baselines they are left out."""
    table, folds = [], ""
    for paper in [*papers(root), *baselines(root)]:
        rows = claims(paper, root).query("task in @TASKS and metric == 'top1'")
        rows = rows.drop_duplicates(["data", "method", "backbone", "pretrain_epochs", "setting", "protocol", "value"])
        pairs = matches(rows, with_baselines(measured(paper, root))).query("same_data and same_backbone and same_epochs")
        for pair in pairs.itertuples():
            ours = {"Epochs": pair.pretrain_epochs, "Protocol": protocol(pair), "Ours": number(pair.mean, pair.sd)}
            ours |= {"Difference": f"{pair.mean - float(pair.value):+.2f}", "Seeds": pair.seeds, "Run": run_name(pair)}
            ours |= {"Device": f"{pair.device}, {pair.precision}", "Logs": logs_link(pair.log)}
            table.append({"Paper": paper} | printed(rows.loc[pair.row]) | ours)
        missing = [printed(row) for row in rows.drop(pairs["row"]).itertuples()]
        if missing and paper in papers(root):
            summary = f"{paper}: {counted(len(missing), 'published number')}, {NOT_YET}"
            folds += f"\n<details><summary>{summary}</summary>\n\n{markdown(pandas.DataFrame(missing))}\n</details>\n"
    return markdown(pandas.DataFrame(table), nothing="No published number is measured yet.") + folds


def printed(row: Any) -> dict[str, str]:
    """The cells of a published number."""
    what = {"Data": title(row.data), "Method": row.method, "Backbone": title(row.backbone), "Setting": row.setting}
    return what | {"Epochs": row.pretrain_epochs, "Protocol": protocol(row), "Published": row.value}


def together_table(root: Path) -> str:
    """All our numbers: a row per run (mean over seeds), a column per kind of protocol."""
    return by_run(measured_lines(root))


def comparisons_table(root: Path) -> str:
    """What the recorded comparisons took: a row for each, with the time of all its runs on one core or GPU each."""
    rows = []
    for path in sorted(root.glob("benchmarks/compare/*/scores.csv")):
        plan, scores = read_plan(path.parent), load_scores(path)
        runs = scores[scores["evaluation"] == "cost_minutes"]
        devices = scores[["device", "precision"]].drop_duplicates().agg(", ".join, axis=1)
        seeds = [counted(many, "seed") for many in sorted(scores.groupby("method")["seed"].nunique().unique())]
        rows.append(
            {
                "Comparison": f"[{plan.arena}](benchmarks/compare/README.md)",
                "Data": plan.data,
                "Budget": plan.budget,
                "Methods": f"{scores['method'].nunique()}, {' or '.join(seeds)}",
                "Device": "; ".join(devices),
                "Dates": " to ".join(dict.fromkeys([scores["date"].min(), scores["date"].max()])),
                "Runs": len(runs),
                "Hours": f"{runs['value'].sum() / 60:.1f}",
                "Failed": int((scores["evaluation"] == "failed").sum()),
            }
        )
    return markdown(pandas.DataFrame(rows))


def measured_lines(root: Path) -> pandas.DataFrame:
    """The summary lines of top-1, of methods and of raw pixels, with the columns of `by_run`: RUN, `heading` and `cell`.

    A cell has the number in percent, in brackets that without pre-training, and before it what sets protocols of one heading apart.
    """
    methods, pixels = [], []
    for paper in [*papers(root), *baselines(root)]:
        lines = measured(paper, root).query("metric == 'top1'")
        own = with_baselines(lines)
        supervised = own["protocol"].eq("scratch").groupby([own[name] for name in GIVEN]).transform("any")
        names = [run_name(line._replace(recipe="") if line.recipe == line.data else line) for line in own.itertuples()]
        names = [f"{paper} {name}".strip() + ", supervised" * by_labels for name, by_labels in zip(names, supervised, strict=True)]
        methods.append(own.assign(Method=names))
        pixels.append(lines.query("start == 'pixels'").assign(Method=PIXELS, backbone="", pretrain_epochs=0))
    lines = pandas.concat([*methods, *pixels], ignore_index=True).sort_values("data", kind="stable")
    kinds = [heading(name) for name in lines["protocol"]]
    texts = [number(line.mean, line.sd) for line in lines.itertuples()]
    without = [number(line.untrained_mean, line.untrained_sd) for line in lines.itertuples()]
    return lines.assign(
        Data=lines["data"].map(title),
        Backbone=lines["backbone"].map(title),
        Epochs=lines["pretrain_epochs"],
        Device=lines["device"] + ", " + lines["precision"],
        heading=[name for name, _ in kinds],
        cell=[
            f"{detail}: " * bool(detail) + text + f" ({other})" * bool(other)
            for (_, detail), text, other in zip(kinds, texts, without, strict=True)
        ],
    )


def by_run(lines: pandas.DataFrame) -> str:
    """A table of `measured_lines`: a row per RUN, a column per heading. The devices are named above it."""
    if lines.empty:
        return markdown(lines)
    devices = {device: str(number) for number, device in enumerate(lines["Device"].unique(), 1)}
    columns = [name for name in RUN if name != "Device" or len(devices) > 1]
    above = "; ".join(f"({number}) " * ("Device" in columns) + device for device, number in devices.items())
    lines = lines.replace({"Device": devices})
    runs = lines.groupby(columns, sort=False).agg(fewest=("seeds", "min"), most=("seeds", "max"), log=("log", "first"))
    cells = lines.groupby([*columns, "heading"], sort=False)["cell"].agg(lambda cells: "<br>".join(dict.fromkeys(cells))).unstack("heading")
    table = runs.join(cells.fillna("")).reset_index()
    table["Seeds"] = [str(low) if low == high else f"{low} to {high}" for low, high in zip(table["fewest"], table["most"], strict=True)]
    table["Logs"] = table["log"].map(logs_link)
    headings = [name for name in dict.fromkeys([*HEADINGS.values(), *cells]) if name in cells]
    return f"Device{'s' * (len(devices) > 1)}: {above}.\n\n" + markdown(table[[*columns, "Seeds", *headings, "Logs"]])


def heading(protocol: str) -> tuple[str, str]:
    """The column of a protocol and its note in the cell: ("All labels", "none") for finetune_none."""
    known = max((known for known in HEADINGS if f"{protocol}_".startswith(f"{known}_")), key=len, default=protocol)
    return HEADINGS.get(known, known.replace("_", " ")), protocol.removeprefix(known).replace("_", " ").strip()


def logs_link(logs: str) -> str:
    """A link from a page at the root to the folder of a run's logs."""
    return f"[logs]({PurePosixPath(logs.split()[0]).parent})"
