"""The tables of a comparison: means with 95 % intervals, ranks and paired differences from the references; what differs, and costs."""

import math
from collections.abc import Iterable

import pandas
from rich.table import Table

from benchmarks.compare.arena import REFERENCES
from benchmarks.compare.units import Plan
from benchmarks.ledger.tables import counted
from benchmarks.statistics import LEAST, differences, means, ranks
from common.run import console

TITLES = {
    "finetune": "fine-tuned",
    "finetune_20_per_class": "20 labels",
    "finetune_5_per_class": "5 labels",
    "linear": "linear",
    "knn": "k-NN",
    "finetune_shuffled": "shuffled",
}
COSTS = {"images_per_second": "images/s", "gflop_per_image": "GFLOP/image", "memory_gb": "GB", "minutes": "minutes"}


def measured(scores: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of the evaluations, without failures, costs and a method's own accuracy."""
    return scores[~scores["evaluation"].str.contains("^failed|^cost_|^own_")]


def columns(evaluations: Iterable[str]) -> dict[str, str]:
    """The evaluations of the table with their titles: of the location probe only the last block."""
    names = [*evaluations]
    blocks = sorted((name for name in names if name.startswith("location_")), key=lambda name: int(name.rpartition("_")[2]))
    return {name: title for name, title in TITLES.items() if name in names} | {name: "location" for name in blocks[-1:]}


def accuracies(scores: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each method, a column for each evaluation. The lines of a cell: mean ± half of the interval, with the rank if anything is
    decided about it, and the paired differences from REFERENCES; `undecided (x)` if the seeds do not decide, see `caption`."""
    shown = measured(scores)
    averages, places = means(shown).set_index(["method", "evaluation"]), ranks(shown)
    against = [differences(shown, reference).set_index(["method", "evaluation"]) for reference in REFERENCES]
    rows = {}
    for method in scores["method"].unique():
        rows[method] = {
            title: "\n".join([_mean(averages.loc[method, name], places), *(_difference(table, (method, name)) for table in against)])
            for name, title in columns(shown["evaluation"].unique()).items()
            if (method, name) in averages.index
        }
        failed = scores[(scores["method"] == method) & (scores["evaluation"] == "failed")]
        rows[method] |= {"failed": "\n".join(f"seed {row.seed}: {row.note}" for row in failed.itertuples())} if len(failed) else {}
    return pandas.DataFrame.from_dict(rows, orient="index").fillna("-").reset_index(names="Method")


def _mean(row: pandas.Series, places: dict[tuple[str, str], tuple[int, int]]) -> str:
    first, last = places[row.name]
    others = sum(evaluation == row.name[1] for _, evaluation in places)
    rank = "" if last - first + 1 == others else f", rank {first}" if first == last else f", rank {first}-{last}"
    return f"{row['mean']:.1f}" + ("" if math.isnan(row["half"]) else f" ± {row['half']:.1f}") + rank


def _difference(table: pandas.DataFrame, key: tuple[str, str]) -> str:
    if key not in table.index:
        return "-"
    found = table.loc[key]
    least = "" if math.isnan(found["least"]) else f" ({found['least']:.1f})"
    return f"{found['difference']:+.1f} ± {found['half']:.1f}" if found["decided"] else f"undecided{least}"


def costs(scores: pandas.DataFrame, plan: Plan) -> pandas.DataFrame:
    """A row for each method: what the arena does not make equal, and medians of its costs over seeds."""
    values = scores.assign(evaluation=scores["evaluation"].str.removeprefix("cost_")).pivot_table(
        "value", "method", "evaluation", aggfunc="median"
    )
    text = values.reindex(index=scores["method"].unique(), columns=[*COSTS]).map(_cost).rename(columns=COSTS)
    return pandas.DataFrame.from_dict(plan.conditions, orient="index").reindex(text.index).join(text).reset_index(names="Method")


def _cost(value: float) -> str:
    return "-" if pandas.isna(value) else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def caption(scores: pandas.DataFrame) -> str:
    """How to read the table of accuracies."""
    seeds, references = counted(scores["seed"].nunique(), "seed"), " and from ".join(map(repr, REFERENCES))
    few = f" Fewer than {LEAST} seeds decide nothing." if scores["seed"].nunique() < LEAST else ""
    return (
        f"Percent of the test images: mean over {seeds} (and draws of few labels) ± half of the 95 % t interval; ranks as far as the "
        f"pairs of methods are decided. Second and third line: difference from {references}, paired over seeds, if it is decided at 5 % "
        "after Holm's correction over the methods of a column. In brackets the smallest difference that these seeds could have shown."
        f"{few}"
    )


def show(scores: pandas.DataFrame, plan: Plan, title: str) -> None:
    """Print both tables; the evaluations are spread over several where the terminal is narrow."""
    table, blocks = accuracies(scores), [["Method"]]
    width = {name: 3 + max(len(line) for cell in [name, *table[name]] for line in cell.split("\n")) for name in table.columns}
    for name in table.columns[1:]:
        if len(blocks[-1]) > 1 and sum(width[one] for one in [*blocks[-1], name]) >= console.width:
            blocks.append(["Method"])
        blocks[-1].append(name)
    console.print(title, markup=False)
    for block in blocks:
        screen = Table(*block, show_lines=True)
        for cells in table[block].itertuples(index=False):
            screen.add_row(*cells)
        console.print(screen, soft_wrap=False)
    console.print(caption(scores), markup=False, soft_wrap=False)
    console.print("\nWhat still differs (labels: of the pre-training), and costs:", markup=False)
    console.print(costs(scores, plan).to_string(index=False), markup=False)
