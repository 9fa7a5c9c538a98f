"""The page of a run: results, accuracy against labels, learning curves, pictures, the encoder, settings, environment and log."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.report.encoder import IMAGES, attention_maps, feature_colours, load_method, position_accuracy, read_recipe, test_images
from benchmarks.report.figures import accuracy_lines, cell_map, encoder_views, learning_curves
from benchmarks.report.page import Section, write_page
from common.convert import load_encoder
from common.data import Data, open_data
from common.picture import as_pixels
from common.run import RunError
from common.vit import ViT

PER_CLASS = re.compile(r"finetune_(\d+)_per_class$")


@dataclass(frozen=True)
class Stage:
    """The folder of a stage: pretrain, or an evaluation and the encoder that it starts from, such as knn-pretrained."""

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.folder / "recipe.json").read_text())

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json; None if the stage is not finished."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    @cached_property
    def protocol(self) -> str:
        return self.folder.name.rpartition("-")[0] or self.folder.name

    @cached_property
    def start(self) -> str:
        """The encoder: pretrained, scratch, random, pixels, or 100ep; empty for the pre-training."""
        return self.folder.name.rpartition("-")[2] if "-" in self.folder.name else ""


def read_metrics(path: Path) -> pandas.DataFrame:
    """A metrics.jsonl as a frame with the columns step, epoch, lr and the metrics; an incomplete last line is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return pandas.DataFrame([json.loads(line) for line in lines if line.endswith("\n")])


def run_page(folder: Path, data: str | None, data_root: Path) -> Path:
    """Write the report of a run, and return its path. `data` and `data_root` say where its images are.

    Raises RunError for a run without a finished stage. What cannot be drawn, such as attention without the images, the page says.
    """
    stages = [Stage(path.parent) for path in sorted(folder.glob("*/recipe.json"))]
    stages.sort(key=lambda stage: (stage.start != "", stage.protocol, stage.start != "pretrained"))
    finished = [stage.result for stage in stages if stage.result is not None]
    if not finished:
        names = ", ".join(stage.folder.name for stage in stages)
        raise RunError(f"{folder} has no finished stage yet (begun: {names}): run the same make reproduce again until one is done")
    settings, environment = stages[0].settings, finished[0]["environment"]
    what = f"{settings['data']['name']}, seed {settings['seed']}, {settings['precision']}"
    about = f"{what}; {environment['device']}; {environment['versions']}; commit {environment['commit']}, {finished[0]['date']}"
    sections = [_results(stages), _labels(stages), _curves(stages), *_pictures(stages, data, data_root), _settings(stages), _log(stages)]
    return write_page(folder, f"{settings['paper']}, {folder.resolve().name}", about, sections)


def _results(stages: list[Stage]) -> Section:
    rows, own = [], ""
    for stage in stages:
        if not stage.start:
            texts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in (stage.result or {}).items() if isinstance(value, float)]
            own = f"Pre-training, on the test images: {', '.join(texts) or 'not finished'}."
            continue
        for one in (stage.result or {"results": [{"protocol": stage.protocol, "settings": "not finished"}]})["results"]:
            numbers = {name: one.get(name) for name in ("top1", "top5", "hours")}
            cells = {
                name: "-" if value is None else f"{value:.3g}" if name == "hours" else f"{value:.2f}" for name, value in numbers.items()
            }
            rows.append({"Evaluation": one["protocol"], "Encoder": stage.start, **cells, "Settings": one["settings"]})
    table = pandas.DataFrame(rows).rename(columns={"top1": "Top-1", "top5": "Top-5", "hours": "Hours"})
    return Section(heading="Results", about=own, table=table)


def _labels(stages: list[Stage]) -> Section:
    """Fine-tuning with few labels and with all."""
    found: dict[str, dict[float, float]] = {}
    for stage in stages:
        few = PER_CLASS.match(stage.protocol)
        if stage.result is not None and (few or stage.protocol == "finetune"):
            found.setdefault(stage.start, {})[float(few[1]) if few else float("inf")] = stage.result["top1"]
    means = pandas.DataFrame(found).sort_index()
    if len(means) < 2:
        return Section(heading="")
    means.index = ["all" if count == float("inf") else f"{count:.0f}" for count in means.index]
    figure = accuracy_lines(means, means * float("nan"), "Fine-tuning with few labels", "labels per class")
    return Section(heading="Accuracy against labels", figures={"labels": figure})


def _curves(stages: list[Stage]) -> Section:
    """A figure per metric of the pre-training, and one of the loss per evaluation, with all its encoders."""
    curves: dict[str, dict[str, pandas.DataFrame]] = {}
    for stage in stages:
        if len(curve := read_metrics(stage.folder / "metrics.jsonl")):
            curves.setdefault(stage.protocol, {})[stage.start] = curve
    figures = {}
    for protocol, own in curves.items():
        metrics = [name for name in next(iter(own.values())).columns if name not in ("step", "epoch", "lr")]
        for metric in metrics if protocol == "pretrain" else metrics[:1]:
            figures[f"{protocol}_{metric}"] = learning_curves(own, metric, protocol.replace("_", " "))
    return Section(heading="Learning curves", about="On the training images: means between two logged steps.", figures=figures)


def _pictures(stages: list[Stage], data_name: str | None, data_root: Path) -> Iterator[Section]:
    """Where positions are right, the run's own pictures, and what the encoder sees."""
    pictures = {f"{stage.folder.name}/{path.name}": path for stage in stages for path in sorted(stage.folder.glob("*.png"))}
    yield Section(heading="Pictures", about="Of the run, from test images." if pictures else "", pictures=pictures)
    trained = stages[0].folder / "encoder.safetensors"
    if stages[0].start or not trained.exists():
        yield Section(heading="Encoder", about="Not drawn: there is no pre-trained encoder yet.")
        return
    settings, recipe = stages[0].settings, read_recipe(stages[0].settings["recipe"])
    try:
        data = open_data(data_name or settings["data"]["name"], data_root)
        if differing := [name for name, value in data.identity.items() if value != settings["data"][name]]:
            raise ValueError(f"{', '.join(differing)} of {data.name} are not the images of the run; set DATA= to their folder")
    except (ValueError, OSError) as error:
        yield Section(heading="Encoder", about=f"Not drawn without the test images: {error}")
        return
    checkpoint = stages[0].folder / "checkpoint.pt"
    if "position_top1" in (stages[0].result or {}) and checkpoint.exists():
        method = load_method(checkpoint, settings["paper"], recipe, data)
        right_HW = position_accuracy(method, test_images(recipe, data, IMAGES), settings["seed"])
        if right_HW is not None:
            figures = {"positions": cell_map(right_HW.numpy(), "Positions right, by true cell")}
            yield Section(
                heading="Positions", about=f"Of at most {IMAGES} test images. Chance: {100 / right_HW.numel():.2g} %.", figures=figures
            )
    encoder = recipe.build_encoder(data.channels)
    if not isinstance(encoder, ViT):
        yield Section(heading="Encoder", about=f"Attention is only drawn for the ViT of this project, not for {recipe.backbone} of timm.")
        return
    load_encoder(encoder, load_file(trained))
    yield _views(encoder, next(test_images(recipe, data, 6).epoch(0))[0], data)


def _views(encoder: ViT, images: Tensor, data: Data) -> Section:
    """Attention and patch features of images (B, C, H, W)."""
    shown_BHWC = as_pixels(images, data).permute(0, 2, 3, 1).numpy()
    views = attention_maps(encoder, images).numpy(), feature_colours(encoder, images).numpy()
    attending = "class token" if encoder.prefix_tokens else "mean patch"
    about = f"Of the last block: attention of the {attending}, mean over heads. Colours: the three main components of the patch features."
    return Section(heading="Encoder", about=about, figures={"encoder": encoder_views(shown_BHWC, *views, attending)})


def _settings(stages: list[Stage]) -> Section:
    """The whole recipe.json of the first stage; of the others the part that differs."""
    folded = {}
    for stage in stages:
        own = stage.settings if stage is stages[0] else {"protocol": stage.settings.get("protocol")}
        folded[f"{stage.folder.name}: settings"] = json.dumps(own, indent=1)
    return Section(heading="Settings", folded=folded)


def _log(stages: list[Stage]) -> Section:
    """Where each stage ran, and its messages."""
    starts = {stage.folder.name: json.loads((stage.folder / "environment.json").read_text()) for stage in stages}
    table = pandas.DataFrame([{"stage": name, **start} for name, own in starts.items() for start in own]).fillna("-")
    logs = {f"{stage.folder.name}: log": path.read_text() for stage in stages if (path := stage.folder / "log.txt").exists()}
    return Section(heading="Environment and log", about="A row for each start of a stage.", table=table, folded=logs)
