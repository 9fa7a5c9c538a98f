"""The page of a comparison: table, intervals, paired differences, labels, location by depth, learning curves, costs, failures."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from benchmarks.compare import scores as ledger
from benchmarks.compare.arena import REFERENCES
from benchmarks.compare.table import columns, competing, costs, main_table, measured, probed_blocks
from benchmarks.compare.units import Plan, read_plan
from benchmarks.report.figures import interval_plot, line_plot
from benchmarks.report.page import write_page
from benchmarks.report.run import PER_CLASS
from benchmarks.statistics import differences, means
from common.run import RunError

STEP = re.compile(r"pretrain step (\d+)/(\d+), .*?loss ([^\s,]+)")


def comparison_page(folder: Path) -> Path:
    """Write the report of a comparison, and return its path.

    Raises RunError for a plan.json that is not of a comparison, and for one without scores.
    """
    try:
        plan = read_plan(folder)
        plan = replace(plan, data=Path(plan.data).name)  # a recorded page says nothing of the machine
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / 'plan.json'} is not the plan of a comparison ({error!r}): give the folder of a make compare") from error
    scores = ledger.load(folder / "scores.csv")
    if scores.empty:
        raise RunError(f"{folder} has no scores yet: run its make compare until a method is done")
    shown = measured(competing(scores))
    methods = [*competing(scores)["method"].unique()]
    averages, titles = means(shown), columns(shown["evaluation"].unique())
    against = {reference: differences(shown, reference) for reference in REFERENCES if reference in methods}
    panels, paired = _panels({"": averages}, "mean", titles, methods), _panels(against, "difference", titles, methods)
    percent, points = "top-1 in percent", "difference in points"
    figures = {
        "Means with 95 % intervals": {f"mean_{name}": interval_plot({one: panels[one]}, percent) for name, one in titles.items()},
        "Differences from the references": {
            f"difference_{name}": interval_plot({one: paired[one]}, points) for name, one in titles.items() if against
        },
        "Accuracy against labels": draw_labels(averages, methods),
        "Location by depth": draw_location(averages, methods, plan),
        "Learning curves": draw_curves(folder, scores),
    }
    table, reading = main_table(scores, plan) if titles else (pandas.DataFrame(), "")
    table = table.drop(columns="failed", errors="ignore")
    failed = scores.loc[scores["evaluation"] == "failed", ["method", "seed", "note"]].rename(columns=str.capitalize)
    content = {"scores": scores, "caption": reading, "costs": costs(scores, plan), "failed": failed}
    return write_page("comparison.html", folder, plan=plan, figures=figures, table=table, **content)


def draw_intervals(scores: pandas.DataFrame) -> Figure:
    """The means of all evaluations with their intervals, side by side."""
    shown = measured(competing(scores))
    panels = _panels({"": means(shown)}, "mean", columns(shown["evaluation"].unique()), [*competing(scores)["method"].unique()])
    return interval_plot(panels, "%")


def _panels(
    tables: Mapping[str, pandas.DataFrame], value: str, titles: Mapping[str, str], methods: list[str]
) -> dict[str, dict[str, pandas.DataFrame]]:
    """For each evaluation's title and each table, by name: the frame of an interval plot, with one of the table's columns as value."""
    panels: dict[str, dict[str, pandas.DataFrame]] = {title: {} for title in titles.values()}
    for (evaluation, title), (name, table) in itertools.product(titles.items(), tables.items()):
        own = table[table["evaluation"] == evaluation].set_index("method").reindex(methods)
        panels[title][name] = pandas.DataFrame({"value": own[value], "half": own["half"], "full": own.get("decided", True)})
    return panels


def draw_labels(averages: pandas.DataFrame, methods: list[str]) -> dict[str, Figure]:
    """Accuracy of fine-tuning against the labels per class; no figure for a single number of labels."""
    few = {name: int(found[1]) for name in averages["evaluation"].unique() if (found := PER_CLASS.match(name))}
    places = {name: str(few[name]) for name in sorted(few, key=lambda name: few[name])}
    places |= {"finetune": "all"} if "finetune" in averages["evaluation"].to_numpy() else {}
    return {"labels": _lines(averages, methods, places, "Fine-tuning", "labels per class")} if len(places) > 1 else {}


def draw_location(averages: pandas.DataFrame, methods: list[str], plan: Plan) -> dict[str, Figure]:
    """Accuracy of the location probe after each block, with chance; no figure without this probe."""
    chance, places = 100 / plan.cells, {name: str(block) for name, block in probed_blocks(averages["evaluation"].unique()).items()}
    return {"location": _lines(averages, methods, places, "Cell of a patch, from its token", "block", chance)} if places else {}


def _lines(
    averages: pandas.DataFrame, methods: list[str], places: dict[str, str], title: str, xlabel: str, chance: float | None = None
) -> Figure:
    """A line per method over some evaluations, which have the names `places` on the axis."""
    indexed = averages.set_index(["method", "evaluation"])
    own = {name: indexed.loc[name].reindex([*places]).rename(places) for name in methods if name in averages["method"].to_numpy()}
    halves = {name: table["half"] for name, table in own.items()}
    return line_plot({name: table["mean"] for name, table in own.items()}, title, xlabel, "top-1 in percent", halves, chance)


def draw_curves(folder: Path, scores: pandas.DataFrame) -> dict[str, Figure]:
    """The pre-training loss of each method, a line per seed, from the logs: of the runs, or else of a recorded comparison. Losses of two
    methods are not comparable, so each has its figure."""
    curves: dict[str, dict[str, pandas.Series]] = {}
    for row in scores[scores["evaluation"] == "cost_images_per_second"].itertuples():
        logs = folder / row.stage / "log.txt", folder / "logs" / f"{ledger.unit_name(row.method, row.seed)}.txt"
        if (log := next((path for path in logs if path.exists()), None)) and (steps := STEP.findall(log.read_text())):
            curve = {row.epochs * int(step) / int(total): float(loss) for step, total, loss in steps}
            curves.setdefault(row.method, {})[f"seed {row.seed}"] = pandas.Series(curve).sort_index()
    return {f"loss, {name}": line_plot(own, name, "epoch", "loss") for name, own in curves.items()}
