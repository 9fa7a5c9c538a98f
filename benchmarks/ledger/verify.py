"""`make verify-results`: find every recorded number again in the committed log of its run, and refuse rows that cannot be checked.

`python -m benchmarks.ledger.verify` reads the results.csv of every paper, of the baselines and of the downstream tasks, the scores.csv of
recorded comparisons, and their logs. A row is verified if one stage in its log ended on its day, took its hours, and says its value. Of a
grid of classifiers the choice is made again from the accuracies in the log. Its commit must be in the history, so that anyone can check it
out. What neither holds is only checked for presence: seed, device, precision, versions, and settings other than those of linear probes.
Rows until November 2026 may lack settings and recipe_sha256; these are counted.
"""

import argparse
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from benchmarks.compare.scores import KEY, unit_name
from benchmarks.compare.scores import load as load_scores
from benchmarks.ledger.downstream import DOWNSTREAM
from benchmarks.ledger.rows import RUN, load
from benchmarks.papers import BASELINES, ROOT, papers
from common.evaluate import ON_TEST

HEADING = re.compile(r"# (\S+)$")
LINE = re.compile(r"(\d{4}-\d\d-\d\d) \d\d:\d\d:\d\d (\S+) (.*)$")
DONE = re.compile(r"done: (.*)$")
CLASSIFIER = re.compile(r"(layers=\S+ .*): top1 (\S+?)(?: \((\S+) on the \d+ images held out\))?$")
PART = re.compile(r"(?:block (\d+) of \d+|(\w+)): top1 (\S+)(?: of the cells)?$")  # a number besides that of the last line
COMMIT = re.compile(r"[0-9a-f]{12}(\+dirty|\+mixed)*$")
REQUIRED = ["date", "commit", "recipe", "data", "backbone", "protocol", "start", "metric", "device", "precision", "versions", "log"]
# Commits that were joined into one before they were published. It has their code, and changes that came after them.
JOINED = dict.fromkeys(["2a1876f3460f", "240e0498df0b", "2c6d8663e26e", "346c76580f53", "46246eef75b4", "9b0e6c6a34b8"], "8779aaad9502")
SCORE_REQUIRED = ["hash", "budget", "recipe", "commit", "date", "device", "precision", "versions", "stage"]


@dataclass
class Stage:
    """What a log says about one finished stage of a run."""

    name: str  # pretrain, or protocol and start: linear-pretrained
    day: str = ""  # on which it ended, in the time zone of the machine
    numbers: dict[str, float] = field(default_factory=dict)  # of the line that ends it
    grid: list[tuple[str, float, float]] = field(default_factory=list)  # settings, top1, and the accuracy by which the best is chosen
    parts: dict[str, float] = field(default_factory=dict)  # top1 of location_1, finetune_shuffled


def stages(text: str) -> list[Stage]:
    """The finished stages in a log, in its order. A stage may be there several times, if a run of the same name was recorded again."""
    found: list[Stage] = []
    grid: list[tuple[str, float, float]] = []
    others: dict[str, float] = {}
    for line in text.splitlines():
        if HEADING.match(line):
            grid, others = [], {}
        elif parts := LINE.match(line):
            day, name, said = parts.groups()
            if classifier := CLASSIFIER.match(said):
                settings, top1, held_out = classifier.groups()
                grid.append((settings, float(top1), float(held_out or top1)))
            elif part := PART.match(said):
                others[part[2] or f"location_{part[1]}"] = float(part[3])
            elif done := DONE.match(said):
                numbers = {key: float(value) for key, value in (number.rsplit(" ", 1) for number in done[1].split(", "))}
                found.append(Stage(name, day, numbers, grid, others))
                grid, others = [], {}
    return found


def derived(stage: Stage, row: Any) -> tuple[float, str] | None:
    """The value and the settings of a row as the log of a stage gives them; None if the row is of another stage.

    Settings are "" where the log has none: it names them only for linear probes.
    """
    protocol, _, start = stage.name.rpartition("-")
    asked = row.protocol.removesuffix(ON_TEST)
    layers = re.fullmatch(rf"{re.escape(protocol)}_(last\d*|best)", asked)
    own = stage.name == "pretrain" if row.protocol in ("pretrain", "scratch") else start == row.start and (asked == protocol or layers)
    if not own or row.metric not in stage.numbers:
        return None
    if not stage.grid:
        return None if layers else (stage.numbers[row.metric], "")
    among = [one for one in stage.grid if layers is None or layers[1] == "best" or one[0].startswith(f"layers={layers[1]} ")]
    settings, top1, _ = max(among, key=lambda one: one[2], default=("", math.nan, 0.0))  # of equal ones the first, as in LinearProbe.best
    return top1, settings


def same(recorded: float, printed: float, decimals: int) -> bool:
    """Whether a number of the ledger, rounded to so many decimals, and one of a log, with six digits, are the same number."""
    digits = 5 - math.floor(math.log10(abs(printed))) if printed else decimals  # decimals of the log
    rounding = 0.0 if digits == decimals else 10**-decimals + 10**-digits  # equally rounded numbers are equal
    return abs(recorded - printed) <= 0.5 * rounding + 1e-9


def history(root: Path) -> frozenset[str] | None:
    """The commits of a repository up to the one that is checked out; None outside a full clone, as in an archive or a shallow clone."""
    try:
        git = partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
        if git(["git", "rev-parse", "--is-shallow-repository", "--show-prefix"]).stdout.split() != ["false"]:
            return None  # shallow, or a folder inside a repository
        return frozenset(line[:12] for line in git(["git", "rev-list", "HEAD"]).stdout.splitlines())
    except (OSError, subprocess.CalledProcessError):
        return None


def unmarked(row: Any, required: Sequence[str]) -> Iterator[str]:
    """What a row of either ledger lacks of these columns, and a commit that is not one."""
    absent = [name for name in required if not getattr(row, name)]
    if absent:
        yield f"it has no {', '.join(absent)}"
    if row.commit and not COMMIT.match(row.commit):
        yield f"commit {row.commit!r} is not one: 12 hexadecimal digits"


def faults(row: Any, found: Sequence[Stage] | None) -> Iterator[str]:
    """What is wrong with a row, given the stages in its log (None: there is no log)."""
    yield from unmarked(row, REQUIRED)
    if row.seed < 0:
        yield f"seed {row.seed} is negative"
    if row.recipe_sha256 and not re.fullmatch(r"[0-9a-f]{16}", row.recipe_sha256):
        yield f"recipe_sha256 {row.recipe_sha256!r} is not one: 16 hexadecimal digits"
    if row.recipe_sha256 and not row.settings and row.protocol not in ("pretrain", "scratch"):
        yield "it has no settings"
    if found is None:
        yield f"its log {row.log!r} is missing"
        return
    candidates = [(stage, *one) for stage in found if (one := derived(stage, row))]
    if not candidates:
        yield f"{row.log} has no finished stage with this number"
    elif not any(_agrees(row, *one) for one in candidates):
        said = "; ".join(
            f"{row.metric} {value:g}, {stage.numbers.get('hours', math.nan):g} hours on {stage.day}" + f", {settings}" * bool(settings)
            for stage, value, settings in candidates
        )
        own = f"{row.metric} {row.value:g}, {row.hours:g} hours on {row.date}" + f", {row.settings}" * bool(row.settings)
        yield f"it says {own}; {row.log} says {said}"


def _agrees(row: Any, stage: Stage, value: float, settings: str) -> bool:
    days = abs((pandas.Timestamp(row.date) - pandas.Timestamp(stage.day)).days)  # the row's day is in UTC
    right = same(row.value, value, 4) and same(row.hours, stage.numbers.get("hours", math.nan), 5)
    return right and days <= 1 and (not settings or row.settings == settings)


def score_faults(row: Any, found: Sequence[Stage] | None) -> Iterator[str]:
    """What is wrong with a row of a comparison, given the stages in the log of its method and seed (None: there is no log)."""
    yield from unmarked(row, SCORE_REQUIRED)
    if row.evaluation.startswith("cost_"):
        return  # logs have no costs
    stage = next((one for one in reversed(found or []) if one.name == row.stage.rpartition("/")[2]), None)
    if stage is None:
        yield f"no log of it has a finished stage {row.stage}"
        return
    said = next((stage.numbers[name] for name in (row.evaluation.removeprefix("own_"), "top1", "miou") if name in stage.numbers), math.nan)
    said = stage.parts.get(row.evaluation, said)
    days = abs((pandas.Timestamp(row.date) - pandas.Timestamp(stage.day)).days)
    if not same(row.value, said, 4) or not same(row.hours, stage.numbers.get("hours", math.nan), 5) or days > 1:
        own = f"{row.value:g}, {row.hours:g} hours on {row.date}"
        yield f"it says {own}; its log says {said:g}, {stage.numbers.get('hours', math.nan):g} hours on {stage.day}"


def verify_comparison(folder: Path, root: Path) -> tuple[str, list[str]]:
    """The same as `verify` for a recorded comparison, whose failed methods have no number to check."""
    scores = load_scores(folder / "scores.csv")
    scores = scores[scores["evaluation"] != "failed"]
    again, found, wrong = scores.duplicated(KEY), [], 0
    paths = {
        name: folder / "logs" / f"{name}.txt" for name in {unit_name(*pair) for pair in zip(scores["method"], scores["seed"], strict=True)}
    }
    logs = {name: stages(path.read_text(encoding="utf-8")) if path.is_file() else None for name, path in paths.items()}
    where = folder.relative_to(root).as_posix()
    for place, row in enumerate(scores.itertuples()):
        said = [*score_faults(row, logs[unit_name(row.method, row.seed)]), *["another row is of the same score"] * bool(again.iloc[place])]
        wrong += bool(said)
        found += [f"{where}/scores.csv ({row.method}, {row.evaluation}, draw {row.draw}, seed {row.seed}): {one}" for one in said]
    return f"{where}: {len(scores) - wrong} of {len(scores)} rows verified", found


def verify(root: Path) -> tuple[list[str], list[str]]:
    """Check every ledger under `root`. Returns a line for each ledger, and one for each fault."""
    summaries, found = [], []
    downstream = [f"benchmarks/{task}" for task in DOWNSTREAM if (root / "benchmarks" / task / "results.csv").exists()]
    for home in [*papers(root), BASELINES.as_posix(), *downstream]:
        try:
            ledger = load(root / home / "results.csv")
        except ValueError as error:
            found.append(str(error))
            continue
        logs = {log: stages((root / log).read_text(encoding="utf-8")) if (root / log).is_file() else None for log in ledger["log"].unique()}
        again, wrong = ledger.duplicated(RUN), 0
        for line, row in enumerate(ledger.itertuples(index=False), 2):  # the first line of the file is the header
            said = [*faults(row, logs[row.log]), *["another row is of the same run"] * bool(again.iloc[line - 2])]
            wrong += bool(said)
            found += [
                f"{home}/results.csv:{line} ({row.protocol}, {row.start}, {row.arm or row.recipe}, seed {row.seed}): {one}" for one in said
            ]
        without = ", ".join(f"{(ledger[name] == '').sum()} have no {name}" for name in ("settings", "recipe_sha256"))
        summaries.append(f"{home}: {len(ledger) - wrong} of {len(ledger)} rows verified; {without}")
    for path in sorted(root.glob("benchmarks/compare/*/scores.csv")):
        summary, faulty = verify_comparison(path.parent, root)
        summaries.append(summary)
        found += faulty
    return summaries, found


def verify_commits(root: Path) -> tuple[str, list[str]]:
    """The same as `verify` for the commits of all rows: whether the history of this repository has them."""
    rows: dict[str, set[str]] = {}
    for path in [*root.glob("*/results.csv"), *root.glob("benchmarks/*/*.csv"), *root.glob("benchmarks/compare/*/scores.csv")]:
        for commit in pandas.read_csv(path, dtype=str).get("commit", pandas.Series(dtype=str)).dropna():
            name = commit.partition("+")[0]
            rows.setdefault(JOINED.get(name, name), set()).add(path.relative_to(root).as_posix())
    known = history(root)
    if known is None or not known & rows.keys():  # the second: an import into another repository
        return "commits: not checked, as this is not a full clone of the project's history", []
    found = [
        f"{', '.join(sorted(files))}: commit {name} is not in the history; record runs of a commit that stays"
        for name, files in sorted(rows.items())
        if name not in known
    ]
    return f"commits: {len(rows) - len(found)} of {len(rows)} in the history, {len(JOINED)} of earlier ones joined", found


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line. Returns 1 if a row is not verified, else 0."""
    argparse.ArgumentParser(prog="python -m benchmarks.ledger.verify", description="Find every recorded number in its log.").parse_args(
        argv
    )
    summaries, found = verify(root)
    summary, absent = verify_commits(root)
    print(*summaries, summary, sep="\n")
    found += absent
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
