"""Run the papers on a Slurm cluster.

python -m benchmarks.slurm submit PAPER... [options] [-- options of benchmarks.reproduce]
python -m benchmarks.slurm status OUT
python -m benchmarks.slurm cancel OUT
"""

import sys
from contextlib import suppress
from pathlib import Path

import tyro

from benchmarks.reproduce import TYRO, USER_ERRORS, Options
from benchmarks.slurm.status import cancel, status
from benchmarks.slurm.submit import Resources, submit
from common.run import console


def main(arguments: list[str]) -> int:
    """Run a command and return the exit code: 0, or 2 for a user error."""
    command, *rest = arguments or ["--help"]
    try:
        if command == "submit":
            cut = rest.index("--") if "--" in rest else len(rest)
            resources = tyro.cli(Resources, args=rest[:cut], prog="python -m benchmarks.slurm submit", config=TYRO)
            console.print(submit(resources, rest[cut + 1 :]), markup=False)
        elif command in ("status", "cancel") and len(rest) < 2:
            (status if command == "status" else cancel)(Path(rest[0] if rest else "runs"))
        else:
            console.print((__doc__ or "").strip() + "\n", markup=False)
            for options in (Resources, Options):
                with suppress(SystemExit):
                    tyro.cli(options, args=["--help"], prog="", config=TYRO)
            return 0 if command in ("-h", "--help") else 2
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
