"""Write FOLDER/report.html of a run or of a comparison, and its figures as SVG files to FOLDER/figures.

python -m benchmarks.report runs/droppos/digits-200ep-seed0
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.report.comparison import comparison_page
from benchmarks.report.run import run_page
from benchmarks.reproduce import TYRO, USER_ERRORS
from common.run import RunError, console


@dataclass
class Options:
    """Write a report: one HTML file, which opens without a network."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run, such as runs/droppos/digits-200ep-seed0, or a comparison, such as runs/compare/digits."""
    data: str | None = None
    """The images of a run, if they are in a folder; by default the data set of its name."""
    data_root: Path = Path("data")
    """Directory of the named data sets."""


def report(options: Options) -> Path:
    """Write the report and return its path. Raises RunError for a folder that is neither a run nor a comparison, or has no results."""
    folder = options.folder
    if (folder / "plan.json").exists():
        return comparison_page(folder)
    if (folder / "recipe.json").exists():
        raise RunError(f"{folder} is one stage of a run: give the run, {folder.parent}")
    if not any(folder.glob("*/recipe.json")):
        fault = (
            "has neither the stages of a run (pretrain/recipe.json) nor the plan.json of a comparison"
            if folder.is_dir()
            else "is no folder"
        )
        raise RunError(f"{folder} {fault}: give a folder such as runs/droppos/digits-200ep-seed0 or runs/compare/digits")
    return run_page(folder, options.data, options.data_root)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a user error."""
    try:
        options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.report", description=__doc__, config=TYRO)
        console.print(f"written: {report(options)}", markup=False)
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
