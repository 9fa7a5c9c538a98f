"""What cannot work is said before anything is trained: every stage and protocol of every arm, with all complaints in one error.

What is finished already, and only shown again, is not looked at.
"""

import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from benchmarks.numbers import claims
from benchmarks.papers import ROOT, folder
from common import results
from common.convert import load_encoder, read_checkpoint
from common.data import Augmentation, Split
from common.evaluate import Classifier, LinearProbe
from common.evaluate.finetune import pool, tokens
from common.optim import Schedule, make_optimizer
from common.recipe import Protocol, RecipeError, Stage
from common.train import device_batch

if TYPE_CHECKING:
    from benchmarks.reproduce import Reproduction

Step = Callable[[nn.Module, Tensor], object]  # a model and images (B, C, H, W)


def check(runs: Mapping[tuple[int, str], "Reproduction"], root: Path = ROOT) -> None:
    """Raise RecipeError with what cannot work in these runs, by seed and arm: a line each, with the --set that makes it work.

    root: where `--record` puts results. The first process looks, and all processes raise the same error.
    """
    fabric = next(iter(runs.values())).fabric
    lines = fabric.broadcast(_Complaints(runs, root).lines() if fabric.is_global_zero else None)
    if lines:
        head = [f"{len(lines)} things cannot work, so nothing was started:"] if len(lines) > 1 else []
        raise RecipeError("\n".join([*head, *lines]))


@dataclass
class _Complaints:
    """Complaints of all runs. What several arms or seeds have in common is looked at and said once."""

    runs: Mapping[tuple[int, str], "Reproduction"]
    root: Path
    found: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # of (stage or protocol, complaint) the arms
    looked: set[tuple] = field(default_factory=set)
    labelled: dict[tuple, Split | None] = field(default_factory=dict)
    arm: str = ""  # that is being looked at
    run: "Reproduction | None" = None

    def lines(self) -> list[str]:
        """All complaints, each behind the arms, where not all have it, and the stage or protocol."""
        arms = list(dict.fromkeys(arm for _, arm in self.runs))
        self.run = next(iter(self.runs.values()))
        self._files()
        for (seed, arm), self.run in self.runs.items():
            self.arm = arm
            if self.run.options.prepare:
                self._targets()
            else:
                self._run(with_baselines=arm == arms[0])
        lines = []
        for (place, text), mine in self.found.items():
            which = [f"arm {', '.join(mine)}"] if 0 < len(mine) < len(arms) else []
            lines.append(": ".join(filter(None, [*which, place, text])))
        return lines

    def say(self, place: str, text: str, *sets: str) -> None:
        """Add a complaint, and the --set that make it work."""
        arms = self.found.setdefault((place, f"{text}: {' '.join(f'--set {change}' for change in sets)}" if sets else text), [])
        if self.arm and self.arm not in arms:
            arms.append(self.arm)

    def _new(self, *key: object) -> bool:
        """Whether this arm is looked at in this way for the first time."""
        new = (self.arm, *key) not in self.looked
        self.looked.add((self.arm, *key))
        return new

    def _run(self, with_baselines: bool) -> None:
        run, pretrained = self.run, self._done("pretrain")
        protocols = [p for p in run.recipe.protocols if not all(map(self._done, self._starts(p, with_baselines)))]
        if not pretrained and run.options.encoder is not None:
            self._encoder(run.options.encoder)
        if protocols or not pretrained:
            self._method(trains=not pretrained and run.options.encoder is None)
        for protocol in protocols:
            self._protocol(protocol)

    def _done(self, stage: str) -> bool:
        return (self.run.root / stage / "result.json").exists()

    def _starts(self, protocol: Protocol, with_baselines: bool) -> list[str]:
        baseline = "scratch" if protocol.kind == "finetune" else "random"
        return [f"{protocol.name}-{start}" for start in ("pretrained", *([baseline] if with_baselines else []))]

    def _files(self) -> None:
        """What is read and written at the end."""
        options, home = self.run.options, self.root / folder(self.run.paper)
        if not options.prepare:
            self._writable(options.out, "name another folder with --out")
            self._try("published.csv", lambda: claims(self.run.paper, ROOT))
        if options.record:
            self._writable(home / "logs", "leave out --record")
            self._try("--record", lambda: results.load(home / "results.csv"))

    def _writable(self, path: Path, otherwise: str) -> None:
        nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not nearest.is_dir():
            self.say("", f"{path} cannot be made, as {nearest} is a file: {otherwise}")
        elif not os.access(nearest, os.W_OK | os.X_OK):
            self.say("", f"{path} cannot be written, as {nearest} is not writable: {otherwise}")

    def _try(self, place: str, attempt: Callable[[], Any], *sets: str) -> Any:
        """What the attempt returns; where it raises, None and a complaint."""
        try:
            return attempt()
        except Exception as error:  # whatever it is, it would come up hours later
            self.say(place, _said(error), *sets)
            return None

    def _targets(self) -> None:
        """What the method learns from in the place of labels."""
        run = self.run
        if hasattr(run.module, "check_targets") and self._new("targets"):
            where, alone = run.options.data_root / "tokens", run.fabric.world_size == 1
            with _undisturbed():
                self._try("targets", lambda: run.module.check_targets(run.recipe, run.data, where, make=alone))

    def _encoder(self, path: Path) -> None:
        if self._new("encoder"):
            state = self._try("--encoder", lambda: read_checkpoint(path))
            with _undisturbed():
                if state is not None:
                    self._try(f"--encoder {path.name}", lambda: load_encoder(self._build().to_empty(device="cpu"), state))

    def _build(self, **changes: Any) -> nn.Module:
        """The encoder of the run, without values."""
        with torch.device("meta"):
            return self.run.recipe.build_encoder(self.run.data.channels, **changes)

    def _method(self, trains: bool) -> None:
        """The method can be built; where it trains, it can be trained."""
        run = self.run

        def build() -> nn.Module:
            return run.module.build(run.recipe, run.recipe.build_encoder(run.data.channels), run.data.classes)

        def step(model: nn.Module, images: Tensor) -> object:
            classes = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            return model(images, run.module.example_targets(model, images) if hasattr(run.module, "example_targets") else classes)

        if not self._new("method", trains):
            return
        if trains:
            self._stage("pretrain", "pretrain", run.recipe.pretrain, run.data.train, "training", build, step)
            self._targets()
        else:
            self._model("pretrain", "", build)
            self._alone()

    def _alone(self) -> None:
        """Frozen features are read in the batches of the pre-training, whether or not there is any."""
        stage, world = self.run.recipe.pretrain, self.run.fabric.world_size
        if any(protocol.kind != "finetune" for protocol in self.run.recipe.protocols) and not _shares(stage, world):
            fitting = _near(stage, world, math.inf, 1)
            self.say("pretrain", f"a batch of {stage.batch_size} cannot be shared out among {world} devices", *_sets("pretrain", stage, fitting))

    def _protocol(self, protocol: Protocol) -> None:
        run, place = self.run, f"protocol {protocol.name}"
        labelled = self._labels(place, protocol)
        if not self._new(protocol.name, None if labelled is None else len(labelled)):
            return
        changes = {"drop_path": protocol.drop_path, **({"position": protocol.position} if protocol.position else {})}
        with _undisturbed():
            encoder = self._try(place, lambda: self._build(**changes))
        if encoder is None:
            return
        depth, most = len(getattr(encoder, "blocks", ())), max(protocol.layers)
        if most > max(depth, 1):
            fit = sorted({min(layers, depth) for layers in protocol.layers})
            self.say(place, f"layers={protocol.layers}, and the encoder has {depth}", f"{protocol.name}.layers={fit}")
        if protocol.pool == "class" and not getattr(encoder, "prefix_tokens", 1):
            self.say(place, "pool='class' needs an encoder with a class token", f"{protocol.name}.pool=mean")
        self._loader(place, f"{protocol.name}.resize=null", run.data.val, None, protocol)
        if most > max(depth, 1) or (protocol.pool == "class" and not getattr(encoder, "prefix_tokens", 1)):
            protocol = replace(protocol, layers=(1,), pool="mean")  # so that what else is wrong is found

        def build() -> nn.Module:
            own = run.recipe.build_encoder(run.data.channels, **changes)
            if protocol.kind in ("finetune", "linear"):
                return (Classifier if protocol.kind == "finetune" else LinearProbe)(own, run.data.classes, protocol)
            return own

        def step(model: nn.Module, images: Tensor) -> object:
            if protocol.kind in ("finetune", "linear"):
                return model(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
            return pool(tokens(model, images, max(protocol.layers)), model, protocol.pool)

        if protocol.kind in ("finetune", "linear"):
            split = run.data.train if labelled is None else labelled
            what = "training" if len(split) == len(run.data.train) else "labelled"
            self._stage(place, f"{protocol.name}.stage", protocol.stage, split, what, build, step)
        else:
            self._model(place, "", build, step)

    def _labels(self, place: str, protocol: Protocol) -> Split | None:
        """The images that the protocol learns from, or None and a complaint."""
        given = {name: getattr(protocol, name) for name in ("labels_per_class", "label_share", "label_list")}
        name = next((name for name, value in given.items() if value is not None), None)
        train, classes = self.run.data.train, self.run.data.classes
        key = (*given.values(), self.run.seed if name in ("labels_per_class", "label_share") else None)
        if key not in self.labelled:
            self.labelled[key] = None
            try:
                self.labelled[key] = self.run.labelled(protocol)
            except (ValueError, OSError) as error:
                least = int(torch.bincount(train.labels, minlength=classes).min())
                share = math.floor(10_000 * classes * least / len(train)) / 10_000
                if name == "label_share" and int(protocol.label_share * len(train)) < classes:
                    share = min(1.0, math.ceil(10_000 * classes / len(train)) / 10_000)
                fit = {"labels_per_class": least, "label_share": share, "label_list": "null"}[name]
                self.say(place, _said(error), f"{protocol.name}.{name}={fit}")
                return None
        labelled = self.labelled[key]
        if labelled is not None and protocol.kind == "logistic":
            absent = (torch.bincount(labelled.labels, minlength=classes) == 0).nonzero()[:, 0].tolist()
            if absent:
                names = train.class_names
                first = names[absent[0]] if names else absent[0]
                text = f"{len(absent)} of {classes} classes have no label to learn from, the first is class {first}: add one of each"
                self.say(place, text, *([f"{protocol.name}.{name}=null"] if name else []))
            if classes < 2:
                self.say(place, "logistic regression tells classes apart, and the data have 1: leave it out, or add a class")
        return labelled

    def _stage(self, place: str, path: str, stage: Stage, split: Split, what: str, build: Callable[[], nn.Module], step: Step) -> None:
        """Whether a stage can train on the images of a split."""
        world, images = self.run.fabric.world_size, len(split)
        sound = _shares(stage, world)
        least = 2 if (self._needs_two(build, step, world) if not sound or images < stage.batch_size or device_batch(stage, world) == 1 else False) else 1
        if images < least * world:
            text = f"{images} {what} images are fewer than {least} for each of {world} devices: use {images // least} devices at most"
            self.say(place, text if images >= least else f"{images} {what} images are too few: {least} are the least")
        elif images < stage.batch_size:
            fit = world * 2 ** int(math.log2(images // world))
            text = f"{images} {what} images are fewer than one effective batch of {stage.batch_size}"
            self.say(place, text, *_sets(path, stage, [(fit, max(least, stage.device_batch))]))
        elif not sound:
            text = f"a batch of {stage.batch_size} cannot be shared out among {world} devices"
            self.say(place, text, *_sets(path, stage, _near(stage, world, images, least)))
        elif device_batch(stage, world) < least:
            text = f"a batch of {stage.batch_size} on {world} devices is cut into micro-batches of 1 image, and this trains on 2 or more"
            self.say(place, text, *_sets(path, stage, _near(stage, world, images, least)))
        elif _wasteful(stage, world) and not (self.run.root / place.removeprefix("protocol ") / "checkpoint.pt").exists():
            size, share = device_batch(stage, world), stage.batch_size // world
            text = f"a batch of {stage.batch_size} on {world} devices is {share // size} steps of {size} images, with device_batch={stage.device_batch}"
            larger = next(size for size in range(stage.device_batch, share + 1) if share % size == 0)
            others = " or ".join(f"--set {change}" for change in _sets(path, stage, _near(stage, world, images, least)))
            self.say(place, f"{text}: {others}, or where the memory allows it --set {path}.device_batch={larger}")
        self._loader(place, f"{path}.augmentation.resize=null", split, stage.augmentation)
        model = self._model(place, path, build, step, stage)
        if model is not None:
            self._optimizer(place, path, stage, model)

    def _needs_two(self, build: Callable[[], nn.Module], step: Step, world: int) -> bool:
        """Whether training fails on one image at a time and not on two."""
        return bool(_trial(build, step, self._images(1))[1]) and not _trial(build, step, self._images(2))[1]

    def _images(self, count: int) -> tuple[int, ...]:
        return (count, self.run.data.channels, *self.run.size)

    def _model(
        self, place: str, path: str, build: Callable[[], nn.Module], step: Step | None = None, stage: Stage | None = None
    ) -> nn.Module | None:
        """The model, which can be built and takes a step of two images; or None and a complaint."""
        model, fault = _trial(build, step, self._images(2))
        if fault:
            self.say(place, fault)
        return None if fault else model

    def _optimizer(self, place: str, path: str, stage: Stage, model: nn.Module) -> None:
        if stage.layer_decay is not None and not hasattr(model, "group_matcher"):
            text = f"layer_decay={stage.layer_decay}, and {type(model).__name__} does not say which layers it has"
            self.say(place, text, f"{path}.layer_decay=null")
        else:
            self._try(place, lambda: Schedule(make_optimizer(model, stage), stage, steps_per_epoch=1))

    def _loader(
        self, place: str, fit: str, split: Split, augmentation: Augmentation | None, protocol: Protocol | None = None
    ) -> None:
        """Images can be read and augmented as wanted. The batch is checked elsewhere."""
        world = self.run.fabric.world_size
        if len(split) >= world:
            stage = replace(self.run.recipe.pretrain, batch_size=world, augmentation=augmentation or Augmentation())
            with _undisturbed():
                try:
                    self.run.loader(split, stage, augmentation, protocol)
                except Exception as error:
                    self.say(place, _said(error), *([fit] if "resize" in str(error) else []))


def _shares(stage: Stage, devices: int) -> bool:
    return stage.batch_size >= devices and stage.batch_size % devices == 0


def _wasteful(stage: Stage, devices: int) -> bool:
    """Whether the effective batch takes more than twice the micro-batches that it would take if it had the right divisors."""
    share = stage.batch_size // devices
    return share // device_batch(stage, devices) > 2 * math.ceil(share / stage.device_batch)


def _near(stage: Stage, devices: int, images: float, least: int) -> list[tuple[int, int]]:
    """The nearest effective batches below and above the stage's that can be trained with, each with its device_batch."""
    own = max(least, stage.device_batch)

    def fits(size: int) -> bool:
        tried = replace(stage, batch_size=size, device_batch=own)
        return not _wasteful(tried, devices) and device_batch(tried, devices) >= least

    lowest, middle = least * devices, max(stage.batch_size, 0)
    if middle >= lowest and middle <= images and middle % devices == 0 and fits(middle):
        return [(middle, own)]
    below = range(middle // devices * devices, lowest - 1, -devices)
    above = range(max(lowest, -(-middle // devices) * devices), int(min(images, 4 * max(middle, lowest))) + 1, devices)
    found = [next((size for size in sizes if size <= images and fits(size)), None) for sizes in (below, above)]
    return [(size, own) for size in dict.fromkeys(found) if size is not None]


def _sets(path: str, stage: Stage, fitting: list[tuple[int, int]]) -> list[str]:
    """What to --set for the nearest of these batches."""
    if not fitting:
        return []
    size, own = min(fitting, key=lambda pair: abs(pair[0] - stage.batch_size))
    changes = {"batch_size": (size, stage.batch_size), "device_batch": (own, stage.device_batch)}
    return [f"{path}.{name}={new}" for name, (new, old) in changes.items() if new != old]


def _trial(build: Callable[[], nn.Module], step: Step | None, shape: tuple[int, ...]) -> tuple[nn.Module | None, str]:
    """A model that is built, and what is wrong with it or with a training step on images of a shape; "" for nothing.

    On the meta device, whose tensors have no values, which takes a fraction of a second for the largest model. What cannot be built there is
    built for real. A step that cannot be computed there says nothing.
    """
    with _undisturbed(), torch.no_grad():
        try:
            with torch.device("meta"):
                model = build()
        except Exception:
            try:
                model = build()
            except Exception as error:
                return None, _said(error)
        if step is not None:
            try:
                step(model.train(), torch.zeros(shape, device=next(model.parameters()).device))
            except RuntimeError:
                pass  # the meta device has no values to look at; shapes that do not fit end here too
            except Exception as error:
                return model, _said(error)
        return model, ""


def _said(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The global generators are afterwards as they were before, and nothing warns."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)
