"""The page of a comparison: table, intervals, paired differences, labels, location by depth, learning curves, costs, failures."""

import re
from pathlib import Path

import pandas

from benchmarks.compare import scores as ledger
from benchmarks.compare.arena import REFERENCES, choose_arena
from benchmarks.compare.statistics import differences, means
from benchmarks.compare.table import COSTS, accuracies, caption, columns
from benchmarks.compare.units import Plan, read_plan
from benchmarks.report.figures import accuracy_lines, difference_plot, interval_plot, learning_curves
from benchmarks.report.page import Section, write_page, write_svg
from benchmarks.report.run import PER_CLASS, read_metrics
from common.run import RunError


def comparison_page(folder: Path) -> Path:
    """Write the report of a comparison, and return its path. figures/intervals.svg has all evaluations side by side.

    Raises RunError for a plan.json that is not of a comparison, and for one without scores.
    """
    try:
        plan = read_plan(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / 'plan.json'} is not the plan of a comparison ({error!r}): give the folder of a make compare") from error
    scores = ledger.load(folder / "scores.csv")
    if scores.empty:
        raise RunError(f"{folder} has no scores yet: run its make compare until a method is done")
    methods = [*scores["method"].unique()]
    measured = scores[~scores["evaluation"].str.contains("^failed|^cost_|^own_")]
    titles = columns(measured["evaluation"].unique())
    averages = means(measured)
    averages["method"] = pandas.Categorical(averages["method"], methods)
    sections = [_table(scores, measured), _intervals(averages, titles), _differences(measured, titles, methods)]
    sections += [_labels(averages), _location(averages, plan), _curves(folder, plan), _costs(scores, methods), _failures(scores)]
    page = write_page(folder, f"Comparison on {plan.data}", _about(scores, plan), sections)
    if titles:
        write_svg(interval_plot(averages, titles), folder / "figures" / "intervals.svg")
    return page


def _about(scores: pandas.DataFrame, plan: Plan) -> str:
    facts = [", ".join(scores[name].unique()) for name in ("device", "precision", "versions", "commit", "date")]
    device, precision, versions, commit, date = (one or "-" for one in facts)
    arena = f"arena {plan.arena} {plan.hash}, budget {plan.budget}, {scores['seed'].nunique()} seeds"
    return f"{arena}; {device}, {precision}; {versions}; commit {commit}, {date}"


def _table(scores: pandas.DataFrame, measured: pandas.DataFrame) -> Section:
    table = accuracies(scores).drop(columns="failed", errors="ignore") if len(measured) else pandas.DataFrame()
    return Section(heading="Results", about=caption(scores), table=table)


def _intervals(averages: pandas.DataFrame, titles: dict[str, str]) -> Section:
    figures = {f"interval_{name}": interval_plot(averages, {name: title}) for name, title in titles.items()}
    return Section(heading="Means with 95 % intervals", figures=figures)


def _differences(measured: pandas.DataFrame, titles: dict[str, str], methods: list[str]) -> Section:
    """A figure per evaluation, with the differences from all references."""
    against = {reference: differences(measured, reference) for reference in REFERENCES if reference in methods}
    figures = {}
    for evaluation, title in titles.items():
        own = {reference: table[table["evaluation"] == evaluation] for reference, table in against.items()}
        own = {reference: table for reference, table in own.items() if len(table)}
        if own:
            figures[f"difference_{evaluation}"] = difference_plot(own, methods, title)
    about = "Paired over seeds, with 95 % intervals. A full circle is decided after Holm's correction, an empty one is undecided."
    return Section(heading="Differences from the references", about=about if figures else "", figures=figures)


def _wide(averages: pandas.DataFrame, places: dict[str, str]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Means and half intervals of some evaluations, in order: a row per evaluation with its name in `places`, a column per method."""
    wide = averages.pivot_table(["mean", "half"], "evaluation", "method", observed=False, dropna=False).reindex([*places]).rename(places)
    return wide["mean"], wide["half"]


def _labels(averages: pandas.DataFrame) -> Section:
    found = {name: int(few[1]) for name in averages["evaluation"].unique() if (few := PER_CLASS.match(name))}
    places = {name: str(found[name]) for name in sorted(found, key=lambda name: found[name])}
    places |= {"finetune": "all"} if "finetune" in averages["evaluation"].unique() else {}
    if len(places) < 2:
        return Section(heading="")
    figure = accuracy_lines(*_wide(averages, places), "Fine-tuning with few labels", "labels per class")
    return Section(heading="Accuracy against labels", figures={"labels": figure})


def _location(averages: pandas.DataFrame, plan: Plan) -> Section:
    depths = sorted(int(depth[1]) for name in averages["evaluation"].unique() if (depth := re.fullmatch(r"location_(\d+)", name)))
    if not depths:
        return Section(heading="")
    arena = choose_arena(plan.data, plan.device, plan.limit)
    cells = (arena.image_size // arena.patch_size) ** 2
    places = {f"location_{depth}": str(depth) for depth in depths}
    figure = accuracy_lines(*_wide(averages, places), "Where a patch is, from its token", "block", 100 / cells)
    about = f"A linear classifier tells the cell of a patch from its token after each block, by chance {100 / cells:.2g} %."
    return Section(heading="Location by depth", about=about, figures={"location": figure})


def _curves(folder: Path, plan: Plan) -> Section:
    """The pre-training loss of each method, a line per seed. Losses of two methods are not comparable, so each has its figure."""
    curves: dict[str, dict[str, pandas.DataFrame]] = {}
    for path in sorted(folder.glob("*/*/pretrain/metrics.jsonl")):
        run, paper = path.parts[-3], path.parts[-4]
        label = re.fullmatch(r"(?:(.*)-)?[^-]+-seed(\d+)", run.removeprefix(f"{plan.arena}-"))
        if label and len(curve := read_metrics(path)):
            curves.setdefault(", ".join(filter(None, [paper, label[1]])), {})[f"seed {label[2]}"] = curve
    figures = {f"loss_{name}": learning_curves(own, "loss", name) for name, own in curves.items()}
    return Section(heading="Learning curves of the pre-trainings", figures=figures)


def _costs(scores: pandas.DataFrame, methods: list[str]) -> Section:
    costs = scores[scores["evaluation"].str.startswith("cost_")].assign(cost=lambda rows: rows["evaluation"].str.removeprefix("cost_"))
    table = costs.pivot_table("value", "method", "cost", aggfunc="median").reindex(index=methods, columns=[*COSTS]).rename(columns=COSTS)
    table = table.map(lambda value: "-" if pandas.isna(value) else f"{value:.3g}" if value < 100 else f"{value:,.0f}").reset_index(
        names="Method"
    )
    return Section(heading="Costs", about="Medians over seeds.", table=table)


def _failures(scores: pandas.DataFrame) -> Section:
    failed = scores[scores["evaluation"] == "failed"][["method", "seed", "note"]]
    return Section(heading="Failures", table=failed.rename(columns={"method": "Method", "seed": "Seed", "note": "Why"}))
