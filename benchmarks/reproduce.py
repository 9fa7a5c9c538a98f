"""Reproduce a paper: pre-train, evaluate the encoder by the recipe's protocols, and print the results beside the published numbers.

python -m benchmarks.reproduce droppos --epochs 800 --data /datasets/imagenet
"""

import dataclasses
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from lightning.fabric import Fabric

from benchmarks.epochs import show_by_epoch
from benchmarks.launch import launch
from benchmarks.ledger.rows import Row, record
from benchmarks.ledger.tables import show
from benchmarks.papers import ROOT, choose_recipe, paper_module
from benchmarks.preflight import check
from benchmarks.stages import Stages
from common import keep_freed_memory
from common.data import SmallCopy, open_data
from common.data.workers import default_workers
from common.environment import code, device_name, versions
from common.processes import once, require_same
from common.progress import progress_bar
from common.recipe import RecipeError, base_arm, choose_arms, nearest, override
from common.run import RunError, console
from common.stopping import Stopped, stop_on_signals, stop_with_parent
from common.train import make_fabric

USER_ERRORS = (ValueError, RunError, OSError)  # RecipeError, DataError and ConversionError are ValueErrors
TYRO = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)  # how command lines are read


@dataclass
class Options:
    """Pre-train and evaluate by a paper's recipe, and print a table. An interrupted run resumes from its last checkpoint."""

    paper: Annotated[str, tyro.conf.Positional]
    """The folder of a paper, such as droppos or positional_label, or a baseline: deit, ijepa, mae."""
    data: str = "digits"
    """digits (no download), cifar10, cifar100, tiny-imagenet, mini-imagenet, or a folder with train/ and val/ in ImageFolder layout."""
    data_name: str | None = None
    """Name of the data in the results; by default the name of the folder. Use imagenet1k for the published numbers on ImageNet-1k."""
    recipe: str | None = None
    """Name of a recipe of the paper; by default the one declared for the data."""
    arms: tuple[str, ...] = ()
    """Names of the variants (arms) of the recipe to run, such as vit vit+rpl; by default all."""
    epochs: int | None = None
    """Epochs of pre-training; by default those of the recipe."""
    every: int | None = None
    """Also evaluate the encoder after each so many epochs of pre-training, and write all results to OUT/<paper>/epochs.csv."""
    encoder: Path | None = None
    """Evaluate the encoder in this file (names of timm, DropPos, MAE, MaPeT, I-JEPA or StoP) instead of pre-training one."""
    seeds: int = 1
    """Number of seeds; the table shows their mean and standard deviation."""
    first_seed: int = 0
    """The first seed; the others are the next whole numbers."""
    stages: tuple[str, ...] = ()
    """Run only these: pretrain, or names of protocols, such as finetune linear; by default all. The table shows what was run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto uses a GPU if available."""
    out: Path = Path("runs")
    """Directory of the runs."""
    cache: int | None = None
    """Read a copy of the images whose short side has this many pixels, such as 256; it is made first, below data_root/cache. For files."""
    prepare: bool = False
    """Only make what the pre-training reads (MaPeT's tokens, the copy of --cache), then exit."""
    record: bool = False
    """Add the results to <paper>/results.csv and the log to <paper>/logs."""
    set: tyro.conf.UseAppendAction[list[str]] = dataclasses.field(default_factory=list)
    """Override a setting, for all arms; repeatable: --set pretrain.base_lr=1e-3 --set method.sigma=2 --set finetune.stage.epochs=50
    --set finetune.shuffle_test=true --set finetune_5_per_class.label_seed=0."""
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"
    """auto is bf16-mixed if the hardware supports it, else 32-true."""
    gpus: int = 1
    """Number of GPUs of this machine, one process each (with --device cpu: number of processes)."""
    workers: int = dataclasses.field(default_factory=default_workers)
    """Data loader workers per device; by default the CPU cores divided by the processes on the machine, at most 8."""
    compile: bool = False
    """Compile the models with torch.compile."""
    checkpoint_seconds: float = 20.0
    """Minimum seconds between checkpoints; large models are saved less often, so that saving takes at most 2 % of the time."""
    data_root: Path = Path("data")
    """Directory of the named data sets."""
    skip_corrupt: bool = False
    """Replace an unreadable image by the next readable one, instead of stopping."""

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "cache": 1, "seeds": 1, "gpus": 1, "every": 1, "first_seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name.upper()}={value} is less than {least}; give a whole number from {least} up")
        if self.gpus > 1 and self.device != "cpu" and self.gpus > (found := torch.cuda.device_count()):
            raise RecipeError(f"GPUS={self.gpus}, but torch finds {found}; use GPUS={found or 1}, or DEVICE=cpu for processes on CPU cores")


def plan(options: Options, fabric: Fabric) -> list[Stages]:
    """One Stages for each seed and arm, in the order in which they run. Raises RecipeError for names that are not known."""
    module = paper_module(options.paper)
    data = open_data(options.data, options.data_root, options.skip_corrupt)
    data.name = options.data_name or data.name
    copy = SmallCopy(data, options.cache, options.data_root) if options.cache is not None else None
    name, recipe = choose_recipe(module, options.data, options.recipe)
    if options.encoder is not None and not recipe.protocols:
        raise RecipeError(f"the recipe {name} of {options.paper} has no protocol to evaluate an encoder; choose another RECIPE")
    if options.prepare and copy is None and not hasattr(module, "prepare"):
        raise RecipeError(f"{options.paper} has nothing to make before training; PAPER=mapet has tokens, CACHE=256 a copy of the images")
    changes = [*options.set, *([f"pretrain.epochs={options.epochs}"] if options.epochs is not None else [])]
    arms = {arm: override(own, changes) for arm, own in choose_arms(recipe, options.arms).items()}
    stages = list(dict.fromkeys(["pretrain", *(protocol.name for own in arms.values() for protocol in own.protocols)]))
    for stage in options.stages:
        if stage not in stages:
            raise RecipeError(f"--stages {stage} is not known for the recipe {name} of {options.paper}; {nearest(stage, stages)}")
    runs = [
        Stages(
            module=module,
            name=name,
            recipe=own,
            data=copy.data if copy else data,
            fabric=fabric,
            seed=seed,
            out=options.out,
            arm=arm,
            base_arm=base_arm(recipe, arm),
            overrides=tuple(options.set),
            encoder_file=options.encoder,
            data_root=options.data_root,
            workers=options.workers,
            compile=options.compile,
            checkpoint_seconds=options.checkpoint_seconds,
            only=options.stages,
            every=options.every,
            copy=copy,
        )
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for arm, own in arms.items()
    ]
    least = max(run.short_side for run in runs)
    if options.cache is not None and options.cache < least:
        read = f"the {least} pixels of the short side to which the recipe {name} resizes images"
        raise RecipeError(f"CACHE={options.cache} is less than {read}; use CACHE={least} or more")
    return runs


def reproduce(options: Options) -> list[Row]:
    """Run all seeds and arms of a recipe, print the table, and return the rows."""
    fabric = make_fabric(options.device, options.precision)
    fabric.launch()
    runs = plan(options, fabric)
    require_same(fabric, {"code": code(), "versions": versions(), **{run.root.name: run.shared for run in runs}})
    once(fabric, lambda: check(runs, prepare=options.prepare, record=options.record, root=ROOT))
    once(fabric, lambda: make_copy(runs[0].copy, options.workers))
    rows = []
    for run in runs:
        if fabric.is_global_zero:
            where = f"{fabric.world_size} x {device_name(fabric.device)}, {run.precision}"
            images = f"{run.data.name} ({len(run.data.train)} images)"
            what = f"{run.recipe.backbone} on {images}, {run.recipe.pretrain.epochs} epochs, seed {run.seed}"
            title = f"{options.paper}, recipe {run.name}" + (f", arm {run.arm}" if run.arm else "")
            console.print(f"{title}: {what}; {where}; kept in {run.root}")
        if options.prepare:
            run.prepare()
            continue
        made = run.run(baselines=run.arm == runs[0].arm)  # a baseline has no pre-training, so it is the same for all arms
        if options.record and fabric.is_global_zero:
            record(made, run.root, ROOT)
        rows += made
    if rows and fabric.is_global_zero:
        show(options.paper, rows)
        if options.every is not None:
            show_by_epoch(runs)
    return rows


def make_copy(copy: SmallCopy | None, workers: int) -> None:
    """Make the copy of the images, if there is one and it is not complete. `workers` is per process of this machine; the others wait."""
    if copy is not None:
        with progress_bar(str(copy.folder)) as show:
            copy.make(workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), show)


def parse(arguments: list[str] | None = None) -> Options:
    """The options of a command line, by default of this process. Raises RecipeError for a value out of range, SystemExit for others."""
    return tyro.cli(Options, args=arguments, prog="python -m benchmarks.reproduce", description=__doc__, config=TYRO)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a user error. After a signal it raises Stopped, which exits with 75."""
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals and file names that are not UTF-8
    rank = int(os.environ.get("RANK", 0))
    if "LOCAL_RANK" in os.environ:  # started by a launcher
        stop_with_parent()
    try:
        with stop_on_signals():
            options = parse(arguments)
            if options.gpus > 1 and "WORLD_SIZE" not in os.environ:
                return launch(options.gpus, "benchmarks.reproduce", sys.argv[1:] if arguments is None else arguments)
            reproduce(options)
    except Stopped:
        if rank == 0:
            console.print("stopped by a signal: progress is saved; run the same command again to resume", markup=False)
        raise
    except USER_ERRORS as error:
        console.print(f"error{f' in process {rank}' if rank else ''}: {error}", style="bold red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    with stop_on_signals(exiting=True):
        sys.exit(main())
