"""The table of a comparison: means with 95 % intervals, and paired differences from the references."""

import math
from collections.abc import Mapping

import pandas
from rich.table import Table

from benchmarks.compare.arena import REFERENCES, Entry, enter
from benchmarks.compare.statistics import LEAST, differences, means
from common.run import console

COSTS = {"images_per_second": "images/s", "gflop_per_image": "GFLOP/image", "memory_gb": "memory GB", "minutes": "minutes"}
SHORT = {
    "finetune": "fine-tuned",
    "finetune_20_per_class": "20 per class",
    "finetune_5_per_class": "5 per class",
    "finetune_shuffled": "shuffled",
}


def cells(scores: pandas.DataFrame, references: tuple[str, ...] = REFERENCES) -> pandas.DataFrame:
    """A row for each method, a column for each evaluation; a cell has the mean ± half of the interval, then a line for each reference
    with the paired difference, or `undecided` and the smallest difference that these seeds could have shown."""
    measured = scores[(scores["evaluation"] != "failed") & ~scores["evaluation"].str.startswith("cost_")]
    averages = means(measured).set_index(["method", "evaluation"])
    against = {reference: differences(measured, reference).set_index(["method", "evaluation"]) for reference in references}
    evaluations = _order(measured["evaluation"].unique())
    rows = {}
    for method in scores["method"].unique():
        failed = scores[(scores["method"] == method) & (scores["evaluation"] == "failed")]
        rows[method] = {SHORT.get(name, name): _cell(method, name, averages, against) for name in evaluations}
        for name, title in COSTS.items():
            values = scores.loc[(scores["method"] == method) & (scores["evaluation"] == f"cost_{name}"), "value"]
            rows[method][title] = f"{values.median():.3g}" if len(values) else "-"
        if len(failed):
            rows[method]["failed"] = "; ".join(f"seed {row.seed}: {row.note}" for row in failed.itertuples())
    return pandas.DataFrame.from_dict(rows, orient="index").fillna("")


def _cell(method: str, evaluation: str, averages: pandas.DataFrame, against: Mapping[str, pandas.DataFrame]) -> str:
    if (method, evaluation) not in averages.index:
        return "-"
    own = averages.loc[(method, evaluation)]
    lines = [f"{own['mean']:.1f}" + ("" if math.isnan(own["half"]) else f" ± {own['half']:.1f}")]
    for reference, table in against.items():
        if (method, evaluation) in table.index:
            found = table.loc[(method, evaluation)]
            text = f"{found['difference']:+.1f} ± {found['half']:.1f}" if found["decided"] else f"undecided, ± {found['half']:.1f}"
            lines.append(f"{text} vs {reference}")
    return "\n".join(lines)


def _order(evaluations) -> list[str]:
    """Fine-tuning, probes, k-NN, and of the location probe only the last block."""
    blocks = sorted((name for name in evaluations if name.startswith("location_")), key=lambda name: int(name.rpartition("_")[2]))
    first = [name for name in ("finetune", "finetune_20_per_class", "finetune_5_per_class", "linear", "knn") if name in evaluations]
    return [*first, *(name for name in ("finetune_shuffled",) if name in evaluations), *blocks[-1:]]


def show(scores: pandas.DataFrame, title: str) -> None:
    """Print the table of a ledger."""
    table = cells(scores)
    screen = Table(title=title, show_lines=True)
    for column in ("method", *table.columns):
        screen.add_column(column)
    for method, row in table.iterrows():
        screen.add_row(str(method), *row)
    console.print(screen, soft_wrap=False)
    seeds = scores["seed"].nunique()
    notes = [
        "Percent of the test images; mean over seeds ± half of the 95 % t interval. Differences are paired over seeds; decided by Holm's"
    ]
    notes += ["correction over the methods of a column (5 %). `undecided, ± x`: these seeds could not have shown a difference below x."]
    notes += [f"{seeds} seeds decide nothing: use {LEAST} or more."] if seeds < LEAST else []
    console.print("\n".join(notes), markup=False)


def markdown(scores: pandas.DataFrame) -> str:
    """The table for a page."""
    table = cells(scores).reset_index(names="method")
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(str(cell).replace("\n", "<br>") for cell in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def differing(methods: Mapping[str, Entry], arena) -> pandas.DataFrame:
    """What the arena does not make equal."""
    rows = {}
    for name, entry in methods.items():
        recipe = enter(arena, entry, 100)
        options = recipe.encoder
        rows[name] = {
            "class token": "yes" if options.get("class_token", True) else "no",
            "positions": options.get("position", "sincos"),
            "feature": recipe.protocols[0].pool,
            "labels in pre-training": "all" if recipe.supervised else "none",
            "batch": recipe.pretrain.batch_size,
            "learning rate": f"{recipe.pretrain.lr:.2g}",
        }
    return pandas.DataFrame.from_dict(rows, orient="index").reset_index(names="method")
