"""Figures of runs and comparisons. They have no background, and are legible on light and dark pages.

Each is narrow enough for a phone. Colours are the same in all figures that show the same names.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy
import pandas
from cycler import cycler
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.0  # inches
GREY = "#808080"
COLOURS = ("#2f7fd0", "#e07b1f", "#2a9d6f", "#c2478f", "#8a6fd1", "#a8862a")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": GREY,
    "axes.prop_cycle": cycler(linestyle=["-", "--"]) * cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.3,
    "grid.color": GREY,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "text.color": GREY,
    "text.parse_math": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def _figure(height: float, columns: int = 1, width: float = WIDTH) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _legend(figure: Figure, axes: Axes) -> None:
    """Several names in a legend below the axes; the figure grows by it."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        columns = 3 if max(map(len, names)) < 10 else 2
        figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(names) // columns))
        figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.2)


@rc_context(STYLE)
def learning_curves(curves: Mapping[str, pandas.DataFrame], metric: str, title: str) -> Figure:
    """A metric over epochs. curves: by name, frames with the columns epoch and `metric`."""
    figure, (axes,) = _figure(2.6)
    for name, curve in curves.items():
        axes.plot(curve["epoch"], curve[metric], label=name, marker="." if len(curve) < 10 else None, linewidth=1.3)
    axes.set(title=title, xlabel="epoch", ylabel=metric.replace("_", " "))
    _legend(figure, axes)
    return figure


@rc_context(STYLE)
def accuracy_lines(means: pandas.DataFrame, halves: pandas.DataFrame, title: str, xlabel: str, chance: float | None = None) -> Figure:
    """Accuracies in percent with intervals, over the index of the frames; a line per column. NaN is not drawn. chance: in percent."""
    figure, (axes,) = _figure(3.0)
    places = numpy.arange(len(means))
    for number, (name, style) in enumerate(zip(means.columns, cycle(rcParams["axes.prop_cycle"]), strict=False)):
        if means[name].notna().any():
            beside = 0.025 * (number - (len(means.columns) - 1) / 2)  # so that intervals do not hide each other
            axes.errorbar(places + beside, means[name], halves[name], label=name, marker="o", markersize=4, linewidth=1.3, **style)
    if chance is not None:
        axes.axhline(chance, color=GREY, linestyle=":", label="chance")
    axes.set(title=title, xlabel=xlabel, ylabel="top-1 in percent")
    axes.set_xticks(places, [str(name) for name in means.index])
    _legend(figure, axes)
    return figure


@rc_context(STYLE)
def interval_plot(means: pandas.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Means with 95 % intervals, a row per method, a panel per evaluation. means: of compare.statistics. titles: of the evaluations."""
    methods = [*means["method"].unique()]
    figure, panels = _figure(1 + 0.24 * len(methods), len(titles), WIDTH if len(titles) == 1 else 1.4 + 1.35 * len(titles))
    for place, (axes, (evaluation, title)) in enumerate(zip(panels, titles.items(), strict=True)):
        own = means[means["evaluation"] == evaluation].set_index("method").reindex(methods)
        colours = [COLOURS[index % len(COLOURS)] for index in range(len(methods))]
        axes.errorbar(own["mean"], range(len(methods)), xerr=own["half"], fmt="none", elinewidth=1.6, ecolor=colours)  # type: ignore[arg-type]  # a colour for each
        axes.scatter(own["mean"], range(len(methods)), c=colours, s=22, zorder=3)
        _rows(axes, methods if place == 0 else [""] * len(methods))
        axes.set(title=title, xlabel="top-1 in percent" if len(titles) == 1 else "%")
    return figure


@rc_context(STYLE)
def difference_plot(against: Mapping[str, pandas.DataFrame], methods: Sequence[str], title: str) -> Figure:
    """Paired differences with intervals, a row per method. against: for each reference, rows of compare.statistics of one evaluation."""
    figure, (axes,) = _figure(1.2 + 0.3 * len(methods))
    axes.axvline(0, color=GREY, linewidth=1)
    for number, (reference, table) in enumerate(against.items()):
        own = table.set_index("method").reindex(methods)
        rows = numpy.arange(len(methods)) + 0.24 * (number - (len(against) - 1) / 2)
        axes.errorbar(own["difference"], rows, xerr=own["half"], fmt="none", ecolor=COLOURS[number], elinewidth=1.4)
        fill = [COLOURS[number] if decided is True else "none" for decided in own["decided"]]
        axes.scatter(own["difference"], rows, c=fill, edgecolors=COLOURS[number], s=24, zorder=3)
        axes.scatter([], [], color=COLOURS[number], s=24, label=reference)
    _rows(axes, methods)
    axes.set(title=title, xlabel="difference from the reference, in points")
    _legend(figure, axes)
    return figure


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


@rc_context(STYLE)
def cell_map(values_RC: numpy.ndarray, title: str) -> Figure:
    """Percent for each cell of a grid of R x C patches; small grids have the numbers in the cells."""
    figure, (axes,) = _figure(3.4)
    drawn = axes.imshow(values_RC, cmap="viridis", vmin=0, vmax=max(float(numpy.nanmax(values_RC)), 1.0))
    if values_RC.size <= 64:
        for (row, column), value in numpy.ndenumerate(values_RC):
            light = numpy.mean(drawn.cmap(drawn.norm(value))[:3]) > 0.5
            axes.annotate(f"{value:.0f}", (column, row), ha="center", va="center", color="black" if light else "white")
    axes.set(title=title, xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="percent right")
    return figure


@rc_context(STYLE | {"axes.grid": False})
def encoder_views(images_BHWC: numpy.ndarray, attention_BRC: numpy.ndarray, colours_BRC3: numpy.ndarray, attending: str) -> Figure:
    """A row per image: the image (0 .. 1), the attention of each of its R x C patches, and colours from the features of each patch."""
    figure = Figure(figsize=(WIDTH, WIDTH / 3 * len(images_BHWC) + 0.3), layout="constrained")
    columns = {"image": images_BHWC, f"attention of\nthe {attending}": attention_BRC, "patch features,\nthree colours": colours_BRC3}
    grid = figure.subplots(len(images_BHWC), 3, squeeze=False)
    for place, (title, shown) in enumerate(columns.items()):
        for axes, part in zip(grid[:, place], shown, strict=True):
            axes.imshow(part, cmap="gray" if title == "image" else "viridis", interpolation="nearest")
            axes.set_axis_off()
        grid[0, place].set_title(title, fontsize=9)
    return figure
