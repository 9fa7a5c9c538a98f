"""One seed of one recipe or arm: its stages, each in its own directory. A finished stage is not run again."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import nn

from benchmarks.ledger.rows import Row
from benchmarks.papers import folder, paper_name
from common.checkpoint import export_encoder
from common.convert import load_encoder, read_checkpoint
from common.data import Augmentation, Data, Loader, SmallCopy, Split
from common.data.augment import view_size
from common.data.workers import default_workers
from common.evaluate import evaluate, own_metrics
from common.files import digest
from common.method import Source
from common.processes import once
from common.randomness import reseed
from common.recipe import Protocol, Recipe, as_json, without_later
from common.run import Run, write_text
from common.stopping import stop_if_requested
from common.train import device_batch, fit, make_loader

UNTRAINED = ("scratch", "random", "pixels")  # the baselines
# Fields of Protocol that the recipe.json of earlier runs lacks. With their defaults they are left out of the settings, so that such runs
# are still accepted.
ADDED = ("label_seed", "shuffle_test", "images")


@dataclass
class Stages:
    """The pre-training of an encoder, or the conversion of one from a file, and its evaluations."""

    module: ModuleType  # of the paper's recipes
    name: str  # of the recipe
    recipe: Recipe  # of the arm
    data: Data
    fabric: Fabric
    seed: int
    out: Path  # directory of all runs
    arm: str = ""
    base_arm: str = ""  # the arm that this one is compared with
    overrides: tuple[str, ...] = ()  # changes to the recipe, besides the epochs
    encoder_file: Path | None = None  # evaluated instead of a pre-trained encoder
    data_root: Path = Path("data")  # directory of the tokens
    workers: int = field(default_factory=default_workers)
    compile: bool = False
    checkpoint_seconds: float = 20.0
    only: tuple[str, ...] = ()  # pretrain, or names of protocols: run only these
    every: int | None = None  # also evaluate the encoder after each so many epochs
    copy: SmallCopy | None = None  # of the images, to which `data` belongs

    @property
    def paper(self) -> str:
        return paper_name(self.module)

    @cached_property
    def root(self) -> Path:
        label = "-".join(filter(None, [self.name, self.arm, self.data.name if self.data.name != self.name else ""]))
        source = self.encoder_file.stem if self.encoder_file else f"{self.recipe.pretrain.epochs}ep"
        return self.out / self.paper / f"{label}-{source}-seed{self.seed}"

    @property
    def precision(self) -> str:
        return str(self.fabric._precision.precision)

    @property
    def training(self) -> dict:
        return {"compile": self.compile, "checkpoint_seconds": self.checkpoint_seconds}

    def run(self, baselines: bool = True) -> list[Row]:
        """Run all stages, or only some, in order, with or without the baselines; return one row per number."""
        rows = []
        if self.runs("pretrain"):
            rows += self.pretrain() if self.encoder_file is None else self.convert(self.encoder_file)
        for protocol in filter(lambda protocol: self.runs(protocol.name), self.recipe.protocols):
            for start in self.starts(protocol) if baselines else ["pretrained"]:
                rows += self.evaluate(protocol, start)
            for epoch in self.kept_epochs:  # not rows of the ledger: see benchmarks.epochs
                self.evaluate(protocol, f"{epoch}ep")
        return rows

    def runs(self, stage: str) -> bool:
        """Whether a stage, pretrain or a protocol, is to be run."""
        return not self.only or stage in self.only

    @property
    def shared(self) -> dict:
        """What all processes of a run must agree on."""
        images = f"{self.data.name}, {len(self.data.train)} and {len(self.data.val)} images"
        return {"data": images, "precision": self.precision, "compile": self.compile, "recipe": as_json(self.recipe)}

    @property
    def kept_epochs(self) -> range:
        """The epochs after which the encoder is kept and evaluated, besides the last one."""
        return range(self.every, self.recipe.pretrain.epochs, self.every) if self.every else range(0)

    def encoder_path(self, start: str) -> Path:
        """The file of a trained encoder: after the whole pre-training (pretrained), or after some of its epochs (100ep)."""
        return self.root / "pretrain" / ("encoder.safetensors" if start == "pretrained" else f"encoder-{start}.safetensors")

    def starts(self, protocol: Protocol) -> list[str]:
        """The encoders that a protocol evaluates: the pre-trained one, then the baselines."""
        starts = ["pretrained", "scratch" if protocol.kind == "finetune" else "random"]
        if protocol.kind == "knn" and self.data.train.images is not None:  # the pixels of ImageNet do not fit into memory
            starts.append("pixels")
        return starts

    def prepare(self, check: bool = False) -> Data:
        """Return the data for pre-training. A method with its own targets, such as MaPeT's tokens, has them in place of the labels.

        check: do not compute the targets; only raise the errors that this would raise at its start.
        """
        if not hasattr(self.module, "prepare"):
            return self.data
        folder, alone = self.data_root / "tokens", self.fabric.world_size == 1
        return self.module.prepare(self.recipe, self.data, folder, self.fabric.device, self.workers, make=alone, check=check)

    def pretrain(self) -> list[Row]:
        stage = self.recipe.pretrain
        with self.open("pretrain") as (run, result):
            if result is None:
                method = self.build_method()
                data = self.prepare()
                train = self.loader(data.train, stage.augmentation)

                def keep(epoch: int, method: Any) -> None:
                    if run.main and epoch in self.kept_epochs:
                        export_encoder(method.encoder, self.encoder_path(f"{epoch}ep"))

                def export(method: Any) -> None:
                    if run.main:
                        export_encoder(method.encoder, self.encoder_path("pretrained"))

                hooks: dict = {"after_epoch": keep, "after_save": export}
                method, hours = fit(run, self.fabric, method, stage, train, self.seed, **hooks, **self.training)
                found = own_metrics(self.fabric, method, self.loader(data.val), self.seed)
                export(method)  # again: a process may have been killed between its last checkpoint and this file
                if run.main:
                    self.illustrate(method, data.val, run.directory)
                result = self.finish(run, found | {"hours": hours})
        protocol, start = ("scratch", "scratch") if self.recipe.supervised else ("pretrain", "pretrained")
        return [
            self.row(result, protocol, start, result["hours"], value, metric)
            for metric, value in result.items()
            if metric.endswith(("top1", "top5"))
        ]

    def convert(self, path: Path) -> list[Row]:
        """Convert an encoder from a file and save it in place of a pre-trained one. There is no number to report."""
        with self.open("pretrain") as (run, result):
            if result is None:
                if run.main:
                    encoder = self.new_encoder()
                    run.say(f"{path.name}: {load_encoder(encoder, read_checkpoint(path), allow_unused=('cls_token',))}")
                    export_encoder(encoder, self.encoder_path("pretrained"))
                self.finish(run, {"hours": 0.0})
        return []

    def evaluate(self, protocol: Protocol, start: str) -> list[Row]:
        with self.open(f"{protocol.name}-{start}", protocol, start) as (run, result):
            if result is None:
                encoder = None if start == "pixels" else self.start_encoder(start, protocol)
                options: dict = {"image_size": self.image_size, "batch_size": device_batch(self.recipe.pretrain, self.fabric.world_size)}
                options |= {"fabric": self.fabric, "workers": self.workers, "run": run, "cache": self.root / "features" / start}
                found = [asdict(one) for one in evaluate(encoder, self.data, protocol, seed=self.seed, **options, **self.training)]
                result = self.finish(run, {name: found[-1][name] for name in ("top1", "top5", "converged", "hours")} | {"results": found})
        return [self.row(result, one["protocol"], start, one["hours"], one["top1"], "top1", one["settings"]) for one in result["results"]]

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.recipe.image_size, self.recipe.image_size)

    @property
    def short_side(self) -> int:
        """The largest short side, in pixels, to which a stage resizes whole images from files."""
        stages = [self.recipe.pretrain, *(protocol.stage for protocol in self.recipe.protocols if protocol.stage)]
        resizes = {stage.augmentation.evaluation_resize for stage in stages} | {protocol.resize for protocol in self.recipe.protocols}
        return max(min(view_size(self.data, self.image_size, resize)) for resize in resizes)

    def new_encoder(self, **changes: Any) -> nn.Module:
        """Build an encoder with initial weights that depend only on the seed."""
        reseed(self.seed)
        return self.recipe.build_encoder(self.data.channels, **changes)

    def build_method(self) -> Any:
        """Build the method around a new encoder."""
        return self.module.build(self.recipe, self.new_encoder(), self.data.classes)

    def start_encoder(self, start: str, protocol: Protocol) -> nn.Module:
        """The encoder that an evaluation starts from: as initialised by us (scratch) or by the method (random), or a trained one."""
        encoder = self.new_encoder(drop_path=protocol.drop_path, **({"position": protocol.position} if protocol.position else {}))
        if start not in UNTRAINED:
            with torch.device("meta"):  # only the names are needed; no random numbers are drawn, so every start has the same head
                own = self.recipe.build_encoder(self.data.channels).state_dict()
            # a protocol may use other position embeddings than the pre-training
            added = [name for name in encoder.state_dict() if name not in own]
            left = [name for name in own if name not in encoder.state_dict()]
            load_encoder(encoder, load_file(self.encoder_path(start)), allow_missing=added, allow_unused=left)
        if start == "random":
            with torch.random.fork_rng(devices=[]):  # some methods initialise their encoder themselves
                encoder = self.module.build(self.recipe, encoder, self.data.classes).encoder
        return encoder

    def illustrate(self, method: nn.Module, split: Split, directory: Path) -> None:
        """Draw the picture of the paper, if it has one, from four images of a split."""
        if hasattr(self.module, "illustrate"):
            spread = [index * len(split) // 4 for index in range(4)]  # the images of a folder are sorted by class
            images, targets = next(self.loader(split.subset(spread), alone=True).epoch(0))
            reseed(self.seed, 0)
            self.module.illustrate(method, images, targets, self.data, directory)

    def loader(self, split: Split, augmentation: Augmentation | None = None, alone: bool = False) -> Loader:
        """Batches of the pre-training for this process; without augmentation, in order and as in evaluation."""
        return make_loader(self.fabric, split, self.recipe.pretrain, augmentation, alone=alone, **self.loading, **self.view(split))

    @property
    def loading(self) -> dict:
        return {"data": self.data, "image_size": self.image_size, "seed": self.seed, "workers": self.workers}

    def view(self, split: Split) -> dict:
        """How images of a split are resized where the pre-trained model itself is evaluated."""
        return {} if split.images is not None else {"resize": self.recipe.pretrain.augmentation.evaluation_resize}

    @contextmanager
    def open(self, stage: str, protocol: Protocol | None = None, start: str = "") -> Iterator[tuple[Run, dict | None]]:
        """Open the directory of a stage; yield it with its result, or None if unfinished. The main process decides for all."""
        stop_if_requested()
        settings = once(self.fabric, lambda: self.settings(protocol, start))
        run = Run(self.root / stage, settings, self.fabric.device, main=self.fabric.is_global_zero)
        with ExitStack() as stack:
            result = once(self.fabric, lambda: stack.enter_context(run).result)
            if stage == "pretrain" and run.main:
                write_text(run.directory / "card.json", json.dumps(self.card, indent=1) + "\n")
            yield run, result

    @property
    def card(self) -> dict:
        """What `python -m common.export` must know besides the settings. It changes no result, so a finished run gets it too."""
        source = getattr(self.module, "SOURCE", Source(name=self.paper, citation="", arxiv=""))
        reading = min(self.recipe.protocols, key=lambda protocol: protocol.kind == "finetune", default=None)  # a frozen one, if any
        resize = None if reading is None else reading.resize
        view: dict = {"channels": self.data.channels, "mean": self.data.mean, "std": self.data.std}
        view |= {"resize": view_size(self.data, self.image_size, resize), "interpolation": reading.interpolation if reading else "bicubic"}
        run = {"recipe": self.name, "arm": self.arm, "overrides": self.overrides, "backbone": self.recipe.backbone}
        run |= {"encoder_file": self.encoder_file.name if self.encoder_file else "", "pool": reading.pool if reading else "class"}
        return {"source": asdict(source), **run, **view}

    def finish(self, run: Run, result: dict) -> Any:
        """Write the result of a stage; return the contents of result.json on every process."""
        return once(self.fabric, lambda: run.finish({name: value for name, value in result.items() if value is not None}))

    def settings(self, protocol: Protocol | None, start: str) -> dict:
        """All settings that determine the result of a stage. Data and files are identified by their content, not only by name."""
        asked = as_json(self.recipe)
        del asked["protocols"], asked["arms"]  # a change to one evaluation does not affect the others
        files = {name: value for name, value in self.recipe.method.items() if isinstance(value, str) and Path(value).is_file()}
        named: dict = {f"method.{name}": value for name, value in files.items()}
        named |= {f"targets.{name}": value for name, value in self.recipe.targets.items() if isinstance(value, str)}  # a store is a folder
        named |= {"encoder": self.encoder_file, "label_list": protocol and protocol.label_list}
        named |= {"pretrained": self.encoder_path(start)} if start and start not in UNTRAINED else {}
        paths = {name: Path(path) for name, path in named.items() if path is not None and Path(path).exists()}
        settings: dict = {name: f"{path.name}, sha256 {digest(path)}" for name, path in paths.items()}
        settings |= {"paper": self.paper, "data": {"name": self.data.name, **self.data.identity}}
        settings |= {"seed": self.seed, "precision": self.precision, "recipe": asked}
        settings |= {"split": self.data.split} if self.data.split else {}
        if protocol is not None:
            chosen = as_json(protocol)
            settings["protocol"] = {name: value for name, value in chosen.items() if name not in ADDED or value != getattr(Protocol, name)}
        return without_later(settings)

    def row(self, result: dict, protocol: str, start: str, hours: float, value: float, metric: str, settings: str = "") -> Row:
        """A row of the ledger, with the commit, date and device of the time when the stage ran, possibly before this call."""
        environment, home = result["environment"], folder(self.paper)
        return Row(
            date=result["date"],
            commit=environment["commit"],
            paper=self.paper,
            recipe=self.name,
            arm=self.arm,
            base_arm=self.base_arm,
            overrides=" ".join(self.overrides),
            encoder_file=self.encoder_file.name if self.encoder_file else "",
            split=self.data.split,
            data=self.data.name,
            backbone=self.recipe.backbone,
            pretrain_epochs=0 if self.encoder_file else self.recipe.pretrain.epochs,
            seed=self.seed,
            protocol=protocol,
            start=start,
            metric=metric,
            value=round(value, 4),
            device=environment["device"],
            precision=self.precision,
            hours=round(hours, 5),
            versions=environment["versions"],
            settings=settings,
            recipe_sha256=result.get("recipe_sha256", ""),  # runs until November 2026 have none
            log=(home / "logs" / f"{'' if home.name == self.paper else self.paper + '-'}{self.root.name}.txt").as_posix(),
        )
