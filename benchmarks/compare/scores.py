"""The ledger of an arena: one row per score, with all that is needed to doubt it."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

import pandas

from benchmarks.ledger.rows import joined_logs
from common.files import replacing
from common.run import RunError


@dataclass(frozen=True)
class Score:
    """One score of one method and seed."""

    arena: str  # its name
    hash: str  # of the arena: two rows with the same one are comparable
    budget: str  # as asked for: images:43000
    method: str  # name of the entry
    evaluation: str  # finetune, finetune_5_per_class, finetune_shuffled, linear, knn, location_4; cost_...; or failed
    seed: int  # of the training
    draw: int  # of the labels; 0 where all are used
    value: float  # in percent; of costs, in the unit of its name
    epochs: int  # of the pre-training
    recipe: str  # hash of the method's recipe in the arena
    commit: str
    date: str  # UTC day
    device: str
    precision: str
    versions: str
    hours: float  # of the stage that gave the score
    note: str  # settings of the evaluation, or why the method failed
    stage: str  # its directory, below that of the comparison: mae/digits-28ep-seed0/knn-pretrained


TYPES = get_type_hints(Score)
KEY = ["method", "evaluation", "seed", "draw"]  # a new score replaces an old one that agrees in these


def frame(scores: Sequence[Score]) -> pandas.DataFrame:
    """Scores as a data frame with typed columns."""
    return pandas.DataFrame([asdict(score) for score in scores], columns=list(TYPES)).astype(TYPES)


def load(path: Path) -> pandas.DataFrame:
    """Read a ledger; empty if there is no file. Raises RunError for a file with other columns or of several arenas."""
    if not path.exists():
        return frame([])
    table = pandas.read_csv(path, keep_default_na=False)
    if list(table.columns) != list(TYPES):
        raise RunError(f"{path} is not a ledger of a comparison: its columns must be {', '.join(TYPES)}; move it away")
    if table["hash"].nunique() > 1:
        raise RunError(f"{path} has scores of several arenas ({', '.join(table['hash'].unique())}): keep those of one")
    return table.assign(value=pandas.to_numeric(table["value"], errors="coerce")).astype(TYPES)


def add(path: Path, scores: Sequence[Score]) -> None:
    """Add scores to a ledger. Failures of a unit are replaced by its scores. Raises RunError if the ledger is of another arena."""
    held, new = load(path), frame(scores)
    if len(held) and held["hash"].iloc[0] != new["hash"].iloc[0]:
        raise RunError(f"{path} holds another arena or another version of it ({held['hash'].iloc[0]}): move it away, or use another OUT")
    units = set(new[["method", "seed"]].itertuples(index=False, name=None))
    failed = [row.evaluation == "failed" and (row.method, row.seed) in units for row in held.itertuples()]
    table = pandas.concat([held[[not one for one in failed]], new]).drop_duplicates(KEY, keep="last")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def record(folder: Path, destination: Path, plan: str) -> None:
    """Copy the ledger, report and figure of a comparison, the logs of its stages, a file for each method and seed, and write the plan.

    Units that were recorded before, and whose ledger was continued in `folder`, have no stages there; their recorded logs are kept.
    """
    scores = load(folder / "scores.csv")
    texts = {}
    for row in scores[scores["stage"] != ""].drop_duplicates(["method", "seed"]).itertuples():
        name = f"{unit_name(row.method, row.seed)}.txt"
        stages, recorded = (folder / row.stage).parent, destination / "logs" / name
        texts[name] = joined_logs(stages) if stages.is_dir() else recorded.read_text()
    texts = {f"logs/{name}": text for name, text in texts.items()} | {"plan.json": plan}
    texts |= {name: (folder / name).read_text() for name in ("scores.csv", "report.html", "figures/intervals.svg")}
    new = destination.with_name(f"{destination.name}.new")  # folder may be destination
    shutil.rmtree(new, ignore_errors=True)
    for name, text in texts.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_text(text)
    shutil.rmtree(destination, ignore_errors=True)  # another version of the arena; it is kept by git
    new.rename(destination)


def unit_name(method: str, seed: int) -> str:
    """The name of the files of a method and seed."""
    return f"{re.sub(r'[^a-z0-9_+]+', '_', method.lower())}-seed{seed}"
