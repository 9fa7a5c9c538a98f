"""Judge an encoder by semantic segmentation.

python -m benchmarks.segmentation --paper droppos --checkpoint runs/droppos/... --data /datasets/ADEChallengeData2016
"""

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from lightning.fabric import Fabric
from rich.table import Table
from torch import nn

from benchmarks.downstream import check_record, ledger_row, run_command
from benchmarks.ledger.rows import Row, record
from benchmarks.papers import ROOT
from benchmarks.pretrained import Pretrained, find_pretrained
from benchmarks.reproduce import TYRO
from benchmarks.segmentation.crops import Crops
from benchmarks.segmentation.data import Scenes, open_scenes
from benchmarks.segmentation.linear import Retrieval, Segmenter, shares
from benchmarks.segmentation.pictures import draw
from benchmarks.segmentation.score import View, confusion, score, windows
from benchmarks.segmentation.upernet import UPerNet
from common.data import DataError
from common.data.workers import default_workers
from common.environment import device_name
from common.processes import once
from common.randomness import generator, reseed
from common.recipe import RecipeError, TrainConfig, as_json
from common.run import Run, console
from common.stopping import stop_on_signals
from common.train import device_batch, fit, make_fabric
from common.vit import ViT

# AdamW as MAE fine-tunes ViT-B on ADE20K (layer decay 0.65); 32 epochs of 16 crops, as in arXiv 2404.12172: 40,000 steps of ADE20K.
TUNED = TrainConfig(epochs=32, batch_size=16, base_lr=1e-4, lr_batch=16, warmup_epochs=1, layer_decay=0.65, device_batch=16)
FROZEN = replace(TUNED, base_lr=1e-3, layer_decay=None)  # only the linear layer is trained
# As MAE fine-tunes on ADE20K: 127 epochs are 160,000 steps, 1.2 of them warm-up. For ViT-L its layer decay is 0.75, its drop_path 0.2.
UPERNET = replace(TUNED, epochs=127, warmup_epochs=1.2, linear_decay=True)
MEMORY = 100_000  # patches of the training images that ENGINE=knn remembers
METRICS = ("miou", "mean_accuracy", "pixel_accuracy")


@dataclass
class Options:
    """Judge an encoder by semantic segmentation, and print the intersection over union of each class. An interrupted run resumes."""

    data: Path
    """ADE20K, Pascal VOC, or a folder with images/{train,val}, masks/{train,val} and classes.json."""
    paper: str | None = None
    """The folder of a paper or a baseline; not needed with the folder of a run."""
    checkpoint: Path | None = None
    """The folder of a run, or a file with an encoder; by default random weights."""
    recipe: str | None = None
    """Recipe of the paper that says how the encoder is built; by default that for ImageNet."""
    set: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Override a setting of that recipe; repeatable: --set encoder.depth=24."""
    engine: Literal["linear", "knn", "mmseg"] = "linear"
    """linear: a linear layer on the patch tokens. knn: the classes of the most similar training patches. mmseg: UPerNet."""
    frozen: bool = False
    """Train only the linear layer."""
    size: tuple[int, int] | None = None
    """Height and width of crops and windows in pixels; by default 512 x 512, in a folder of your own the size of its first image."""
    epochs: int | None = None
    """Epochs of the training; by default 32, with mmseg 127."""
    batch: int = TUNED.batch_size
    """Crops per step."""
    device_batch: int = TUNED.device_batch
    """Most crops of a forward pass on one device; lower it if the memory is too small."""
    lr: float | None = None
    """Learning rate of a step; by default 1e-4, frozen 1e-3."""
    layer_decay: float = 0.65
    """Factor on the learning rate per layer below the head; ignored if frozen."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; ignored if frozen."""
    seed: int = 0
    """Of the linear layer, random weights, and the order and crops of the images."""
    limit: int | None = None
    """Use at most this many training and test images, to try whether everything runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto uses a GPU if available."""
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"
    """auto is bf16-mixed if the hardware supports it, else 32-true."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_seconds: float = 20.0
    """Minimum seconds between checkpoints."""
    out: Path = Path("runs")
    """Directory of the runs; this one is in OUT/segmentation."""
    record: bool = False
    """Add the results to benchmarks/segmentation/results.csv and the log to benchmarks/segmentation/logs; not with --limit."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "device_batch", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"{name.upper()}={value} is less than 1; give a whole number from 1 up")
        if self.frozen and self.engine == "mmseg":
            raise RecipeError("FROZEN=1 and ENGINE=mmseg: only ENGINE=linear has a frozen encoder")
        if self.size is not None and min(self.size) < 1:
            raise RecipeError(f"SIZE={self.size[0]} {self.size[1]}: give the height and the width in pixels")
        check_record(self.record, self.limit)

    @property
    def protocol(self) -> str:
        """The name in the results."""
        return {"knn": "knn", "mmseg": "upernet", "linear": "linear" if self.frozen else "finetune"}[self.engine]

    @property
    def stage(self) -> TrainConfig:
        """The settings of the training."""
        base = FROZEN if self.frozen else replace(UPERNET if self.engine == "mmseg" else TUNED, layer_decay=self.layer_decay)
        epochs = self.epochs or base.epochs
        length: dict = {"epochs": epochs, "warmup_epochs": min(base.warmup_epochs, epochs / 10)}
        batches: dict = {"batch_size": self.batch, "lr_batch": self.batch, "device_batch": self.device_batch}
        return replace(base, **length, **batches, base_lr=self.lr or base.base_lr)


def segment(options: Options, pretrained: Pretrained | None = None, directory: Path | None = None) -> list[Row]:
    """Train and evaluate, print the scores, and return the rows. Encoder and directory of the run are by default those of the options."""
    fabric = make_fabric(options.device, options.precision)
    fabric.launch()
    if options.engine == "mmseg" and device_batch(options.stage, fabric.world_size) == 1:
        few = f"BATCH={options.batch} leaves 1 crop for a forward pass on each device"
        raise RecipeError(f"ENGINE=mmseg normalises over a batch, and {few}: raise BATCH or --device-batch")
    scenes = open_scenes(options.data)
    scenes = scenes.limited(options.limit) if options.limit else scenes
    pretrained = pretrained or find_pretrained(options.checkpoint, options.paper, options.recipe, options.set)
    pretrained.check_colour("segmentation")
    size = options.size or default_size(scenes, pretrained.recipe.patch_size)
    reseed(options.seed)
    encoder, loaded = pretrained.encoder(size, **changes(pretrained, options))
    once(fabric, lambda: scenes.check(encoder.patch_size))
    view = View(size, pretrained.mean, pretrained.std, scenes.short_side)
    settings = once(fabric, lambda: describe(options, scenes, pretrained, view, str(fabric._precision.precision)))
    if directory is None:
        root = options.out / "segmentation" / f"{pretrained.label}-{scenes.name}-seed{options.seed}"
        directory = root / f"{options.protocol}-{start(pretrained, options)}"
    with Run(directory, settings, fabric.device, main=fabric.is_global_zero) as run:
        result: Any = once(fabric, lambda: run.result)
        if result is None:
            where = f"{fabric.world_size} x {device_name(fabric.device)}, {fabric._precision.precision}"
            run.say(f"{scenes.name}: {len(scenes.train)} and {len(scenes.val)} images, {len(scenes.classes)} classes; {where}")
            run.say(f"{encoder.width} wide, {len(encoder.blocks)} deep, {size[0]} x {size[1]} px: {loaded}")
            model, hours = (retrieve if options.engine == "knn" else train)(fabric, run, encoder, scenes, view, options)
            scores = score(confusion(fabric, model, scenes, view))
            if run.main:
                draw(fabric, model, scenes, view, directory / "pictures.png")
            found = {name: getattr(scores, name) for name in METRICS} | {
                "iou": [None if math.isnan(one) else one for one in scores.iou],
                "hours": hours,
            }
            result = once(fabric, lambda: run.finish(found))
    rows = [row(result, name, options, scenes, pretrained, encoder, settings, directory.parent) for name in METRICS]
    if fabric.is_global_zero:
        show(f"{pretrained.label}, {scenes.name}, {options.engine}{', frozen' * options.frozen}", scenes, result)
        console.print(f"kept in {directory}; pictures: {directory / 'pictures.png'}", markup=False, soft_wrap=True)
        if options.record:
            record(rows, directory.parent, ROOT)
    return rows


def start(pretrained: Pretrained, options: Options) -> str:
    """As in the ledger: pretrained, scratch (random weights that are trained) or random (that stay frozen)."""
    frozen = options.frozen or options.engine == "knn"
    return "random" if frozen and pretrained.file is None else pretrained.start


def default_size(scenes: Scenes, patch: int | None) -> tuple[int, int]:
    """(height, width) of crops: the short side twice, or without one the size of the first image, rounded up to whole patches."""
    patch, side = patch or 1, scenes.short_side
    width, height = (side, side) if side is not None else scenes.pair(scenes.train, 0)[0].size
    return (-(-height // patch) * patch, -(-width // patch) * patch)


def changes(pretrained: Pretrained, options: Options) -> dict[str, Any]:
    """Options of the encoder besides those of its pre-training. One without positions (MP3) gets learned ones if it is trained."""
    if options.frozen or options.engine == "knn":
        return {}
    return {"drop_path": options.drop_path, **pretrained.trained_positions}


def train(fabric: Fabric, run: Run, encoder: ViT, scenes: Scenes, view: View, options: Options) -> tuple[nn.Module, float]:
    """Train a linear layer, with the encoder or alone, or UPerNet. Returns the model and the hours."""
    stage = options.stage
    crops = Crops(
        scenes,
        size=view.size,
        mean=view.mean,
        std=view.std,
        batch_size=device_batch(stage, fabric.world_size),
        seed=options.seed,
        device=fabric.device,
        workers=options.workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        accumulate=stage.batch_size // (device_batch(stage, fabric.world_size) * fabric.world_size),
    )
    reseed(options.seed, 1)  # every encoder gets the same linear layer
    count = len(scenes.classes)
    model = UPerNet(encoder, count) if options.engine == "mmseg" else Segmenter(encoder, count, options.frozen)
    more: dict = {"compile": options.compile, "checkpoint_seconds": options.checkpoint_seconds}
    return fit(run, fabric, model, stage, crops, options.seed, **more)


@torch.no_grad()
def retrieve(fabric: Fabric, run: Run, encoder: ViT, scenes: Scenes, view: View, options: Options) -> tuple[Retrieval, float]:
    """Remember patches of the training images. Returns the model and the hours. Raises DataError if no patch has a class."""
    begun = time.perf_counter()
    model = Retrieval(encoder, len(scenes.classes)).to(fabric.device).eval()
    each = -(-MEMORY // len(scenes.train))
    tokens, found = [], []
    for index in range(len(scenes.train)):
        image, class_HW = scenes.pair(scenes.train, index)
        pixels, classes = view.read(image, fabric.device), view.read_classes(class_HW, image).to(fabric.device)
        boxes = list(windows(classes.shape, view.size))
        with fabric.autocast():
            token_ND = torch.cat([model.tokens(pixels[:, :, rows, columns]) for rows, columns in boxes])
        share_NK = torch.cat([shares(classes[None, rows, columns], encoder.grid, model.classes).flatten(0, 2) for rows, columns in boxes])
        known_N = share_NK.sum(1).nonzero()[:, 0].cpu()
        kept = known_N[torch.randperm(len(known_N), generator=generator(options.seed, index))[:each]].to(fabric.device)
        tokens.append(token_ND[kept])
        found.append(share_NK[kept])
    model.remember(torch.cat(tokens), torch.cat(found))
    if not len(model.key_RD):
        raise DataError(f"no patch of {scenes.folder} has a class at half of its pixels: check the masks")
    run.say(f"{len(model.key_RD)} patches of {len(scenes.train)} images are remembered")
    return model, (time.perf_counter() - begun) / 3600


def describe(options: Options, scenes: Scenes, pretrained: Pretrained, view: View, precision: str) -> dict[str, Any]:
    """All settings that determine the result."""
    stage = {} if options.engine == "knn" else {"stage": as_json(options.stage)}
    images = {"name": scenes.name, "classes": len(scenes.classes), **scenes.identity}
    shown = {"size": list(view.size), "mean": list(view.mean), "std": list(view.std), "short_side": view.short_side}
    return {
        "protocol": options.protocol,
        "encoder": pretrained.identity | changes(pretrained, options),
        "data": images,
        "view": shown,
        "seed": options.seed,
        "precision": precision,
        **stage,
    }


def row(
    result: dict, metric: str, options: Options, scenes: Scenes, pretrained: Pretrained, encoder: ViT, settings: dict, root: Path
) -> Row:
    """A row of the ledger."""
    stage = options.stage
    size = "x".join(map(str, encoder.image_size))
    facts = f"engine={options.engine} size={size} short_side={scenes.short_side}"
    if options.engine != "knn":
        steps = stage.epochs * (len(scenes.train) // stage.batch_size)
        facts += f" epochs={stage.epochs} iterations={steps} batch={stage.batch_size} lr={stage.lr:g} layer_decay={stage.layer_decay}"
    own: dict = {"data": scenes.name, "protocol": options.protocol, "start": start(pretrained, options), "seed": options.seed}
    own |= {"precision": settings["precision"], "settings": facts, "run": root.name}
    return ledger_row("segmentation", pretrained, options, result, metric, **own)


def show(title: str, scenes: Scenes, result: dict) -> None:
    """Print the scores."""
    table = Table(
        "Class", "IoU", title=title, caption="percent; a class without a pixel has none", min_width=min(len(title), console.width)
    )
    for name, value in zip(scenes.classes, result["iou"], strict=True):
        table.add_row(name, "-" if value is None else f"{value:.1f}")
    table.add_section()
    for name in METRICS:
        table.add_row({"miou": "mean IoU"}.get(name, name.replace("_", " ")), f"{result[name]:.2f}")
    console.print(table, soft_wrap=False)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a user error. After a signal it raises Stopped, which exits with 75."""

    def work() -> None:
        segment(tyro.cli(Options, args=arguments, prog="python -m benchmarks.segmentation", description=__doc__, config=TYRO))

    return run_command(work, "lower --device-batch")


if __name__ == "__main__":
    with stop_on_signals(exiting=True):
        sys.exit(main())
