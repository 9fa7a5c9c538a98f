"""Check every stage and protocol of every arm before training starts, and report all problems in one error.

Stages that are already finished are not checked.
"""

import functools
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from benchmarks.ledger.published import claims
from benchmarks.ledger.rows import load
from benchmarks.papers import ROOT, folder
from benchmarks.stages import UNTRAINED, Stages
from common.convert import load_encoder, read_checkpoint
from common.data import Augmentation, Split
from common.evaluate import Classifier, LinearProbe, LocationProbe, as_encoder, hold_out, labelled_images, patch_size
from common.evaluate.finetune import pool_tokens, tokens
from common.optim import make_optimizer
from common.recipe import Protocol, RecipeError, TrainConfig
from common.run import Run, RunError
from common.train import device_batch, make_loader

Step = Callable[[nn.Module, Tensor], object]  # called with a model and images (B, C, H, W)


def check(runs: Sequence[Stages], prepare: bool = False, record: bool = False, root: Path = ROOT) -> None:
    """Raise RecipeError with all problems of these runs: a line each, with the arms, the stage or protocol, and the --set that fixes it.

    prepare: the runs only make the inputs of the training. record: the results will be added to the ledger under `root`.
    Processes do not communicate here: each of them finds the same problems.
    """
    found: dict[str, list[str]] = {}  # the arms of each problem
    read = functools.cache(read_checkpoint)
    for run in runs:
        for place, text in _complaints(run, prepare, root if record else None, read, baselines=run.arm == runs[0].arm):
            arms = found.setdefault(f"{place}: {text.removeprefix(f'{place}: ')}", [])
            arms += [run.arm] if run.arm not in arms else []
    lines = [f"arm {', '.join(arms)}: {line}" if any(arms) else line for line, arms in found.items()]
    if lines:
        head = [f"{len(lines)} problems found, nothing was started:"] if len(lines) > 1 else []
        raise RecipeError("\n".join([*head, *lines]))


def _complaints(run: Stages, prepare: bool, ledger: Path | None, read: Callable, baselines: bool) -> Iterator[tuple[str, str]]:
    """The problems of one run: (stage or protocol, text)."""
    recipe, encoder_file = run.recipe, run.encoder_file
    done = {
        stage: (run.root / stage / "result.json").exists() for stage in ("pretrain", *(f"{p.name}-pretrained" for p in recipe.protocols))
    }
    if prepare:
        yield from _said("targets", lambda: run.prepare(check=True))
        return
    if ledger is not None:
        home = ledger / folder(run.paper)
        yield from _said("--record", lambda: load(home / "results.csv"))
        yield from _said("--record", lambda: _check_writable(home / "logs"))
    yield from _said("the table at the end", lambda: claims(run.paper, ROOT))
    yield from _settings(run, baselines)
    if not run.runs("pretrain") and not done["pretrain"]:
        yield "--stages", f"{run.root / 'pretrain'} is not finished, and the protocols need its encoder: run --stages pretrain first"
    if fault := _not_kept(run):
        yield "--every", fault
    protocols = [protocol for protocol in recipe.protocols if not done[f"{protocol.name}-pretrained"]]
    if done["pretrain"] and not protocols:
        return
    if fault := _trial(lambda: _encoder(run))[1]:
        yield "encoder", fault
        return
    if encoder_file is None and not done["pretrain"]:
        yield from _stage(run, "pretrain", "pretrain", recipe.pretrain, run.data.train, lambda: _method(run), _method_step(run))
        if hasattr(run.module, "prepare"):
            yield from _said("targets", lambda: run.prepare(check=True))
    else:
        if any(protocol.kind != "finetune" for protocol in protocols):  # frozen features use the batches of the pre-training
            yield from _batch(run, "pretrain", "pretrain", recipe.pretrain, math.inf)
        if fault := _trial(lambda: _method(run))[1]:
            yield "pretrain", fault
        if encoder_file is not None and not done["pretrain"]:
            yield from _said("--encoder", lambda: load_encoder(_encoder(run), read(encoder_file), allow_unused=("cls_token",)))
    for protocol in protocols:
        for complaint in _protocol(run, protocol):
            yield f"protocol {protocol.name}", complaint


def _not_kept(run: Stages) -> str:
    """Why the encoder cannot be evaluated after some epochs; "" if it can."""
    epochs = run.recipe.pretrain.epochs
    if run.every is None:
        return ""
    if run.encoder_file is not None:
        return f"{run.encoder_file} is evaluated without pre-training, so there are no epochs: leave out EVERY"
    if not run.recipe.protocols:
        return f"the recipe {run.name} has no protocol to evaluate an encoder: leave out EVERY, or choose another RECIPE"
    if not run.kept_epochs:
        return f"EVERY={run.every}, and the pre-training has {epochs} epochs: use fewer than these"
    progress = run.root / "pretrain" / "progress.json"
    saved = json.loads(progress.read_text()) if progress.exists() else {"saved": 0, "total": 1}
    passed = [epoch for epoch in run.kept_epochs if epoch <= epochs * saved["saved"] / saved["total"]]
    if lost := [epoch for epoch in passed if not run.encoder_path(f"{epoch}ep").exists()]:
        return f"the pre-training in {run.root} was past epoch {lost[0]} when EVERY={run.every} was asked for: use another OUT"
    return ""


def _settings(run: Stages, baselines: bool) -> Iterator[tuple[str, str]]:
    """Directories that hold a run with other settings, which would be refused later."""
    starts = ["pretrained", *(f"{epoch}ep" for epoch in run.kept_epochs), *(UNTRAINED if baselines else ())]
    stages = [("pretrain", None, "")] + [(f"{p.name}-{start}", p, start) for p in run.recipe.protocols for start in starts]
    trained = (run.root / "pretrain" / "result.json").exists()  # otherwise the encoder that the others start from is not known yet
    for stage, protocol, start in stages:
        if (run.root / stage).exists() and (trained or start in ("", *UNTRAINED)):
            held = Run(run.root / stage, run.settings(protocol, start), run.fabric.device, main=False)
            yield from _said(stage, held.check_settings)


def _check_writable(path: Path) -> None:
    """Raise OSError if a folder can neither be written nor created."""
    nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OSError(f"{path} cannot be written, as {nearest} is {'not writable' if nearest.is_dir() else 'a file'}")


def _encoder(run: Stages, **changes: Any) -> nn.Module:
    return run.recipe.build_encoder(run.data.channels, **changes)


def _method(run: Stages) -> nn.Module:
    return run.module.build(run.recipe, _encoder(run), run.data.classes)


def _method_step(run: Stages) -> Step:
    targets = getattr(run.module, "example_targets", lambda model, images: _classes(images))
    return lambda model, images: model(images, targets(model, images))


def _classes(images: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.int64, device=images.device)


def _protocol(run: Stages, protocol: Protocol) -> Iterator[str]:
    train, name, place = run.data.train, protocol.name, f"protocol {protocol.name}"
    labelled = train
    try:
        labelled = labelled_images(protocol, train, run.seed)
        labelled = labelled.subset(hold_out(protocol, labelled.labels, run.seed)[0])
    except (ValueError, OSError) as error:
        yield f"{error}{_label_fix(run, protocol)}"
    absent = (torch.bincount(labelled.labels, minlength=run.data.classes) == 0).nonzero()[:, 0].tolist()
    if protocol.kind == "logistic" and absent:
        first = train.class_names[absent[0]] if train.class_names else absent[0]
        fault = f"{len(absent)} of {run.data.classes} classes have no label to learn from, the first is {first}"
        yield f"{fault}: add one{_label_fix(run, protocol)}"
    if protocol.kind == "logistic" and run.data.classes < 2:
        yield "logistic regression needs two classes, and the data have 1: add a class"
    changes = {"drop_path": protocol.drop_path, **({"position": protocol.position} if protocol.position else {})}
    encoder, fault = _trial(lambda: _encoder(run, **changes))
    if fault:
        yield fault
        return
    depth = max(1, len(getattr(encoder, "blocks", ())))
    if max(protocol.layers) > depth:
        fit = json.dumps(sorted({min(layers, depth) for layers in protocol.layers}))
        yield f"layers={protocol.layers}, and the encoder has {depth}: --set '{name}.layers={fit}'"
        protocol = replace(protocol, layers=(1,))  # continue, to find other problems
    if protocol.pool == "class" and not getattr(encoder, "prefix_tokens", 1):
        yield f"pool='class' needs an encoder with a class token: --set {name}.pool=mean"
        protocol = replace(protocol, pool="mean")
    yield from _images(run, f"{name}.resize=null", run.data.val, None, protocol)

    def start() -> Any:
        return as_encoder(_encoder(run, **changes), run.data.channels, run.image_size)

    def with_patches() -> nn.Module:
        patch_size(own := start())
        return own

    if protocol.shuffle_test and (fault := _trial(with_patches)[1]):
        yield f"{fault}: --set {name}.shuffle_test=false"

    def build() -> nn.Module:
        if protocol.kind == "location":
            return LocationProbe(start())
        kinds = {"finetune": Classifier, "linear": LinearProbe}
        return kinds[protocol.kind](start(), run.data.classes, protocol) if protocol.kind in kinds else start()

    def step(model: Any, images: Tensor) -> object:
        if protocol.kind == "location":
            return model(images)
        if protocol.kind in ("finetune", "linear"):
            return model(images, _classes(images))
        return pool_tokens(tokens(model, images, max(protocol.layers)), model, protocol.pool)

    if protocol.stage is not None and protocol.kind in ("finetune", "linear"):
        yield from (text for _, text in _stage(run, place, f"{name}.stage", protocol.stage, labelled, build, step))
    elif fault := _trial(build, step, _shape(run, 2))[1]:
        yield fault


def _label_fix(run: Stages, protocol: Protocol) -> str:
    """A --set that gives enough labels; "" if the protocol uses all of them."""
    train, classes = run.data.train, run.data.classes
    least = int(torch.bincount(train.labels, minlength=classes).min())
    if protocol.labels_per_class is not None and protocol.labels_per_class > least:
        return f": --set {protocol.name}.labels_per_class={least or 'null'}"
    if protocol.label_fraction is not None and protocol.label_fraction * len(train) < classes * least:
        wanted = min(
            classes * least, max(classes, math.ceil(1.25 * protocol.stage.batch_size) if protocol.stage else 0)
        )  # a tenth is held out
        return f": --set {protocol.name}.label_fraction={math.ceil(1e4 * wanted / len(train)) / 1e4:g}"
    if protocol.label_fraction is not None:
        return f": --set {protocol.name}.label_fraction={math.floor(1e4 * classes * least / len(train)) / 1e4 or 'null'}"
    return f": --set {protocol.name}.label_list=null" if protocol.label_list is not None else ""


def _stage(
    run: Stages, place: str, path: str, stage: TrainConfig, split: Split, build: Callable[[], nn.Module], step: Step
) -> Iterator[tuple[str, str]]:
    """Check that a stage can train on the images of a split."""
    model, fault = _trial(build, step, _shape(run, 2))
    if fault:
        yield place, fault
    elif stage.layer_decay is not None and not hasattr(model, "group_matcher"):  # timm would treat all as one layer
        text = f"layer_decay={stage.layer_decay}, but {type(model).__name__} does not define its layers (group_matcher)"
        yield place, f"{text}: --set {path}.layer_decay=null"
    elif model is not None:
        yield from _said(place, lambda: make_optimizer(model, stage))
    one_fails = not fault and bool(_trial(build, step, _shape(run, 1))[1])
    yield from _batch(run, place, path, stage, len(split), one_fails)
    for text in _images(run, f"{path}.augmentation.resize=null", split, stage.augmentation):
        yield place, text


def _batch(run: Stages, place: str, path: str, stage: TrainConfig, images: float, one_fails: bool = False) -> Iterator[tuple[str, str]]:
    """Check that there are images for an effective batch, and that it divides into micro-batches (`one_fails`: of 2 or more)."""
    world = run.fabric.world_size
    if images < stage.batch_size:
        fault = f"{images} labelled images are fewer than one effective batch of {stage.batch_size}"
    else:
        try:
            if device_batch(stage, world) > 1 or not one_fails:
                return
            fault = f"a batch of {stage.batch_size} on {world} devices makes micro-batches of 1 image, but this needs 2 or more"
        except RecipeError as error:
            fault = str(error)
    per_device = int(min(max(stage.batch_size, 2 * world), images)) // world
    if per_device < 1 + one_fails:
        yield place, f"{fault}: add images, or use fewer processes"
        return
    fit = {
        "batch_size": world * 2 ** int(math.log2(per_device)),
        "device_batch": max(2, stage.device_batch) if one_fails else stage.device_batch,
    }
    yield place, f"{fault}: " + " ".join(f"--set {path}.{name}={value}" for name, value in fit.items() if value != getattr(stage, name))


def _images(run: Stages, fix: str, split: Split, augmentation: Augmentation | None, protocol: Protocol | None = None) -> Iterator[str]:
    """Check that images can be read and augmented as in the stage. `_batch` checks the batch."""
    world = run.fabric.world_size
    stage = replace(run.recipe.pretrain, batch_size=world, augmentation=augmentation or run.recipe.pretrain.augmentation)
    view = {"resize": protocol.resize, "interpolation": protocol.interpolation} if protocol else run.view(split)
    if len(split) >= world:
        for _, text in _said("", lambda: make_loader(run.fabric, split, stage, augmentation, **run.loading, **view)):
            yield f"{text}: --set {fix}" if "resize" in text else text


def _shape(run: Stages, count: int) -> tuple[int, ...]:
    return (count, run.data.channels, *run.image_size)


def _trial(build: Callable[[], nn.Module], step: Step | None = None, shape: tuple[int, ...] = ()) -> tuple[nn.Module | None, str]:
    """Build a model and try a training step on images of a shape. Returns the model and the error text; "" if there is none.

    Uses the meta device, where tensors have no values and cost nothing. A model that cannot be built there is built on a real device. For
    the step, only a ValueError counts, because many operations do not exist on the meta device.
    """
    with _undisturbed(), torch.no_grad():
        try:
            with torch.device("meta"):
                model = build()
        except Exception:  # a limit of the meta device; an error of the recipe occurs again below
            try:
                model = build()
            except Exception as error:
                return None, _text(error)
        if step is not None:
            try:
                step(model.train(), torch.zeros(shape, device=next(model.parameters()).device))
            except ValueError as error:
                return model, _text(error)
            except Exception:
                pass
        return model, ""


def _said(place: str, attempt: Callable[[], object]) -> Iterator[tuple[str, str]]:
    """Yield a problem if an attempt raises."""
    with _undisturbed():
        try:
            attempt()
        except Exception as error:  # any error: otherwise it would occur hours later
            yield place, _text(error)


def _text(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError | RunError) and text else f"{type(error).__name__}: {text}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore the global random generators of Python, NumPy and torch afterwards, and suppress warnings."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)
