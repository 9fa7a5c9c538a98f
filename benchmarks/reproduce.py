"""Reproduce a paper: pre-train, judge the encoder by the recipe's protocols, and show the numbers beside the published ones.

python -m benchmarks.reproduce droppos --epochs 800 --data /datasets/imagenet
"""

import dataclasses
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.ledger.rows import Row, record
from benchmarks.ledger.tables import show
from benchmarks.papers import ROOT, choose_recipe, paper_module
from benchmarks.preflight import check
from benchmarks.stages import Stages
from common import keep_freed_memory
from common.data import open_data
from common.data.loaders import default_workers
from common.environment import device_name
from common.recipe import RecipeError, base_arm, choose_arms, override
from common.run import RunError, console
from common.stopping import Stopped, stop_on_signals
from common.train import make_fabric


@dataclass
class Options:
    """Pre-train by a paper's recipe, evaluate by its protocols, print the table. A stopped run goes on where it was."""

    paper: Annotated[str, tyro.conf.Positional]
    """Which paper, by its folder, such as droppos or positional_label, or a baseline: deit, ijepa, mae."""
    data: str = "digits"
    """digits (no download), cifar10, cifar100, tiny-imagenet, mini-imagenet, or a folder with train/ and val/ in ImageFolder layout."""
    data_name: str | None = None
    """What the results call the data; by default a folder's own name. Published numbers on ImageNet-1k are matched by imagenet1k."""
    recipe: str | None = None
    """Which recipe of the paper; by default the one meant for the data."""
    arms: tuple[str, ...] = ()
    """Which of the variants that a recipe runs side by side, such as vit vit+rpl; by default all."""
    epochs: int | None = None
    """Epochs of pre-training, in place of the recipe's."""
    encoder: Path | None = None
    """Evaluate the encoder in this file (names of timm, DropPos, MAE, MaPeT, I-JEPA or StoP) instead of pre-training one."""
    seeds: int = 1
    """How many seeds: 0, 1, ..., of which the table shows mean and standard deviation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU where there is one."""
    out: Path = Path("runs")
    """Where runs are kept."""
    prepare: bool = False
    """Only make what the pre-training learns from (MaPeT's tokens), and stop."""
    record: bool = False
    """Add the numbers to <paper>/results.csv and the log to <paper>/logs."""
    set: tyro.conf.UseAppendAction[list[str]] = dataclasses.field(default_factory=list)
    """Change the recipe, of every arm; repeatable: --set pretrain.base_lr=1e-3 --set method.sigma=2 --set finetune.stage.epochs=50."""
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"
    """auto is bf16-mixed where the hardware computes it, else 32-true."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work, under torchrun."""
    workers: int = dataclasses.field(default_factory=default_workers)
    """Processes that decode images, per device; by default the cores, shared among the processes of the machine, at most 8."""
    compile: bool = False
    """Compile the models with torch.compile."""
    checkpoint_seconds: float = 20.0
    """Least time between checkpoints; large models are saved more rarely, so that saving takes at most a fiftieth of the time."""
    data_root: Path = Path("data")
    """Where named data sets are kept."""
    skip_corrupt: bool = False
    """Put the next readable image in the place of one that is not, instead of stopping."""

    def __post_init__(self) -> None:
        for name in ("epochs", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name.upper()}={value} is less than 1; give a whole number from 1 up")


def reproduce(options: Options) -> list[Row]:
    """All seeds of a recipe; prints the table and returns the rows."""
    module = paper_module(options.paper)
    data = open_data(options.data, options.data_root, options.skip_corrupt)
    data.name = options.data_name or data.name
    name, recipe = choose_recipe(module, options.data, options.recipe)
    if options.encoder is not None and not recipe.protocols:
        raise RecipeError(f"the recipe {name} of {options.paper} has no protocol by which to judge an encoder; choose another RECIPE")
    if options.prepare and not hasattr(module, "prepare"):
        raise RecipeError(f"{options.paper} learns from nothing that is made before it trains; PAPER=mapet does")
    changes = [*options.set, *([f"pretrain.epochs={options.epochs}"] if options.epochs is not None else [])]
    arms = {arm: override(own, changes) for arm, own in choose_arms(recipe, options.arms).items()}
    fabric = make_fabric(options.device, options.precision, options.strategy)
    fabric.launch()
    runs = [
        Stages(
            module=module,
            name=name,
            recipe=own,
            data=data,
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
        )
        for seed in range(options.seeds)
        for arm, own in arms.items()
    ]
    check(runs, prepare=options.prepare, record=options.record, root=ROOT)
    rows = []
    for run in runs:
        if fabric.is_global_zero:
            where = f"{fabric.world_size} x {device_name(fabric.device)}, {run.precision}"
            what = f"{run.recipe.backbone} on {data.name} ({len(data.train)} images), {run.recipe.pretrain.epochs} epochs, seed {run.seed}"
            title = f"{options.paper}, recipe {name}" + (f", arm {run.arm}" if run.arm else "")
            console.print(f"{title}: {what}; {where}; kept in {run.root}")
        if options.prepare:
            run.prepare()
            continue
        made = run.run(baselines=run.arm == runs[0].arm)  # arms differ in pre-training, which a baseline goes without
        if options.record and fabric.is_global_zero:
            record(made, run.root, ROOT)
        rows += made
    if rows and fabric.is_global_zero:
        show(options.paper, rows)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix. Raises Stopped, which exits with 75, after a signal."""
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that are not UTF-8, and file names that are not
    rank = int(os.environ.get("RANK", 0))
    try:
        with stop_on_signals():
            config = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
            reproduce(tyro.cli(Options, args=arguments, prog="python -m benchmarks.reproduce", description=__doc__, config=config))
    except Stopped:
        if rank == 0:
            console.print("stopped by a signal: what is finished is saved, and the same command goes on from here", markup=False)
        raise
    except (ValueError, RunError, OSError) as error:  # RecipeError, DataError and ConversionError are ValueErrors
        console.print(f"error{f' in process {rank}' if rank else ''}: {error}", style="bold red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    with stop_on_signals(exiting=True):
        sys.exit(main())
