"""The run ledger: one row per measured number, with everything that is needed to doubt it.

A paper's ledger is its `results.csv`. Every table in the repository is made from ledgers and `published.csv` files, never typed.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

import pandas

from common.files import replacing
from common.run import console


@dataclass(frozen=True)
class Row:
    """One number and where it comes from."""

    date: str  # UTC day of the run, ISO format: 2026-11-20
    commit: str  # 12 hex digits, "+dirty" behind them where the code differed from that commit; see commit()
    paper: str  # folder of the paper: droppos
    recipe: str  # name of the recipe: digits
    arm: str  # which of the variants that the recipe runs side by side: vit+rpl; empty where it has none
    base_arm: str  # the arm that it is compared with, see common.recipe.base_arm: vit; empty for an arm that is a base itself
    overrides: str  # what --set changed, space separated: pretrain.base_lr=1e-3 method.sigma=2; downstream also options: --epochs 8
    encoder_file: str  # name of the file given with --encoder: droppos_vitb16.pth; empty where the run pre-trained; of a run: run/file
    split: str  # which file says what is trained on, see common.data.Data: name and digest; empty where the data set itself does
    data: str  # name of the data set, as published.csv calls it: digits, cifar10, imagenet1k
    backbone: str  # timm's name where it has one: vit_base_patch16_224
    pretrain_epochs: int  # epochs that the run pre-trained for, 0 where it was given an encoder; for a baseline those of the run beside it
    seed: int  # seed of the run
    protocol: str  # what was done to get the number: pretrain, finetune, finetune_5_per_class, linear, knn; see common.evaluate.ON_TEST
    start: str  # pretrained, or a baseline: scratch, random (frozen untrained encoder), pixels (no encoder at all)
    metric: str  # top1 or position_top1, both in percent
    value: float  # the number
    device: str  # what it ran on, see device_name(): NVIDIA H100 80GB HBM3
    precision: str  # Fabric's name: 32-true, bf16-mixed
    hours: float  # wall-clock hours of the stage that gave the number
    versions: str  # see versions(): torch 2.13.0, timm 1.0.31, python 3.11.7
    settings: str  # what else tells the number: layers=last4 pool=mean head=linear lr=0.05 decay=0.0005 resize=256
    log: str  # committed log of the run, relative to the repository's root: droppos/logs/digits-200ep-seed0.txt
    recipe_sha256: str = ""  # first 16 digits for the recipe.json of the stage, which has all settings; empty in rows until November 2026


TYPES = get_type_hints(Row)
GIVEN = ["recipe", "arm", "base_arm", "overrides", "encoder_file", "split"]  # what was asked of a run, besides paper and data
GROUP = ["paper", "data", *GIVEN, "backbone", "pretrain_epochs", "protocol", "start", "metric", "device", "precision"]
RUN = [*GROUP, "commit", "seed"]  # two rows that agree in these are the same run made twice
OLD_FORMAT = (
    "Older ledgers have all of it in `recipe`: of 'digits vit+rpl lr=1 encoder=a.pth split=b' make recipe=digits, arm=vit+rpl, "
    "base_arm=vit, overrides=lr=1, encoder_file=a.pth and split=b, or move the file away and record the runs again"
)


def frame(rows: Sequence[Row]) -> pandas.DataFrame:
    """Rows as a data frame with typed columns, also where there is no row."""
    return pandas.DataFrame([asdict(row) for row in rows], columns=list(TYPES)).astype(TYPES)


def load(path: Path) -> pandas.DataFrame:
    """Read a ledger; an empty frame with the same columns where there is no file. One without recipe_sha256 gets it, empty.

    Raises ValueError, and says how to fix it, where the header is not Row's or a cell does not have its column's type.
    """
    if not path.exists():
        return frame([])
    try:
        ledger = pandas.read_csv(path, dtype=str, keep_default_na=False)
        if list(ledger.columns) == list(TYPES)[:-1]:
            ledger["recipe_sha256"] = ""
        if list(ledger.columns) != list(TYPES):
            missing = ", ".join(name for name in TYPES if name not in ledger) or "none"
            unexpected = ", ".join(name for name in ledger if name not in TYPES) or "none"
            fault = f"its columns must be {','.join(TYPES)}; missing: {missing}; unexpected: {unexpected}"
            raise ValueError(f"{fault}. {OLD_FORMAT if 'arm' in missing.split(', ') else 'Name the columns so, in this order'}")
        return ledger.astype(TYPES)
    except ValueError as error:
        raise ValueError(f"{path} is not a run ledger: {error}") from error


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a ledger, made where missing. A row of the same run (columns RUN) is replaced, not repeated.

    The file is replaced in one step: a crash or a full disk leaves the old one. One writer at a time.

    Raises ValueError for a value or hours that are not finite and for a file that is not a ledger; OSError where writing failed.
    """
    for row in rows:
        if not math.isfinite(row.value) or not math.isfinite(row.hours):
            raise ValueError(f"a result must be a finite number: {row}")
    ledger = pandas.concat([load(path), frame(rows)]).drop_duplicates(RUN, keep="last")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        ledger.to_csv(temporary, index=False, lineterminator="\n")


def record(rows: Sequence[Row], directory: Path, root: Path) -> None:
    """Append the rows of a run to its paper's ledger, and join the logs of all stages under `directory` into the log that the rows name.

    The log of an earlier run of the same name stays above: its rows stay in the ledger too.
    """
    log = root / rows[0].log
    log.parent.mkdir(exist_ok=True)
    text = joined_logs(directory)
    earlier = log.read_text(encoding="utf-8") if log.exists() else ""
    if text not in earlier:
        log.write_text(text if text.startswith(earlier) else earlier + text, encoding="utf-8")
    append(log.parent.parent / "results.csv", rows)
    console.print(f"recorded {len(rows)} numbers and {rows[0].log}; `make table` updates the READMEs")


def joined_logs(directory: Path) -> str:
    """The logs of all stages of a run, each below its name, in the order in which they ended."""
    logs = sorted(directory.glob("*/log.txt"), key=lambda path: path.stat().st_mtime)
    return "".join(f"# {path.parent.name}\n{path.read_text(encoding='utf-8')}" for path in logs)


def summary(ledger: pandas.DataFrame) -> pandas.DataFrame:
    """One line per GROUP: mean and sample standard deviation (`sd`, NaN for one seed) over seeds, in the metric's unit.

    Only the rows of a group's newest commit count (newest day; within a day, last in the ledger): other commits are other code,
    and a mean over both would describe neither. So rerunning one seed after a change leaves one seed until the others follow.

    `hours` is the mean, `log` the paths with spaces between. `family` is the arm to which something is added, `added` what that is:
    of vit+rpl these are vit and rpl; an arm that is a base itself adds nothing.
    """
    ledger = ledger.sort_values("date", kind="stable")
    ledger = ledger[ledger["commit"] == ledger.groupby(GROUP)["commit"].transform("last")]
    lines = ledger.groupby(GROUP, as_index=False).agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        seeds=("seed", "nunique"),
        date=("date", "last"),
        commit=("commit", "last"),
        hours=("hours", "mean"),
        log=("log", lambda paths: " ".join(dict.fromkeys(paths))),
    )
    lines["family"] = lines["arm"].where(lines["base_arm"] == "", lines["base_arm"])
    lines["added"] = [arm[len(family) + 1 :] for arm, family in zip(lines["arm"], lines["family"], strict=True)]
    return lines
