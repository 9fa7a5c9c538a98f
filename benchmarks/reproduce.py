"""Reproduce a paper: pre-train, judge the encoder by the recipe's protocols, and show the numbers beside the published ones.

python -m benchmarks.reproduce droppos --epochs 800 --data /datasets/imagenet
"""

import dataclasses
import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import torch
import tyro
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.ledger.rows import Row, append
from benchmarks.ledger.screen import show
from benchmarks.papers import ROOT, choose_recipe, folder, paper_module, paper_name
from benchmarks.preflight import check
from common import keep_freed_memory
from common.checkpoint import export_encoder
from common.convert import load_encoder, read_checkpoint
from common.data import Augmentation, Data, Loader, Split, open_data
from common.data.augment import view_name
from common.data.loaders import default_workers
from common.environment import device_name
from common.evaluate import (
    Classifier,
    FeatureLoader,
    LinearProbe,
    accuracies,
    accuracy,
    can_cache,
    features,
    hold_out,
    knn_accuracy,
    layers_name,
    logistic_accuracy,
    own_metrics,
)
from common.files import digest
from common.processes import once
from common.randomness import reseed
from common.recipe import Protocol, Recipe, RecipeError, Stage, as_json, base_arm, choose_arms, override
from common.run import Run, RunError, console
from common.stopping import Stopped, stop_if_requested, stop_on_signals
from common.train import device_batch, fit, make_fabric
from common.vit import ViT


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


class Reproduction:
    """One seed of one recipe, or of one arm of it: its stages, each in a directory of its own, each done once."""

    def __init__(
        self,
        options: Options,
        module: ModuleType,
        name: str,
        recipe: Recipe,
        data: Data,
        fabric: Fabric,
        seed: int,
        arm: str = "",
        base_arm: str = "",
    ):
        self.options, self.module, self.recipe, self.data, self.fabric, self.seed = options, module, recipe, data, fabric, seed
        self.name, self.arm, self.base_arm = name, arm, base_arm
        self.paper = paper_name(module)
        label = "-".join(filter(None, [name, arm, data.name if data.name != name else ""]))
        source = f"{recipe.pretrain.epochs}ep" if options.encoder is None else options.encoder.stem
        self.root = options.out / self.paper / f"{label}-{source}-seed{seed}"
        self.precision = str(fabric._precision.precision)
        self.fitting = {"compile": options.compile, "checkpoint_seconds": options.checkpoint_seconds}
        self.size = (recipe.image_size, recipe.image_size)
        self._labelled: dict[str, Split] = {}

    def run(self, baselines: bool = True) -> list[Row]:
        """All stages in order, with or without what is not pre-trained; returns a row per number."""
        rows = self.pretrain() if self.options.encoder is None else self.convert(self.options.encoder)
        for protocol in self.recipe.protocols:
            starts = ["pretrained", "scratch" if protocol.kind == "finetune" else "random"]
            if protocol.kind == "knn" and self.data.train.images is not None:  # nobody has the memory for the pixels of ImageNet
                starts.append("pixels")
            for start in starts if baselines else starts[:1]:
                rows += self.evaluate(protocol, start)
        return rows

    def check(self) -> None:
        """Raise RecipeError with all of this run that cannot work; see benchmarks.preflight."""
        check([self], ROOT)

    def prepare(self, check: bool = False) -> Data:
        """What the pre-training sees: the data, with other targets in the place of labels where the method learns from such.

        check: only raise what making them would raise at its beginning.
        """
        if not hasattr(self.module, "prepare"):
            if self.options.prepare:
                raise RecipeError(f"{self.paper} learns from nothing that is made before it trains; PAPER=mapet does")
            return self.data
        folder, alone = self.options.data_root / "tokens", self.fabric.world_size == 1
        return self.module.prepare(self.recipe, self.data, folder, self.fabric.device, self.options.workers, make=alone, check=check)

    def pretrain(self) -> list[Row]:
        stage = self.recipe.pretrain
        with self.open("pretrain") as (run, result):
            if result is None:
                encoder = self.new_encoder()
                method = self.module.build(self.recipe, encoder, self.data.classes)
                data = self.prepare()
                train = self.loader(data.train, stage, stage.augmentation)
                method, hours = fit(run, self.fabric, method, stage, train, self.seed, **self.fitting)
                found = own_metrics(self.fabric, method, self.loader(data.val, stage, None), self.seed)
                if run.main:
                    export_encoder(method.encoder, run.directory / "encoder.safetensors")
                    if hasattr(self.module, "illustrate"):
                        spread = [index * len(self.data.val) // 4 for index in range(4)]  # folders are sorted by class
                        images, targets = next(self.loader(data.val.subset(spread), stage, None, alone=True).epoch(0))
                        reseed(self.seed, 0)
                        self.module.illustrate(method, images, targets, self.data, run.directory)
                result = self.finish(run, found | {"hours": hours})
        what = ("scratch", "scratch") if self.recipe.supervised else ("pretrain", "pretrained")
        return self.rows(result, *what, {name: result[name] for name in result if name.endswith(("top1", "top5"))})

    def convert(self, path: Path) -> list[Row]:
        """Put somebody else's encoder where a pre-trained one would be; there is no number of ours to report on it."""
        with self.open("pretrain") as (run, result):
            if result is None:
                if run.main:
                    encoder = self.new_encoder()
                    run.say(f"{path.name}: {load_encoder(encoder, read_checkpoint(path), allow_unused=('cls_token',))}")
                    export_encoder(encoder, run.directory / "encoder.safetensors")
                self.finish(run, {"hours": 0.0})
        return []

    def evaluate(self, protocol: Protocol, start: str) -> list[Row]:
        with self.open(f"{protocol.name}-{start}", protocol, start) as (run, result):
            if result is None:
                judge = {"finetune": self.finetune, "linear": self.probe, "logistic": self.logistic, "knn": self.knn}[protocol.kind]
                result = self.finish(run, judge(run, protocol, start))
        found = result["rows"].items()
        return [row for part, told in found for row in self.rows(result, protocol.name + part, start, {"top1": told["top1"]}, told["how"])]

    def finetune(self, run: Run, protocol: Protocol, start: str) -> dict:
        model = Classifier(self.start_encoder(start, protocol), self.data.classes, protocol)
        train = self.loader(self.labelled(protocol), protocol.stage, protocol.stage.augmentation)
        model, hours = fit(run, self.fabric, model, protocol.stage, train, self.seed, **self.fitting)
        found = accuracy(self.fabric, model, self.loader(self.data.val, protocol.stage, None, protocol))
        return found | {"hours": hours, "rows": {"": {"top1": found["top1"], "how": self.how(protocol, pool=protocol.pool)}}}

    def probe(self, run: Run, protocol: Protocol, start: str) -> dict:
        """The whole grid in one training, on features that are computed once where every epoch shows the same images.

        The best of a grid is chosen on labelled images on which nothing is trained; "test" chooses it on the test images.
        """
        model = LinearProbe(self.start_encoder(start, protocol), self.data.classes, protocol)
        labelled = self.labelled(protocol)
        train_N, held_N = hold_out(protocol, labelled.labels, self.seed)
        train = self.loader(labelled.subset(train_N), protocol.stage, protocol.stage.augmentation)
        test = self.loader(self.data.val, protocol.stage, None, protocol)
        held = self.loader(labelled.subset(held_N), protocol.stage, None, protocol) if len(held_N) else None
        if can_cache(protocol):
            (feature_ND, target_N), found = self.features(protocol, start)
            train, test = FeatureLoader(train, (feature_ND[train_N], target_N[train_N])), FeatureLoader(test, found)
            held = FeatureLoader(held, (feature_ND[held_N], target_N[held_N])) if held is not None else None
        model, hours = fit(run, self.fabric, model, protocol.stage, train, self.seed, **self.fitting)
        top1_G, top5_G = accuracies(self.fabric, model, test, (len(model.grid),)).tolist()
        seen = self.how(protocol, pool=protocol.pool, **({"held_out": len(held_N)} if held is not None else {}))
        grid = [{"top1": top1, "how": f"{name} {seen}"} for name, top1 in zip(model.names(), top1_G, strict=True)]
        if held is not None:
            for told, top1 in zip(grid, accuracies(self.fabric, model, held, (len(model.grid),))[0].tolist(), strict=True):
                told["held_out_top1"] = top1
        for told in grid:
            chosen_by = f" ({told['held_out_top1']:.6g} on the {len(held_N)} images held out)" if held is not None else ""
            run.say(f"{run.directory.name} {told['how']}: top1 {told['top1']:.6g}{chosen_by}")
        places = model.best([told.get("held_out_top1", told["top1"]) for told in grid])
        *_, best = places.values()
        rows = {part: grid[place] for part, place in places.items()}
        return {"top1": top1_G[best], "top5": top5_G[best], "hours": hours, "rows": rows, "grid": grid}

    def logistic(self, run: Run, protocol: Protocol, start: str) -> dict:
        begun, options = time.perf_counter(), {"statistics": protocol.statistics, "strength": protocol.strength}
        train, test = self.features(protocol, start)
        found = once(self.fabric, lambda: logistic_accuracy(*train, *test, classes=self.data.classes, **options))
        if not found["converged"]:
            run.say(f"{run.directory.name}: the weights have not converged, so the number is of a fit that was cut short")
        row = {"top1": found["top1"], "how": self.how(protocol, **self.frozen(protocol), **options)}
        return found | {"hours": (time.perf_counter() - begun) / 3600, "rows": {"": row}}

    def knn(self, run: Run, protocol: Protocol, start: str) -> dict:
        begun, options = time.perf_counter(), {"neighbours": protocol.neighbours, "temperature": protocol.temperature}
        train, test = self.features(protocol, start)
        top1 = once(self.fabric, lambda: knn_accuracy(*train, *test, classes=self.data.classes, **options))
        row = {"top1": top1, "how": self.how(protocol, **({} if start == "pixels" else self.frozen(protocol)), **options)}
        return {"top1": top1, "hours": (time.perf_counter() - begun) / 3600, "rows": {"": row}}

    def features(self, protocol: Protocol, start: str) -> list[tuple[Tensor, Tensor]]:
        """Features and classes of the training images that have labels, and of the test images; on disk after the first time."""
        encoder = None if start == "pixels" else self.start_encoder(start, protocol)
        found = []
        for part, split in ("train", self.labelled(protocol)), ("val", self.data.val):
            loader = self.loader(split, self.recipe.pretrain, None, protocol)
            cache = self.root / "features" / f"{start}-{part}"
            found.append(features(self.fabric, encoder, loader, protocol.pool, max(protocol.layers), cache))
        return found

    def labelled(self, protocol: Protocol) -> Split:
        """The training images whose labels the protocol may use; chosen once, as a list of them takes seconds to read on ImageNet."""
        if protocol.name not in self._labelled:
            train = self.data.train
            if protocol.labels_per_class is not None:
                train = train.per_class(protocol.labels_per_class, self.seed)
            elif protocol.label_share is not None:
                train = train.balanced(protocol.label_share, self.seed)
            elif protocol.label_list is not None:
                train = train.listed(Path(protocol.label_list))
            self._labelled[protocol.name] = train
        return self._labelled[protocol.name]

    def how(self, protocol: Protocol, **facts) -> str:
        """What tells a number besides recipe and data, for its row."""
        if self.data.val.paths is not None:
            facts |= {"resize": view_name(self.data, self.size, protocol.resize), "interpolation": protocol.interpolation}
        if len(labelled := self.labelled(protocol)) < len(self.data.train):
            facts["labels"] = len(labelled)
        return " ".join(f"{name}={value}" for name, value in facts.items())

    def frozen(self, protocol: Protocol) -> dict[str, str]:
        """What a frozen encoder gives, for a row."""
        return {"layers": layers_name(protocol.layers[0]), "pool": protocol.pool}

    def new_encoder(self, **changes) -> nn.Module:
        """A fresh encoder, the same for the same seed."""
        reseed(self.seed)
        return self.recipe.build_encoder(self.data.channels, **changes)

    def start_encoder(self, start: str, protocol: Protocol) -> ViT:
        """The encoder that an evaluation starts from: pre-trained, fresh, or where it stays frozen as its pre-training finds it."""
        encoder = self.new_encoder(drop_path=protocol.drop_path, **({"position": protocol.position} if protocol.position else {}))
        if start == "pretrained":
            with torch.device("meta"):  # for the names alone: every start then draws the same head
                own = self.recipe.build_encoder(self.data.channels).state_dict()
            # a protocol may have other positions than the pre-training
            added, left = (
                [name for name in encoder.state_dict() if name not in own],
                [name for name in own if name not in encoder.state_dict()],
            )
            pretrained = load_file(self.root / "pretrain" / "encoder.safetensors")
            load_encoder(encoder, pretrained, allow_missing=added, allow_unused=left)
        if start == "random":
            with torch.random.fork_rng(devices=[]):  # some methods draw the first weights of their encoder themselves
                encoder = self.module.build(self.recipe, encoder, self.data.classes).encoder
        return encoder

    def loader(
        self, split: Split, stage: Stage, augmentation: Augmentation | None, protocol: Protocol | None = None, alone: bool = False
    ) -> Loader:
        """Batches for this process, seen as the protocol says; `alone` where every process must see all images."""
        world = self.fabric.world_size
        batch = device_batch(stage, world)
        view = {"resize": None if split.paths is None else stage.augmentation.evaluation_resize}
        return Loader(
            split,
            data=self.data,
            image_size=self.size,
            batch_size=batch,
            augmentation=augmentation,
            seed=self.seed,
            device=self.fabric.device,
            workers=self.options.workers,
            rank=0 if alone else self.fabric.global_rank,
            world_size=1 if alone else world,
            accumulate=stage.batch_size // (batch * world),
            **({"resize": protocol.resize, "interpolation": protocol.interpolation} if protocol else view),
        )

    @contextmanager
    def open(self, stage: str, protocol: Protocol | None = None, start: str = "") -> Iterator[tuple[Run, dict | None]]:
        """The directory of a stage, and what came out of it where it is done. The first process decides, and tells the others."""
        stop_if_requested()
        settings = once(self.fabric, lambda: self.settings(protocol, start))
        run = Run(self.root / stage, settings, self.fabric.device, main=self.fabric.is_global_zero)
        with ExitStack() as stack:
            yield run, once(self.fabric, lambda: stack.enter_context(run).result)

    def settings(self, protocol: Protocol | None, start: str) -> dict:
        """Everything that the result of a stage follows from. Data and files are there with their content, not only by name."""
        asked = as_json(self.recipe)
        del asked["protocols"], asked["arms"]  # a change to one evaluation leaves the others as they are
        named = {f"method.{name}": value for name, value in self.recipe.method.items() if isinstance(value, str) and Path(value).is_file()}
        named |= {f"targets.{name}": value for name, value in self.recipe.targets.items() if isinstance(value, str)}  # a store is a folder
        named |= {"encoder": self.options.encoder, "label_list": protocol and protocol.label_list}
        named |= {"pretrained": self.root / "pretrain" / "encoder.safetensors"} if start == "pretrained" else {}
        paths = {name: Path(path) for name, path in named.items() if path is not None and Path(path).exists()}
        settings = {name: f"{path.name}, sha256 {digest(path)}" for name, path in paths.items()}
        settings |= {"paper": self.paper, "data": {"name": self.data.name, **self.data.identity}}
        settings |= {"seed": self.seed, "precision": self.precision, "recipe": asked}
        settings |= {"split": self.data.split} if self.data.split else {}
        return settings | ({"protocol": as_json(protocol)} if protocol else {})

    def finish(self, run: Run, result: dict) -> dict:
        """Write what came out; returns what the directory then holds, on every process."""
        return once(self.fabric, lambda: run.finish(result))

    def rows(self, result: dict, protocol: str, start: str, values: dict[str, float], how: str = "") -> list[Row]:
        """The ledger's rows of a finished stage, with the facts of when it ran, which may be before this call."""
        environment, home = result["environment"], folder(self.paper)
        facts = {
            "date": result["date"],
            "commit": environment["commit"],
            "paper": self.paper,
            "recipe": self.name,
            "arm": self.arm,
            "base_arm": self.base_arm,
            "overrides": " ".join(self.options.set),
            "encoder_file": self.options.encoder.name if self.options.encoder else "",
            "split": self.data.split,
            "data": self.data.name,
            "backbone": self.recipe.backbone,
            "pretrain_epochs": self.recipe.pretrain.epochs if self.options.encoder is None else 0,
            "seed": self.seed,
            "protocol": protocol,
            "start": start,
            "device": environment["device"],
            "precision": self.precision,
            "hours": round(result["hours"], 5),
            "versions": environment["versions"],
            "settings": how,
            "log": (home / "logs" / f"{'' if home.name == self.paper else self.paper + '-'}{self.root.name}.txt").as_posix(),
        }
        return [Row(metric=metric, value=round(value, 4), **facts) for metric, value in values.items()]

    def record(self, rows: list[Row]) -> None:
        """Put the rows into the paper's ledger, and the logs of all stages, as one file, beside it."""
        log = ROOT / rows[0].log
        log.parent.mkdir(exist_ok=True)
        stages = sorted(self.root.glob("*/log.txt"), key=lambda path: path.stat().st_mtime)
        text = "".join(f"# {path.parent.name}\n{path.read_text(encoding='utf-8')}" for path in stages)
        log.write_text(text, encoding="utf-8")
        append(ROOT / folder(self.paper) / "results.csv", rows)
        console.print(f"recorded {len(rows)} numbers and {rows[0].log}; `make table` brings the READMEs up to date")


def reproduce(options: Options) -> list[Row]:
    """All seeds of a recipe; prints the table and returns the rows."""
    module = paper_module(options.paper)
    data = open_data(options.data, options.data_root, options.skip_corrupt)
    data.name = options.data_name or data.name
    name, recipe = choose_recipe(module, options.data, options.recipe)
    if options.encoder is not None and not recipe.protocols:
        raise RecipeError(f"the recipe {name} of {options.paper} has no protocol by which to judge an encoder; choose another RECIPE")
    changes = [*options.set, *([f"pretrain.epochs={options.epochs}"] if options.epochs is not None else [])]
    arms = {arm: override(own, changes) for arm, own in choose_arms(recipe, options.arms).items()}
    fabric = make_fabric(options.device, options.precision, options.strategy)
    fabric.launch()
    runs = [
        Reproduction(options, module, name, own, data, fabric, seed, arm, base_arm(recipe, arm))
        for seed in range(options.seeds)
        for arm, own in arms.items()
    ]
    check(runs, ROOT)
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
            run.record(made)
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
