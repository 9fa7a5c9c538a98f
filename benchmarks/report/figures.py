"""Figures of runs and comparisons: no background, legible on light and dark pages, and narrow enough for a phone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import pandas
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.0  # inches
GREY = "#808080"
COLOURS = ("#2f7fd0", "#e07b1f", "#2a9d6f", "#c2478f", "#8a6fd1", "#a8862a")
STYLE: dict[Any, Any] = {
    **{"text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "grid.color": GREY},
    **{"axes.grid": True, "grid.alpha": 0.3, "axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False},
    **{"font.size": 9, "axes.titlesize": 10, "text.parse_math": False, "svg.fonttype": "none"},  # text stays text
    "axes.prop_cycle": cycler(linestyle=["-", "--"]) * cycler(color=COLOURS),
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
def line_plot(
    curves: Mapping[str, pandas.Series], title: str, xlabel: str, ylabel: str, halves: Any = None, chance: float | None = None
) -> Figure:
    """Values over their index, a line per name, with intervals if their `halves` are given in the same form. NaN is not drawn."""
    figure, (axes,) = _figure(2.6)
    for name, curve in curves.items():
        marker = "." if len(curve) < 10 else None
        axes.errorbar(curve.index, curve, None if halves is None else halves[name], label=name, marker=marker, linewidth=1.3)
    if chance is not None:
        axes.axhline(chance, color=GREY, linestyle=":", label="chance")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    _legend(figure, axes)
    return figure


@rc_context(STYLE)
def interval_plot(panels: Mapping[str, Mapping[str, pandas.DataFrame]], xlabel: str) -> Figure:
    """Values with intervals, a row per method, panels side by side, in each a colour per name.

    The frames, one for each panel and name, have the methods as index and the columns value, half (of the interval) and full (circle).
    """
    methods = [*next(iter(next(iter(panels.values())).values())).index]
    figure, grid = _figure(1 + 0.27 * len(methods), len(panels), WIDTH if len(panels) == 1 else 1.4 + 1.35 * len(panels))
    for axes, (title, series) in zip(grid, panels.items(), strict=True):
        for colour, (number, (name, own)) in zip(COLOURS, enumerate(series.items()), strict=False):
            rows = numpy.arange(len(own)) + 0.24 * (number - (len(series) - 1) / 2)
            axes.errorbar(own["value"], rows, xerr=own["half"], fmt="none", ecolor=colour, elinewidth=1.5)
            axes.scatter(
                own["value"], rows, c=[colour if full is True else "none" for full in own["full"]], edgecolors=colour, s=24, zorder=3
            )
            axes.scatter([], [], color=colour, s=24, label=name)
        if axes.get_xlim()[0] < 0:
            axes.axvline(0, color=GREY, linewidth=1)
        axes.set(title=title, xlabel=xlabel, ylim=(len(methods) - 0.5, -0.5))
        axes.set_yticks(range(len(methods)), methods if axes is grid[0] else [""] * len(methods))
        axes.grid(axis="y", visible=False)
    _legend(figure, grid[0])
    return figure


@rc_context(STYLE | {"axes.grid": False})
def cell_map(values_HW: numpy.ndarray, title: str) -> Figure:
    """Percent for each cell of a grid of patches; small grids have the numbers in the cells."""
    figure, (axes,) = _figure(3.4)
    drawn = axes.imshow(values_HW, cmap="viridis", vmin=0, vmax=max(float(numpy.nanmax(values_HW)), 1.0))
    for (row, column), value in numpy.ndenumerate(values_HW if values_HW.size <= 64 else numpy.empty((0, 0))):
        light = numpy.mean(drawn.cmap(drawn.norm(value))[:3]) > 0.5
        axes.annotate(f"{value:.0f}", (column, row), ha="center", va="center", color="black" if light else "white")
    axes.set(title=title, xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="percent")
    return figure


@rc_context(STYLE | {"axes.grid": False})
def image_rows(columns: Mapping[str, numpy.ndarray], width: float = WIDTH) -> Figure:
    """A row per image and a column per title: images (B, H, W, 3), or (B, H, W) in grey under the title image, else in false colours.

    width: of the figure in inches.
    """
    count = len(next(iter(columns.values())))
    figure = Figure(figsize=(width, width / len(columns) * count + 0.3), layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(count, len(columns), squeeze=False).T, columns.items(), strict=True):
        axes[0].set_title(title, fontsize=9)
        for axis, part in zip(axes, shown, strict=True):
            axis.imshow(part, cmap="gray" if title == "image" else "viridis", interpolation="nearest")
            axis.set_axis_off()
    return figure
