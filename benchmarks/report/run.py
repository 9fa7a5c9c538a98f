"""The page of a run: results, accuracy against labels, learning curves, pictures, the encoder, settings, environment and log."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure

from benchmarks.report.encoder import draw_encoder
from benchmarks.report.figures import line_plot
from benchmarks.report.page import write_page
from common.run import RunError

PER_CLASS = re.compile(r"finetune_(\d+)_per_class$")


@dataclass(frozen=True)
class Stage:
    """A stage of a run: the pre-training, or one evaluation of one encoder."""

    name: str  # pretrain, or knn-pretrained
    protocol: str
    start: str  # the encoder: pretrained, scratch, random, pixels, or 100ep; empty for the pre-training
    settings: dict[str, Any]
    environments: list[dict[str, Any]]  # of each start
    result: dict[str, Any] | None  # None: not finished
    metrics: pandas.DataFrame  # step, epoch, lr and the metrics
    log: str
    pictures: list[Path]


def read_metrics(path: Path) -> pandas.DataFrame:
    """A metrics.jsonl as a frame; empty if there is none. An incomplete last line is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return pandas.DataFrame([json.loads(line) for line in lines if line.endswith("\n")])


def read_stage(folder: Path) -> Stage:
    """Read the folder of a stage."""
    protocol, _, start = folder.name.partition("-")
    settings, environments = (json.loads((folder / f"{name}.json").read_text()) for name in ("recipe", "environment"))
    result, log = (path.read_text() if (path := folder / name).exists() else "" for name in ("result.json", "log.txt"))
    known = {"settings": settings, "environments": environments, "result": json.loads(result) if result else None, "log": log}
    metrics, pictures = read_metrics(folder / "metrics.jsonl"), sorted(folder.glob("*.png"))
    return Stage(name=folder.name, protocol=protocol, start=start, metrics=metrics, pictures=pictures, **known)


def run_page(folder: Path, data: str | None, data_root: Path) -> Path:
    """Write the report of a run, and return its path. `data` and `data_root` say where its images are.

    Raises RunError for a run without a finished stage. What cannot be drawn, such as attention without the images, the page says.
    """
    stages = [read_stage(path.parent) for path in folder.glob("*/environment.json")]
    stages.sort(key=lambda stage: (stage.start != "", stage.protocol, stage.start != "pretrained", stage.start))
    if not any(stage.result for stage in stages):
        begun = ", ".join(stage.name for stage in stages)
        raise RunError(f"{folder} has no finished stage yet (begun: {begun}): run the same make reproduce again until one is done")
    figures, missing = {"Accuracy against labels": draw_labels(stages), "Learning curves": draw_curves(stages)}, ""
    try:
        figures |= draw_encoder(folder / "pretrain", data, data_root)
    except (ValueError, OSError) as error:
        missing = str(error)
    return write_page("run.html", folder, name=folder.resolve().name, stages=stages, figures=figures, missing=missing)


def draw_labels(stages: list[Stage]) -> dict[str, Figure]:
    """Accuracy of fine-tuning against the labels per class; no figure for a single number of labels."""
    found: dict[str, dict[float, float]] = {}
    for stage in stages:
        few = PER_CLASS.match(stage.protocol)
        if stage.result and (few or stage.protocol == "finetune"):
            found.setdefault(stage.start, {})[float(few[1]) if few else float("inf")] = stage.result["top1"]
    table = pandas.DataFrame(found).sort_index()
    table.index = [f"{count:.0f}".replace("inf", "all") for count in table.index]
    curves = {start: table[start] for start in table}
    return {"labels": line_plot(curves, "Fine-tuning", "labels per class", "top-1 in percent")} if len(table) > 1 else {}


def draw_curves(stages: list[Stage]) -> dict[str, Figure]:
    """A figure per metric of the pre-training, and one of the loss per evaluation, with all its encoders."""
    figures = {}
    for protocol in dict.fromkeys(stage.protocol for stage in stages if len(stage.metrics)):
        curves = {stage.start: stage.metrics.set_index("epoch") for stage in stages if stage.protocol == protocol and len(stage.metrics)}
        metrics = [name for name in next(iter(curves.values())) if name not in ("step", "lr")]
        for metric in metrics if protocol == "pretrain" else ["loss"]:
            own = {start: curve[metric] for start, curve in curves.items()}
            figures[f"{protocol}_{metric}"] = line_plot(own, protocol.replace("_", " "), "epoch", metric.replace("_", " "))
    return figures
