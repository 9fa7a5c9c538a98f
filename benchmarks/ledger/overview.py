"""The root README's two tables: published numbers beside ours, and what was measured here side by side; top-1 of classification only."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas

from benchmarks.ledger.published import (
    NOT_YET,
    alike,
    arm_of,
    claims,
    closeness,
    counted,
    links,
    markdown,
    measured,
    number,
    of_arm,
    of_method,
    plain,
    protocol,
    stem,
    title,
)
from benchmarks.papers import baselines, papers
from common.evaluate import ON_TEST

TASKS = ["classification", "low_shot", "linear_probe", "transfer"]
COLUMNS = {  # of protocols, in order; scratch is supervised training
    "finetune": "Fine-tuned",
    "scratch": "Fine-tuned",
    "finetune_20_per_class": "20 per class",
    "finetune_5_per_class": "5 per class",
    "linear": "Linear",
    "logistic": "Logistic",
    "knn": "k-NN",
}
PIXELS = "raw pixels"
WITHOUT = {"scratch": "no pre-training", "random": "no pre-training", "pixels": PIXELS}


class Place(NamedTuple):
    """What runs have in common that stand below each other."""

    data: str
    backbone: str  # empty for raw pixels
    start: str  # of WITHOUT's values, empty for a method
    device: str  # with the precision


@dataclass
class Run:
    """A line of the measured numbers."""

    place: Place
    who: str
    epochs: int
    lines: dict[tuple[str, str], Any] = field(default_factory=dict)  # of our summary, by what `column` makes of the protocol


def results_table(root: Path) -> str:
    """Published numbers with ours beside them: a line per paper, data set and protocol. Of the baselines it has what we measured too."""
    table = []
    for paper in [*papers(root), *baselines(root)]:
        lines = measured(paper, root)
        runs = list(lines[of_method(lines)].itertuples())
        own = claims(paper, root).query("task in @TASKS and metric == 'top1'")
        own = own.iloc[own["dataset"].factorize()[0].argsort(kind="stable")]
        for (data, _), rows in own.groupby(["dataset", "protocol"], sort=False):
            theirs, ours, logs = [], [], ""
            varied, settings = told_apart(rows["setting"])
            for row, setting in zip(rows.itertuples(), settings, strict=True):
                name, added = named(row)
                repeats = [line for line in runs if of_arm(row, line) and alike(row, line) and all(closeness(row, line))]
                if repeats or paper in papers(root):
                    theirs.append((name, added + row.value, [row.pretrain_epochs and f"{row.pretrain_epochs} ep", setting]))
                for line in repeats:
                    text = f"{added}{number(line, seeds=False)} ({line.mean - float(row.value):+.2f})"
                    where = [getattr(line, by) for by in ("device", "precision") if len({getattr(other, by) for other in repeats}) > 1]
                    chosen = "chosen on test" if line.protocol.endswith(ON_TEST) else ""
                    ours.append((name, text, [f"{line.pretrain_epochs} ep", setting, chosen, counted(line.seeds), line.recipe, *where]))
                    logs += f" {line.log}"
            if theirs:
                cells = {"Paper": paper, "Data": title(data), "Protocol": protocol(rows.iloc[0]) + (varied and f", by {varied}")}
                cells |= {"Published": joined(theirs), "Ours": joined(ours) or NOT_YET, "Log": links(logs, root, root, short=True)}
                table.append(cells)
    return markdown(pandas.DataFrame(table))


def together_table(root: Path) -> str:
    """Measured numbers side by side: a line per run over its seeds, a column per protocol. The device is told where there are several."""
    runs = once(measured_runs(root))
    datas, backbones = ([*dict.fromkeys(getattr(run.place, name) for run in runs)] for name in ("data", "backbone"))

    def rank(run: Run) -> tuple:
        place = run.place
        return datas.index(place.data), place.start == PIXELS, backbones.index(place.backbone), place.start

    table: list[dict[str, str]] = []
    for run in sorted(runs, key=rank):
        alone = run.place.start == PIXELS and [other.place for other in runs].count(run.place) == 1
        seeds = sorted({line.seeds for line in run.lines.values()})
        cells = {
            "Data": title(run.place.data),
            "Method": PIXELS if alone else ": ".join(filter(None, [run.place.start, run.who])),
            "Backbone": run.place.backbone,
            "Device": run.place.device,
            "Epochs": "0" if run.place.start else str(run.epochs),
            "Seeds": str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}",
        }
        front = list(cells)
        for (heading, detail), line in run.lines.items():
            text = number(line, seeds=False) + (f" ({detail})" if detail else "")
            cells[heading] = f"{cells[heading]}, {text}" if heading in cells else text
        logs = " ".join(line.log for line in run.lines.values())
        table.append(cells | {"Log": links(logs, root, root, short=True)})
    if not table:
        return markdown(pandas.DataFrame())
    frame = pandas.DataFrame(table).fillna("")
    order = [*front, *dict.fromkeys(COLUMNS.values()), *frame.columns.difference([*front, *COLUMNS.values(), "Log"]), "Log"]
    shown = [name for name in order if name in frame and (name != "Device" or frame[name].nunique() > 1)]
    return markdown(frame[shown])


def measured_runs(root: Path) -> list[Run]:
    """What was measured, by run. A supervised method is one run with all that is added to it; any other arm is a run of its own."""
    runs: dict[tuple[Place, str, int], Run] = {}
    for paper in [*papers(root), *baselines(root)]:
        lines = measured(paper, root).query("metric == 'top1'")
        supervised = set(lines.query("protocol == 'scratch'")["recipe"])
        for line, own in zip(lines.itertuples(), of_method(lines), strict=True):
            together = own and line.recipe in supervised
            name, *words = (stem(line.recipe) if together else line.recipe).split()
            who = " ".join([paper, *([] if name == line.data else [name]), *words]) + ", supervised" * together
            backbone = "" if line.start == "pixels" else title(line.backbone)
            place = Place(line.data, backbone, "" if own else WITHOUT[line.start], f"{line.device}, {line.precision}")
            heading, detail = column(line.protocol)
            added = "".join(arm_of(line.recipe).partition("+")[1:]) if together else ""
            run = runs.setdefault((place, who, line.pretrain_epochs), Run(place, who, line.pretrain_epochs))
            run.lines[heading, ", ".join(filter(None, [detail, added]))] = line
    return list(runs.values())


def once(runs: Sequence[Run]) -> list[Run]:
    """The runs; of baselines that agree in all numbers that they have in common only one, under all their names."""
    budgets, kept = Counter((run.place, run.who) for run in runs), []
    for run in runs:
        same = None
        if run.place.start:
            run.who += f" {run.epochs} ep" if budgets[run.place, run.who] > 1 else ""
            same = next((other for other in kept if other.place == run.place and agree(other.lines, run.lines)), None)
        if same:
            same.who, same.lines = f"{same.who}, {run.who}", run.lines | same.lines
        else:
            kept.append(run)
    return kept


def agree(lines: Mapping[tuple, Any], others: Mapping[tuple, Any]) -> bool:
    """Whether two runs have columns in common and in all of them the same number."""
    common = lines.keys() & others.keys()
    return bool(common) and all(number(lines[name]) == number(others[name]) for name in common)


def column(name: str) -> tuple[str, str]:
    """Where a protocol's numbers stand: the heading, and what is told in the cell. Of finetune_none these are Fine-tuned and none."""
    known = max((known for known in COLUMNS if f"{name}_".startswith(f"{known}_")), key=len, default=name)
    return COLUMNS.get(known, known.replace("_", " ")), name.removeprefix(known).replace("_", " ").strip()


def told_apart(settings: pandas.Series) -> tuple[str, list[str]]:
    """What sets published numbers apart: the option that they vary, where it is only one, and each one's setting of it."""
    if settings.nunique() == 1:
        return "", [""] * len(settings)
    options = settings.str.rpartition("=")
    varied = options[0].iloc[0] if options[0].nunique() == 1 else ""
    return varied, list(options[2] if varied else settings)


def named(row: Any) -> tuple[str, str]:
    """What a published number is of: the backbone, with the method where that is not the paper's own, and what is added to it."""
    alone, _, added = (part.strip() for part in row.method.partition("+"))
    name = title(row.backbone)
    if plain(alone) != plain(row.paper):
        parts = zip(alone.lower().split("-"), row.backbone.lower().split("_"), strict=False)
        name = alone if all(word.startswith(part) for part, word in parts) else f"{name} {alone}"  # Swin-B is swin_base...
    return name, f"+ {added} " if added else ""


def joined(numbers: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """Numbers of several things in one cell, each with its notes: ViT-B/16 83.0 (200 ep), 84.2 (800 ep); ViT-L/16 85.8 (800 ep)."""
    texts: dict[str, dict[str, None]] = {}  # what is printed twice is told once
    for name, text, notes in numbers:
        said = ", ".join(filter(None, notes))
        texts.setdefault(name, {})[f"{text} ({said})" if said else text] = None
    return "; ".join(f"{name} {', '.join(own)}" for name, own in texts.items())
