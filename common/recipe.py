"""What a run is made of: a typed recipe, which a paper's recipe.py fills in and the command line overrides.

A recipe is data. What it trains with (Stage), what it is judged by (Protocol) and what the method is given (`method`) are
all in it, so the recipe.json of a run is the whole truth about its settings.
"""

import dataclasses
import difflib
import inspect
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import timm
from torch import nn

from common.data import Augmentation
from common.vit import SIZES, ViT, vit


class RecipeError(ValueError):
    """A recipe, or a change to one, that cannot be."""


@dataclass(frozen=True)
class Stage:
    """One training: how long, on what batches, with which optimizer."""

    epochs: int  # passes over the training images
    batch_size: int  # images per optimizer step, over all devices and accumulation steps
    base_lr: float  # learning rate per `lr_batch` images; the rate is base_lr * batch_size / lr_batch
    lr_batch: int = 256  # see base_lr
    warmup_epochs: float = 0.0  # linear warm-up
    warmup_lr: float = 0.0  # where it starts
    min_lr: float = 0.0  # where the half-cosine ends
    drops: tuple[int, ...] = ()  # epochs after which the rate falls to a tenth, in place of the half-cosine
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's; LARS and SGD (Nesterov's) take the first as their momentum
    weight_decay: float = 0.05  # not on biases and one-dimensional parameters
    final_weight_decay: float | None = None  # to which it goes by half a cosine over all epochs; None: it stays
    freeze_epoch: float | None = None  # after which rate and weight decay stay as they are
    layer_decay: float | None = None  # factor on the learning rate per layer below the head
    clip_norm: float | None = None  # global gradient norm
    ema: float | None = None  # decay of an average of the weights, which is then what is evaluated
    device_batch: int = 512  # most images given to one device at once; accumulation makes up the difference
    augmentation: Augmentation = field(default_factory=Augmentation)  # of the training images

    @property
    def lr(self) -> float:
        return self.base_lr * self.batch_size / self.lr_batch


# DeiT's augmentation of images, without repeats; MAE and DropPos fine-tune by it.
DEIT_CROPS = Augmentation(scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", erase=0.25)
# DeiT's supervised training (Touvron et al. 2021, Table 9; AdamW, as in its code without clipping), by which others fine-tune too.
# Its ten epochs of cool-down at the lowest rate are left out, and its warm-up starts at 0, not 1e-6.
DEIT = Stage(
    epochs=300,
    batch_size=1024,
    base_lr=5e-4,
    lr_batch=512,
    warmup_epochs=5,
    min_lr=1e-5,
    device_batch=128,
    augmentation=dataclasses.replace(DEIT_CROPS, repeats=3),
)
DEIT_LABELS = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
DEIT_DROP_PATH = 0.1


@dataclass(frozen=True)
class Protocol:
    """One way to judge an encoder; its name stands in the results."""

    name: str  # as it stands in results.csv
    kind: Literal["finetune", "linear", "knn"]  # all weights trained; a linear layer on frozen features; no training
    stage: Stage | None = None  # how to train; k-NN has none
    labels_per_class: int | None = None  # train on so many labels per class, drawn with the run's seed; None = all
    pool: Literal["mean", "class"] = "mean"  # feature: mean of the patch tokens, or the class token
    position: Literal["sincos", "learned", "relative", "none"] | None = None  # fine-tuning: see common.vit.ViT; None = as pre-trained
    drop_path: float = 0.0  # fine-tuning: stochastic depth of the last block
    mixup: float = 0.0  # fine-tuning: mixup alpha
    cutmix: float = 0.0  # fine-tuning: cutmix alpha
    smoothing: float = 0.0  # fine-tuning: label smoothing
    neighbours: int = 20  # k-NN: how many
    temperature: float = 0.07  # k-NN: of the similarity weights


@dataclass(frozen=True)
class Recipe:
    """A method on a data set: encoder, pre-training, evaluations."""

    data: tuple[str, ...]  # data sets it is meant for, the first by default; "folder" is any ImageFolder path
    size: str  # of the encoder: a name of common.vit.SIZES; or any timm model by name, or a class of timm.models for one of another size
    image_size: int  # pixels
    patch_size: int | None  # pixels; None for a timm model as it is
    pretrain: Stage
    protocols: tuple[Protocol, ...]
    method: dict[str, Any] = field(default_factory=dict)  # options of the paper's method
    encoder: dict[str, Any] = field(default_factory=dict)  # options of common.vit.ViT, or of the timm backbone
    supervised: bool = False  # the method learns from the labels, so its own top-1 counts as training from scratch
    # Variants that are run side by side, by name: what each changes, as `override` takes it. "a+b" is "a" with something added.
    arms: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        """timm's name of the encoder; of a class of timm's, its name with patch and image size."""
        family = f"vit_{self.size}" if self.size in SIZES else self.size
        return self.size if timm.is_model(self.size) else f"{family}_patch{self.patch_size}_{self.image_size}"

    def build_encoder(self, channels: int, **changes) -> nn.Module:
        """The encoder for images of so many channels, with options changed by keyword.

        A ViT, or a timm backbone without classifier that has `channels` and `image_size` too.
        Raises RecipeError for a size that is neither and for options that the encoder does not have.
        """
        if self.size not in SIZES:
            return self._build_timm(channels, **changes)
        own = {"image_size": self.image_size, "patch_size": self.patch_size, "channels": channels}
        check_options(ViT, self.encoder, taken=(*own, "width", "depth", "heads"))
        options = own | self.encoder | changes
        return vit(self.size, **options)

    def _build_timm(self, channels: int, **changes) -> nn.Module:
        options = {"in_chans": channels, "num_classes": 0, "img_size": self.image_size, "patch_size": self.patch_size}
        if timm.is_model(self.size):
            make = partial(timm.create_model, self.size)
            if not timm.get_pretrained_cfg(self.size).fixed_input_size:
                del options["img_size"]  # a convolutional network takes any
        elif self.size in timm.models.__dict__ and isinstance(make := getattr(timm.models, self.size), type):
            pass
        else:
            names = [*SIZES, *timm.list_models()]
            raise RecipeError(f"size={self.size!r} is no size of a ViT, and no model or class of timm's; {nearest(self.size, names)}")
        options = {name: value for name, value in options.items() if value is not None} | self.encoder | changes
        try:
            encoder = make(**options)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # how timm refuses options and sizes
            given = ", ".join(f"{name}={value}" for name, value in options.items())
            raise RecipeError(f"timm cannot build {self.size} with {given}: {error}") from error
        encoder.channels, encoder.image_size = channels, (self.image_size, self.image_size)
        return encoder


def as_json(recipe: Recipe | Stage | Protocol) -> dict:
    """The recipe as JSON holds it (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known names, or all of them, or the first twenty of many."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known[:20])}{more}"


def check_options(function: Any, options: Mapping[str, Any], taken: Iterable[str] = ()) -> None:
    """Raise RecipeError where `function` does not take one of the options by keyword, or it is among those already `taken`."""
    known = [name for name in inspect.signature(function).parameters if name not in taken]
    for name in options:
        if name not in known:
            raise RecipeError(f"{getattr(function, '__name__', function)} has no option {name!r}; {nearest(name, known)}")


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """The recipe with values changed by "path=value", such as "pretrain.base_lr=1e-3" or "method.sigma=2".

    Protocols are reached by name, such as "finetune.stage.epochs=50". Values are JSON, or text.
    Raises RecipeError naming the path and the nearest field.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise RecipeError(f"{assignment!r} is no assignment; write path=value, such as pretrain.base_lr=1e-3")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        recipe = _replace(recipe, path.split("."), value, path)
    return recipe


def choose_arms(recipe: Recipe, names: Iterable[str] = ()) -> dict[str, Recipe]:
    """The recipe of each arm, or of those named; a recipe without arms stands alone under an empty name.

    Raises RecipeError for a name that is no arm of the recipe.
    """
    alone = dataclasses.replace(recipe, arms={})
    for name in names:
        if name not in recipe.arms:
            raise RecipeError(f"ARMS: {name!r} is no arm of this recipe; {nearest(name, recipe.arms) if recipe.arms else 'it has none'}")
    return {name: override(alone, recipe.arms[name]) for name in names or recipe.arms} or {"": alone}


def _replace(node: Any, path: list[str], value: Any, whole: str) -> Any:
    if isinstance(node, Mapping):
        return {**node, ".".join(path): value}
    name, rest = path[0], path[1:]
    fields = {f.name for f in dataclasses.fields(node)}
    names = [protocol.name for protocol in node.protocols] if isinstance(node, Recipe) else []
    if (path[0] == "protocols" and names) or (name in names and not rest):
        raise RecipeError(f"{whole}: protocols are changed field by field, such as {names[0]}.pool; they are {', '.join(names)}")
    if name in names:
        changed = _replace(node.protocols[names.index(name)], rest, value, whole)
        return dataclasses.replace(node, protocols=tuple(changed if p.name == name else p for p in node.protocols))
    if name not in fields:
        raise RecipeError(f"{whole}: there is no {name!r} in a {type(node).__name__}; {nearest(name, [*fields, *names])}")
    current = getattr(node, name)
    if rest:
        if not dataclasses.is_dataclass(current) and not isinstance(current, Mapping):
            raise RecipeError(f"{whole}: {name} is {current!r} and has no parts")
        return dataclasses.replace(node, **{name: _replace(current, rest, value, whole)})
    return dataclasses.replace(node, **{name: _typed(value, typing.get_type_hints(type(node))[name], whole)})


def _typed(value: Any, hint: Any, path: str) -> Any:
    """The value as the field's type wants it. Raises RecipeError where it is of another."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin, parts = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and value in parts:
            return value
        if origin is tuple and isinstance(value, list):
            parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
            if len(parts) == len(value) > 0:
                return tuple(_typed(item, part, path) for item, part in zip(value, parts, strict=True))
        if option is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if option in (int, str, bool, type(None)) and type(value) is option:
            return value
    raise RecipeError(f"{path}={value!r} does not fit; expected {hint.__name__ if isinstance(hint, type) else hint}")
