"""How a table writes names, numbers and links."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas

NOT_YET = "not measured yet"


def run_name(line: Any) -> str:
    """What was run: the recipe, its arm and all that was asked besides."""
    given = [f"encoder={line.encoder_file}" * bool(line.encoder_file), f"split={line.split}" * bool(line.split)]
    return " ".join(filter(None, [line.recipe, line.arm, line.overrides, *given]))


def protocol(line: Any) -> str:
    """The protocol in words, with the metric where it is not the usual one."""
    return (line.protocol if line.metric == "top1" else f"{line.protocol} ({line.metric})").replace("_", " ")


def number(mean: float, sd: float) -> str:
    """A mean with its standard deviation, both with two decimals; the mean alone of one seed, nothing where there is no number."""
    if pandas.isna(mean):
        return ""
    return f"{mean:.2f}" if pandas.isna(sd) else f"{mean:.2f} ± {sd:.2f}"


def counted(many: int, what: str) -> str:
    """How many: "1 seed", "3 seeds"."""
    return f"{many} {what}{'' if many == 1 else 's'}"


def baseline_text(line: Any) -> str:
    """The baselines of a line of `with_baselines`: "40.00, random encoder; 95.00, raw pixels"."""
    beside = [(line.untrained_mean, line.untrained_sd, ", random encoder" * (line.untrained_start == "random"))]
    beside += [(line.pixels_mean, line.pixels_sd, ", raw pixels")]
    return "; ".join(number(mean, sd) + what for mean, sd, what in beside if pandas.notna(mean))


def log_link(logs: Iterable[str], root: Path, folder: Path) -> str:
    """A link to the first of the logs, as seen from a README in `folder`; it says how many there are. Empty without a log.

    `logs` are those of several summary lines, each with spaces between its own.
    """
    paths = [*dict.fromkeys(" ".join(logs).split())]
    label = "log" if len(paths) == 1 else f"log 1 of {len(paths)}"
    return f"[{label}]({Path(os.path.relpath(root / paths[0], folder)).as_posix()})" if paths else ""


def markdown(frame: pandas.DataFrame, nothing: str = NOT_YET) -> str:
    """A data frame of text and whole numbers as a Markdown table, an empty cell as a dash; `nothing` where there is no row."""
    if frame.empty:
        return f"{nothing}\n"
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.replace("", "-").itertuples(index=False)]
    return "".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |\n" for row in rows)
