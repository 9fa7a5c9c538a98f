"""Kill a comparison at random moments and start it again, until it has ended; then its scores are compared with those of a run that was
not disturbed. Not a test of pytest: it takes as long as the comparison.

    python -m tests.soak RUNS UNDISTURBED --kills 10 --seconds 20 90 -- --data digits --seeds 1 --papers mp3

RUNS and UNDISTURBED are the folders of plan.json and scores.csv: runs/compare/digits. What follows -- goes to benchmarks.compare, with
--out above RUNS. Every second kill takes the whole process group with SIGKILL, the others send SIGTERM to the program.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas

from benchmarks.compare.scores import KEY, load


def memory(group: int) -> int:
    """Resident MB of the largest process of a group."""
    found = [0]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) == group:
                found += [int(line.split()[1]) // 1000 for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        except (ProcessLookupError, FileNotFoundError):
            pass
    return max(found)


def usage(runs: Path) -> str:
    """Files, MB, MB of logs, and files that were not finished."""
    files = {path: path.stat().st_size for path in runs.rglob("*") if path.is_file()}
    logs = sum(size for path, size in files.items() if path.suffix in (".txt", ".jsonl"))
    temporary = [path.name for path in files if ".tmp" in path.name or path.name.startswith(".") and path.name != ".lock"]
    return f"{len(files)} files, {sum(files.values()) / 1e6:.1f} MB, logs {logs / 1e6:.2f} MB, unfinished {temporary or 'none'}"


def soak(runs: Path, command: list[str], kills: int, seconds: tuple[float, float], seed: int) -> int:
    """Run the command to its end, killed `kills` times after a random time. Returns its exit code."""
    draw = random.Random(seed)
    for kill in range(kills + 1):
        process = subprocess.Popen(command, start_new_session=True)
        began, wait, largest = time.monotonic(), draw.uniform(*seconds) if kill < kills else float("inf"), 0
        while process.poll() is None and time.monotonic() - began < wait:
            largest = max(largest, memory(process.pid))
            time.sleep(1)
        if process.poll() is not None:
            print(f"ended with code {process.returncode} after {kill} kills, {largest} MB at most, {usage(runs)}", flush=True)
            break
        how = signal.SIGTERM if kill % 2 else signal.SIGKILL
        os.killpg(process.pid, how) if how == signal.SIGKILL else process.send_signal(how)
        code = process.wait()
        print(f"kill {kill + 1} after {wait:.0f} s: {how.name}, code {code}, {largest} MB at most, {usage(runs)}", flush=True)
    return process.returncode


def differences(runs: Path, undisturbed: Path) -> tuple[int, pandas.DataFrame]:
    """The number of scores, and those that differ or that only one has; costs are left out."""
    own, other = (load(path / "scores.csv") for path in (runs, undisturbed))
    both = own.merge(other, on=KEY, how="outer", suffixes=("", "_undisturbed"))
    both = both[~both["evaluation"].str.startswith("cost_")]
    return len(both), both[both["value"] != both["value_undisturbed"]][[*KEY, "value", "value_undisturbed"]]


def main() -> int:
    """The command line. Returns 1 if a score differs or is missing, or if the last run failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("undisturbed", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds", type=float, nargs=2, default=(20, 90), help="from and to")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("arguments", nargs="+", help="of benchmarks.compare")
    options = parser.parse_args()
    command = [sys.executable, "-m", "benchmarks.compare", *options.arguments, "--out", str(options.runs.parents[1])]
    code = soak(options.runs, command, options.kills, options.seconds, options.seed)
    count, found = differences(options.runs, options.undisturbed)
    print(f"{count} scores compared, {len(found)} differ", *([found.to_string(index=False)] if len(found) else []), sep="\n")
    return int(code != 0 or count == 0 or len(found) > 0)


if __name__ == "__main__":
    sys.exit(main())
