"""Judge an encoder by object detection and instance segmentation, with ViTDet.

python -m benchmarks.detection --paper droppos --checkpoint runs/droppos/... --data /datasets/coco
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from lightning.fabric import Fabric
from rich.table import Table

from benchmarks.downstream import check_record, ledger_row, run_command
from benchmarks.ledger.rows import Row, record
from benchmarks.papers import ROOT
from benchmarks.pretrained import Pretrained, find_pretrained
from benchmarks.reproduce import TYRO
from common.data.workers import default_workers
from common.environment import device_name
from common.processes import once
from common.randomness import reseed
from common.recipe import RecipeError, TrainConfig, as_json
from common.run import Run, RunError, console
from common.stopping import stop_on_signals
from common.train import make_fabric

try:
    from benchmarks.detection import torchvision_engine
    from benchmarks.detection.data import Detections, open_detections
    from benchmarks.detection.pictures import chosen, draw
    from benchmarks.detection.torchvision_engine import METRICS
    from benchmarks.detection.vitdet import PATCH, SimpleFeaturePyramid, WindowedViT
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "pycocotools":
        raise
    sys.exit('error: detection needs pycocotools: pip install -e ".[det]"')

SQUARE = 64  # the input is a multiple of it, the stride of p6
WARMUP = 250  # steps
# (stochastic depth, layer decay) of ViTDet, Appendix A.2; smaller models take those of base
BY_SIZE = {"large": (0.4, 0.8), "huge": (0.5, 0.9)}
BASE = (0.1, 0.7)
PROGRESS = {"torchvision": "checkpoint.pt", "detectron2": "detectron2/last_checkpoint"}  # the file from which an engine resumes


@dataclass
class Options:
    """Judge an encoder by detection with Mask R-CNN on ViTDet's pyramid, and print box and mask AP. An interrupted run resumes."""

    data: Path
    """A folder in COCO's format: annotations/instances_{train,val}.json and images/, or COCO 2017 itself."""
    paper: str | None = None
    """The folder of a paper or a baseline; not needed with the folder of a run."""
    checkpoint: Path | None = None
    """The folder of a run, or a file with an encoder; by default random weights."""
    recipe: str | None = None
    """Recipe of the paper that says how the encoder is built; by default that for ImageNet."""
    set: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Override a setting of that recipe; repeatable: --set size=large."""
    engine: Literal["torchvision", "detectron2"] = "torchvision"
    """torchvision: several processes, runs everywhere. detectron2: the library that the papers use, to be installed separately."""
    image_size: int = 1024
    """Side in pixels of the square input, a multiple of 64."""
    window: int = 14
    """Side of a window of the attention in patches."""
    global_blocks: int = 4
    """Number of blocks with global attention."""
    relative_positions: bool = True
    """Decomposed relative positions; --no-relative-positions leaves them out."""
    channels: int = 256
    """Channels of the pyramid and the heads."""
    epochs: int = 100
    """Epochs of the training."""
    batch: int = 64
    """Images per step."""
    device_batch: int = 8
    """Most images of a forward pass on one device; lower it if the memory is too small. detectron2 takes the whole batch at once."""
    lr: float = 1e-4
    """Learning rate of a step."""
    layer_decay: float | None = None
    """Factor on the learning rate per layer below the pyramid; by default ViTDet's: 0.7, large 0.8, huge 0.9."""
    drop_path: float | None = None
    """Stochastic depth of the last block; by default ViTDet's: 0.1, large 0.4, huge 0.5."""
    grad_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""
    seed: int = 0
    """Of the heads, random weights, and the order and jitter of the images."""
    limit: int | None = None
    """Use at most this many training and validation images, to try whether everything runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto uses a GPU if available."""
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"
    """auto is bf16-mixed if the hardware supports it, else 32-true."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images."""
    checkpoint_seconds: float = 20.0
    """Minimum seconds between checkpoints."""
    out: Path = Path("runs")
    """Directory of the runs; this one is in OUT/detection."""
    record: bool = False
    """Add the results to benchmarks/detection/results.csv and the log to benchmarks/detection/logs; not with --limit."""

    def __post_init__(self) -> None:
        for name in ("image_size", "window", "channels", "epochs", "batch", "device_batch", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"{name.upper()}={value} is less than 1; give a whole number from 1 up")
        if self.image_size % SQUARE:
            near = max(SQUARE, round(self.image_size / SQUARE) * SQUARE)
            raise RecipeError(f"IMAGE_SIZE={self.image_size} is not a multiple of {SQUARE}, the stride of the last map: use {near}")
        check_record(self.record, self.limit)

    def stage(self, size: str, images: int) -> TrainConfig:
        """The settings of the training: AdamW, a warm-up of 250 steps, and a tenth of the rate after 88.9 % and 96.3 % of the epochs."""
        steps = images // self.batch
        milestones = {math.floor(share * self.epochs + 0.5) for share in (0.889, 0.963)}
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch,
            base_lr=self.lr,
            lr_batch=self.batch,
            warmup_epochs=(WARMUP + 0.5) / max(1, steps),
            warmup_lr=self.lr / 1000,
            milestones=tuple(sorted(milestones)),
            weight_decay=0.1,
            layer_decay=self.layer_decay or BY_SIZE.get(size, BASE)[1],
            device_batch=self.device_batch,
        )


def detection(options: Options) -> list[Row]:
    """Train and evaluate, print the scores, and return the rows."""
    fabric = make_fabric(options.device, options.precision)
    if options.engine == "detectron2" and fabric.device.type == "cpu":
        if options.precision == "bf16-mixed":
            raise RecipeError("--precision bf16-mixed: the loop of detectron2 has it only for GPUs: use 32-true, or ENGINE=torchvision")
        fabric = make_fabric("cpu", "32-true")
    fabric.launch()
    data = open_detections(options.data)
    data = data.limited(options.limit) if options.limit else data
    pretrained = find_pretrained(options.checkpoint, options.paper, options.recipe, options.set)
    pretrained.check_colour("detection")
    if pretrained.recipe.patch_size not in (None, PATCH):
        patch = f"patches of {pretrained.recipe.patch_size} pixels"
        raise RecipeError(f"the encoder of {pretrained.paper}, {pretrained.name} has {patch}: detection needs {PATCH}")
    if options.batch > len(data.train):
        raise RecipeError(f"BATCH={options.batch}, but there are {len(data.train)} training images with objects: lower it")
    stage = options.stage(pretrained.recipe.size, len(data.train))
    reseed(options.seed)
    encoder, loaded = pretrained.encoder((options.image_size, options.image_size), **changes(pretrained, options))
    once(fabric, lambda: data.check(PATCH))
    net = WindowedViT(encoder, options.window, options.global_blocks, options.relative_positions)
    backbone = SimpleFeaturePyramid(net, options.channels)
    root = options.out / "detection" / f"{pretrained.label}-{data.name}-seed{options.seed}"
    settings = once(fabric, lambda: describe(options, stage, data, pretrained, str(fabric._precision.precision)))
    part = f"{options.engine}-{pretrained.start}"
    with Run(root / part, settings, fabric.device, fabric.is_global_zero, PROGRESS[options.engine]) as run:
        result: Any = once(fabric, lambda: run.result)
        if result is None:
            where = f"{fabric.world_size} x {device_name(fabric.device)}, {fabric._precision.precision}"
            run.say(f"{data.name}: {len(data.train)} and {len(data.val)} images, {len(data.classes)} classes; {where}")
            run.say(f"not used in the training: {data.left_out}")
            run.say(f"{encoder.width} wide, {len(encoder.blocks)} deep, {options.image_size} px: {loaded}")
            found = (with_torchvision if options.engine == "torchvision" else with_detectron2)(
                fabric, run, backbone, data, stage, pretrained, options
            )
            result = once(fabric, lambda: run.finish(found))
    rows = [row(result, name, options, stage, data, pretrained, settings, root) for name in METRICS]
    if fabric.is_global_zero:
        show(f"{pretrained.label}, {data.name}, {options.engine}", result)
        console.print(f"kept in {root / part}; pictures: {root / part / 'pictures.png'}", markup=False, soft_wrap=True)
        if options.record:
            record(rows, root, ROOT)
    return rows


def changes(pretrained: Pretrained, options: Options) -> dict[str, Any]:
    """Options of the encoder besides those of its pre-training. One without positions (MP3) gets learned ones."""
    drop_path = BY_SIZE.get(pretrained.recipe.size, BASE)[0] if options.drop_path is None else options.drop_path
    return {"drop_path": drop_path, "grad_checkpointing": options.grad_checkpointing, **pretrained.trained_positions}


def with_torchvision(
    fabric: Fabric, run: Run, backbone: SimpleFeaturePyramid, data: Detections, stage: TrainConfig, pretrained: Pretrained, options: Options
) -> dict[str, float]:
    """Train, evaluate, and write pictures.png. Returns the scores and the hours of the training."""
    view: dict = {"size": options.image_size, "mean": pretrained.mean, "std": pretrained.std}
    work: dict = {"seed": options.seed, "workers": options.workers, "checkpoint_seconds": options.checkpoint_seconds}
    model, hours = torchvision_engine.train(fabric, run, backbone, data, stage, **view, **work)
    scores = torchvision_engine.evaluate(fabric, model, data, **view)
    if run.main:
        found = [torchvision_engine.detect(fabric, model, data, photo, **view) for photo in chosen(data)]
        draw(data, found, run.directory / "pictures.png")
    return scores | {"hours": hours}


def with_detectron2(
    fabric: Fabric, run: Run, backbone: SimpleFeaturePyramid, data: Detections, stage: TrainConfig, pretrained: Pretrained, options: Options
) -> dict[str, float]:
    """The same with detectron2. Raises RunError if it is not installed."""
    try:
        from benchmarks.detection import detectron2_engine
    except ImportError as error:
        raise RunError(f"ENGINE=detectron2: {error}; benchmarks/detection/README.md has the two lines that install it") from error
    if fabric.world_size > 1:
        raise RunError("ENGINE=detectron2 runs in one process here: use one GPU, or ENGINE=torchvision")
    view: dict = {"size": options.image_size, "mean": pretrained.mean, "std": pretrained.std}
    work: dict = {"seed": options.seed, "workers": options.workers, "checkpoint_seconds": options.checkpoint_seconds}
    model, hours = detectron2_engine.train(fabric, run, backbone, data, stage, **view, **work)
    scores = detectron2_engine.evaluate(model, data, options.image_size)
    draw(data, [detectron2_engine.detect(model, data, photo, options.image_size) for photo in chosen(data)], run.directory / "pictures.png")
    return scores | {"hours": hours}


def describe(options: Options, stage: TrainConfig, data: Detections, pretrained: Pretrained, precision: str) -> dict[str, Any]:
    """All settings that determine the result."""
    drop_path = changes(pretrained, options)["drop_path"]
    return {
        "protocol": "detection",
        "engine": options.engine,
        "encoder": pretrained.identity | {"drop_path": drop_path, "mean": list(pretrained.mean), "std": list(pretrained.std)},
        "data": {"name": data.name, "train": len(data.train), "val": len(data.val), **{f"{k}_file": v for k, v in data.identity.items()}},
        "image_size": options.image_size,
        "window": options.window,
        "global_blocks": options.global_blocks,
        "relative_positions": options.relative_positions,
        "channels": options.channels,
        "seed": options.seed,
        "precision": precision,
        "stage": as_json(stage),
    }


def row(
    result: dict, metric: str, options: Options, stage: TrainConfig, data: Detections, pretrained: Pretrained, settings: dict, root: Path
) -> Row:
    """A row of the ledger."""
    steps = stage.epochs * (len(data.train) // stage.batch_size)
    facts = f"engine={options.engine} image_size={options.image_size} iterations={steps} window={options.window}"
    facts += f" global_blocks={options.global_blocks} relative_positions={options.relative_positions} epochs={stage.epochs}"
    facts += f" batch={stage.batch_size} lr={stage.lr:g} layer_decay={stage.layer_decay}"
    own: dict = {"data": data.name, "protocol": options.engine, "start": pretrained.start, "seed": options.seed}
    own |= {"precision": settings["precision"], "settings": facts, "run": root.name}
    return ledger_row("detection", pretrained, options, result, metric, **own)


def show(title: str, result: dict) -> None:
    """Print the scores."""
    table = Table("", "AP", "AP50", title=title, caption="percent, on the validation images", min_width=min(len(title), console.width))
    for kind in ("box", "mask"):
        table.add_row(kind, f"{result[f'ap_{kind}']:.1f}", f"{result[f'ap50_{kind}']:.1f}")
    console.print(table, soft_wrap=False)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a user error. After a signal it raises Stopped, which exits with 75."""

    def work() -> None:
        detection(tyro.cli(Options, args=arguments, prog="python -m benchmarks.detection", description=__doc__, config=TYRO))

    return run_command(work, "lower --device-batch (with ENGINE=detectron2 BATCH) or IMAGE_SIZE, or use --grad-checkpointing")


if __name__ == "__main__":
    with stop_on_signals(exiting=True):
        sys.exit(main())
