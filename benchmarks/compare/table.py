"""The tables of a comparison: means with 95 % intervals, ranks and paired differences from the references; what differs, and costs."""

import math
import re
from collections.abc import Iterable

import pandas
from rich.markup import escape
from rich.table import Table

from benchmarks.compare.arena import ARENAS, ARMS, CLAIMS, OPTIONS, RATES, REFERENCES, trial_names
from benchmarks.compare.units import Plan
from benchmarks.ledger.tables import counted
from benchmarks.statistics import LEAST, differences, means, paired, ranks
from common.run import console

TITLES = {
    "finetune": "fine-tuned",
    "finetune_20_per_class": "20 labels",
    "finetune_5_per_class": "5 labels",
    "linear": "linear",
    "knn": "k-NN",
    "finetune_shuffled": "shuffled",
    "segmentation": "segmentation",
}
COSTS = {"images_per_second": "images/s", "gflop_per_image": "GFLOP/image", "memory_gb": "GB", "minutes": "minutes"}


def measured(scores: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of the evaluations, without failures, costs and a method's own accuracy."""
    return scores[~scores["evaluation"].str.contains("^failed|^cost_|^own_")]


def competing(scores: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of the methods, without the arms that only the claims need: more pairs would decide less."""
    return scores[~scores["method"].isin(ARMS)]


def columns(evaluations: Iterable[str]) -> dict[str, str]:
    """The evaluations of the table with their titles: of the location probe only the last block."""
    names = [*evaluations]
    return {name: title for name, title in TITLES.items() if name in names} | {name: "location" for name in [*probed_blocks(names)][-1:]}


def probed_blocks(evaluations: Iterable[str]) -> dict[str, int]:
    """The evaluations of the location probe with their blocks, in order."""
    found = {name: int(block[1]) for name in evaluations if (block := re.fullmatch(r"location_(\d+)", name))}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def accuracies(scores: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each method, a column for each evaluation. The lines of a cell: mean ± half of the interval, with the rank if anything is
    decided about it, and the paired differences from REFERENCES; `undecided (x)` if the seeds do not decide, see `caption`. An arm of a
    claim has only the mean."""
    shown = measured(scores)
    methods, averages = competing(shown), means(shown).set_index(["method", "evaluation"])
    places = ranks(methods)
    against = [differences(methods, reference).set_index(["method", "evaluation"]) for reference in REFERENCES]
    rows = {}
    for method in scores["method"].unique():
        rows[method] = {
            title: "\n".join(
                [
                    _mean(averages.loc[method, name], places),
                    *(_difference(table, (method, name)) for table in against if method not in ARMS),
                ]
            )
            for name, title in columns(shown["evaluation"].unique()).items()
            if (method, name) in averages.index
        }
        failed = scores[(scores["method"] == method) & (scores["evaluation"] == "failed")]
        rows[method] |= {"failed": "\n".join(f"seed {row.seed}: {row.note}" for row in failed.itertuples())} if len(failed) else {}
    return pandas.DataFrame.from_dict(rows, orient="index").fillna("-").reset_index(names="Method")


def _mean(row: pandas.Series, places: dict[tuple[str, str], tuple[int, int]]) -> str:
    others = sum(evaluation == row.name[1] for _, evaluation in places)
    first, last = places.get(row.name, (1, others))
    rank = "" if last - first + 1 == others else f", rank {first}" if first == last else f", rank {first}-{last}"
    return f"{row['mean']:.1f}" + ("" if math.isnan(row["half"]) else f" ± {row['half']:.1f}") + rank


def _difference(table: pandas.DataFrame, key: tuple[str, str]) -> str:
    if key not in table.index:
        return "-"
    found = table.loc[key]
    least = "" if math.isnan(found["least"]) else f" ({found['least']:.1f})"
    return f"{found['difference']:+.1f} ± {found['half']:.1f}" if found["decided"] else f"undecided{least}"


def claims(scores: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each claim of a paper, a column for each evaluation: the paired difference of the two methods ± half of its interval, and
    whether it is decided, after Holm's correction over the claims of a column. `-`: not an evaluation of both."""
    shown = measured(scores)
    table, titles = paired(shown, [*CLAIMS.values()]), columns(shown["evaluation"].unique())
    rows = list[list[str]]()
    for claim, (method, reference) in CLAIMS.items():
        own = table[(table["method"] == method) & (table["reference"] == reference)].set_index("evaluation")
        missing = "-" if len(own) else "not measured yet"
        rows.append([claim, *(_claimed(own.loc[name]) if name in own.index else missing for name in titles)])
    return pandas.DataFrame(rows, columns=["Claim", *titles.values()])


def _claimed(row: pandas.Series) -> str:
    half = "" if math.isnan(row["half"]) else f" ± {row['half']:.1f}"
    return f"{row['difference']:+.1f}{half}" + ("" if row["decided"] else ", undecided")


def costs(scores: pandas.DataFrame, plan: Plan) -> pandas.DataFrame:
    """A row for each method: what the arena does not make equal, and medians of its costs over seeds."""
    values = scores.assign(evaluation=scores["evaluation"].str.removeprefix("cost_")).pivot_table(
        "value", "method", "evaluation", aggfunc="median"
    )
    text = values.reindex(index=scores["method"].unique(), columns=[*COSTS]).map(_cost).rename(columns=COSTS)
    return pandas.DataFrame.from_dict(plan.conditions, orient="index").reindex(text.index).join(text).reset_index(names="Method")


def _cost(value: float) -> str:
    return "-" if pandas.isna(value) else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def location(scores: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each method: the mean of the location probe after each block."""
    averages = means(measured(scores))
    places = probed_blocks(averages["evaluation"].unique())
    found = averages.pivot(index="method", columns="evaluation", values="mean").reindex(scores["method"].unique())[[*places]]
    return found.dropna(how="all").rename(columns=places).map("{:.1f}".format).reset_index(names="Method")


def tuning(scores: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each method of a tuning arena: what each trial reached on the held-out images, and what the best gains over the recipe.
    A trial without a score is `-`."""
    averages, rows = means(measured(scores)).set_index("method")["mean"], []
    for method in OPTIONS:
        names = trial_names(method)
        found = {title: averages[name] for title, name in names.items() if name in averages.index}
        if "" in found:
            own = [f"{title}: " if title in OPTIONS[method] else "" for title in names]
            cells = [f"{text}{found[title]:.1f}" if title in found else "-" for text, title in zip(own, names, strict=True)]
            best = max(found, key=lambda title: found[title])
            rows.append([method, *cells, best or "recipe", f"{found[best] - found['']:+.1f}"])
    return pandas.DataFrame(rows, columns=["Method", "Recipe", *RATES, "Option", "Option, second", "Best", "Gain"])


def main_table(scores: pandas.DataFrame, plan: Plan) -> tuple[pandas.DataFrame, str]:
    """The trials of a tuning arena or the accuracies of another one, and how to read them."""
    if held_out := ARENAS[plan.arena].held_out:
        about = "Gain: of the best trial over the recipe; one that is smaller than the standard error, about a point, may be chance."
        return tuning(scores), f"Percent of {held_out:,} training images that are held out, one trial each. {about}"
    return accuracies(scores), caption(scores)


def caption(scores: pandas.DataFrame) -> str:
    """How to read the table of accuracies."""
    seeds, references = counted(competing(scores)["seed"].nunique(), "seed"), " and from ".join(map(repr, REFERENCES))
    few = f" Fewer than {LEAST} seeds decide nothing." if scores["seed"].nunique() < LEAST else ""
    return (
        f"Percent of the test images: mean over {seeds} (and draws of few labels) ± half of the 95 % t interval; ranks as far as the "
        f"pairs of methods are decided. Second and third line: difference from {references}, paired over seeds, if it is decided at 5 % "
        "after Holm's correction over the methods of a column. In brackets the smallest difference that these seeds could have shown."
        f"{few}"
    )


def show(scores: pandas.DataFrame, plan: Plan, title: str) -> None:
    """Print the tables, that of the claims if an arm has run only for them."""
    table, about = main_table(scores, plan)
    console.print(title, markup=False)
    _spread(table, lines=True)
    console.print(about, markup=False, soft_wrap=False)
    if scores["method"].isin(ARMS).any():
        console.print("\nWhat the papers claim, as paired differences of two methods:", markup=False)
        _spread(claims(scores))
    console.print("\nWhat still differs (labels: of the pre-training), and costs:", markup=False)
    console.print(costs(scores, plan).to_string(index=False), markup=False)


def _spread(table: pandas.DataFrame, lines: bool = False) -> None:
    """Print a table, with its columns spread over several where the terminal is narrow; all have the first column."""
    first, blocks = table.columns[0], [[table.columns[0]]]
    width = {name: 3 + max(len(line) for cell in [name, *table[name]] for line in cell.split("\n")) for name in table.columns}
    for name in table.columns[1:]:
        if len(blocks[-1]) > 1 and sum(width[one] for one in [*blocks[-1], name]) >= console.width:
            blocks.append([first])
        blocks[-1].append(name)
    for block in blocks:
        screen = Table(*block, show_lines=lines)
        for cells in table[block].itertuples(index=False):
            screen.add_row(*map(escape, cells))  # an error may have brackets
        console.print(screen, soft_wrap=False)
