"""The tables of a comparison: means with 95 % intervals and paired differences from the references; costs, and what still differs."""

import math
from collections.abc import Iterable, Mapping

import pandas
from rich.table import Table

from benchmarks.compare.arena import REFERENCES, Arena, Entry, enter
from benchmarks.compare.statistics import LEAST, differences, means
from common.run import console

TITLES = {
    "finetune": "fine-tuned",
    "finetune_20_per_class": "20 labels",
    "finetune_5_per_class": "5 labels",
    "linear": "linear",
    "knn": "k-NN",
    "finetune_shuffled": "shuffled",
}
COSTS = {"images_per_second": "images/s", "gflop_per_image": "GFLOP/image", "memory_gb": "memory, GB", "minutes": "minutes"}


def accuracies(scores: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each method, a column for each evaluation. A cell has three lines: mean ± half of the interval, and the paired difference
    from each of REFERENCES; `undecided ± x` if the seeds do not decide, where x is the smallest difference that they could have shown."""
    measured = scores[~scores["evaluation"].str.contains("^failed|^cost_|^own_")]
    averages = means(measured).set_index(["method", "evaluation"])
    against = [differences(measured, reference).set_index(["method", "evaluation"]) for reference in REFERENCES]
    rows = {}
    for method in scores["method"].unique():
        keys = {title: (method, name) for name, title in columns(measured["evaluation"].unique()).items()}
        rows[method] = {
            title: "\n".join([_mean(averages.loc[key]), *(_difference(table, key) for table in against)])
            for title, key in keys.items()
            if key in averages.index
        }
        failed = scores[(scores["method"] == method) & (scores["evaluation"] == "failed")]
        rows[method] |= {"failed": "\n".join(f"seed {row.seed}: {row.note}" for row in failed.itertuples())} if len(failed) else {}
    return pandas.DataFrame.from_dict(rows, orient="index").fillna("-").reset_index(names="Method")


def columns(evaluations: Iterable[str]) -> dict[str, str]:
    """The evaluations of the table with their titles: of the location probe only the last block."""
    names = [*evaluations]
    blocks = sorted((name for name in names if name.startswith("location_")), key=lambda name: int(name.rpartition("_")[2]))
    return {name: title for name, title in TITLES.items() if name in names} | {name: "location" for name in blocks[-1:]}


def _mean(row: pandas.Series) -> str:
    return f"{row['mean']:.1f}" + ("" if math.isnan(row["half"]) else f" ± {row['half']:.1f}")


def _difference(table: pandas.DataFrame, key: tuple[str, str]) -> str:
    if key not in table.index:
        return "-"
    found = table.loc[key]
    return f"{found['difference']:+.1f} ± {found['half']:.1f}" if found["decided"] else f"undecided ± {found['half']:.1f}"


def conditions(scores: pandas.DataFrame, arena: Arena, methods: Mapping[str, Entry]) -> pandas.DataFrame:
    """A row for each method: what the arena does not make equal, and costs (medians over seeds)."""
    rows = {}
    for name, entry in methods.items():
        recipe, options = enter(arena, entry, 100), entry.recipe.encoder
        rows[name] = {
            "Class token": "yes" if options.get("class_token", True) else "no",
            "Positions": options.get("position", "sincos"),
            "Feature": recipe.protocols[0].pool,
            "Labels in pre-training": "all" if recipe.supervised else "none",
            "Batch": str(recipe.pretrain.batch_size),
            "Learning rate": f"{recipe.pretrain.lr:.2g}",
        }
        if not entry.trains:
            rows[name] |= dict.fromkeys(("Labels in pre-training", "Batch", "Learning rate"), "-")
        for cost, title in COSTS.items():
            values = scores.loc[(scores["method"] == name) & (scores["evaluation"] == f"cost_{cost}"), "value"]
            rows[name][title] = f"{values.median():.3g}" if len(values) else "-"
    return pandas.DataFrame.from_dict(rows, orient="index").reset_index(names="Method")


def caption(scores: pandas.DataFrame) -> str:
    """How to read the table of accuracies."""
    seeds = scores["seed"].nunique()
    few = f" {seeds} seeds decide nothing: use {LEAST} or more." if seeds < LEAST else ""
    return (
        f"Percent of the test images: mean over {seeds} seeds (and draws of few labels) ± half of the 95 % t interval. "
        f"Second and third line: difference from {' and from '.join(map(repr, REFERENCES))}, paired over seeds, if it is decided at 5 % "
        "after Holm's correction over the methods of a column; else `undecided ±` the smallest difference that these seeds could have "
        f"shown.{few}"
    )


def show(scores: pandas.DataFrame, arena: Arena, methods: Mapping[str, Entry], title: str) -> None:
    """Print both tables."""
    table = accuracies(scores)
    screen = Table(*table.columns, title=title, show_lines=True)
    for cells in table.itertuples(index=False):
        screen.add_row(*cells)
    console.print(screen, soft_wrap=False)
    console.print(caption(scores), markup=False, soft_wrap=False)
    console.print(f"\nWhat still differs, and costs:\n{conditions(scores, arena, methods).to_string(index=False)}", markup=False)
