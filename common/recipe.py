"""What a run is made of: a typed recipe, which a paper's recipe.py fills in and the command line overrides.

A recipe is data. What it trains with (TrainConfig), what it is judged by (Protocol) and what the method is given (`method`) are
all in it, so the recipe.json of a run has all of its settings.
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


def _refuse_unless(node: Any, whose: str, *checks: tuple[bool, str, str]) -> None:
    """Raise RecipeError with all (sound, names of fields, what fits) that are not sound, each with the values of its fields."""
    faults = []
    for sound, names, fit in checks:
        if not sound:
            given = ", ".join(f"{name}={getattr(node, name)!r}" for name in names.split())
            faults.append(f"{given} makes no sense: {fit}")
    if faults:
        raise RecipeError(whose + "; ".join(faults))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training: how long, on what batches, with which optimizer. Raises RecipeError for a value that makes no sense by itself.

    What depends on data and devices is checked elsewhere: the batch size by common.train.device_batch, all by benchmarks.preflight.
    """

    epochs: int  # passes over the training images
    batch_size: int  # images per optimizer step, over all devices and accumulation steps
    base_lr: float  # learning rate per `lr_batch` images; the rate is base_lr * batch_size / lr_batch
    lr_batch: int = 256  # see base_lr
    warmup_epochs: float = 0.0  # linear warm-up
    warmup_lr: float = 0.0  # where it starts
    min_lr: float = 0.0  # where the half-cosine ends
    cooldown_epochs: int = 0  # more passes after `epochs`, in which rate and weight decay stay where they ended
    cosine_from_start: bool = False  # the half-cosine counts from step 0, warm-up in place of its beginning; else from the warm-up's end
    milestones: tuple[int, ...] = ()  # epochs after which the rate falls to a tenth, in place of the half-cosine
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's; LARS and SGD (Nesterov's) take the first as their momentum
    weight_decay: float = 0.05  # not on biases and one-dimensional parameters
    final_weight_decay: float | None = None  # to which it goes by half a cosine over `epochs`; None: it stays
    freeze_epoch: float | None = None  # after which rate and weight decay stay as they are
    layer_decay: float | None = None  # factor on the learning rate per layer below the head
    clip_norm: float | None = None  # global gradient norm
    ema: float | None = None  # decay of an average of the weights, which is then what is evaluated
    device_batch: int = 512  # most images given to one device at once; the rest by gradient accumulation
    augmentation: Augmentation = field(default_factory=Augmentation)  # of the training images

    def __post_init__(self) -> None:
        counts = {"epochs": 1, "lr_batch": 1, "device_batch": 1, "cooldown_epochs": 0}
        rates = ("base_lr", "warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "final_weight_decay")
        ascending = all(a < b for a, b in zip((0, *self.milestones), self.milestones, strict=False))
        _refuse_unless(
            self,
            "",
            *((getattr(self, name) >= least, name, f"give a whole number from {least} up") for name, least in counts.items()),
            *((getattr(self, name) is None or getattr(self, name) >= 0, name, "give a number from 0 up") for name in rates),
            (ascending, "milestones", "give epochs from 1 up in ascending order, each once"),
            (all(0 <= beta < 1 for beta in self.betas), "betas", "give two numbers from 0 up, below 1"),
            (self.freeze_epoch is None or self.freeze_epoch > 0, "freeze_epoch", "give a number of epochs above 0, or null"),
            (self.layer_decay is None or 0 < self.layer_decay <= 1, "layer_decay", "give a factor above 0, at most 1, or null"),
            (self.clip_norm is None or self.clip_norm > 0, "clip_norm", "give a norm above 0, or null"),
            (self.ema is None or 0 < self.ema < 1, "ema", "give a decay above 0, below 1, or null"),
        )

    @property
    def lr(self) -> float:
        return self.base_lr * self.batch_size / self.lr_batch


# DeiT's augmentation of images, without repeats; MAE and DropPos fine-tune by it.
DEIT_CROPS = Augmentation(scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", erase=0.25)
# DeiT's supervised training (Touvron et al. 2021, Table 9; AdamW, as in its code without clipping), by which others fine-tune too.
# Its ten epochs of cool-down at the lowest rate are left out, and its warm-up starts at 0, not 1e-6.
DEIT = TrainConfig(
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

# The linear probe of VISSL, by which StoP is judged, with heads=("norm_affine", "linear") and layers=(1, 4): StoP's configurations of
# ViT-B and L. 28 epochs are for ImageNet and CIFAR.
VISSL_SGD = TrainConfig(
    epochs=28,
    batch_size=256,
    base_lr=0.01,
    milestones=(8, 16, 24),
    optimizer="sgd",
    weight_decay=5e-4,
    augmentation=Augmentation(scale=(0.08, 1.0)),
)
# The same by LARS: I-JEPA (appendix A.2) tries lr_multipliers=(1.0, 5.0, 0.1) and decays=(5e-4, 0.0); of 0.01 per 256 images, as StoP's
# configuration of ViT-H has its 0.1, and the paper does not say.
VISSL_LARS = dataclasses.replace(VISSL_SGD, epochs=50, batch_size=16384, milestones=(15, 30, 45), optimizer="lars")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to judge an encoder; its name stands in the results. Raises RecipeError for values that make no sense, alone or together.

    The kinds: "finetune" trains all weights, "linear" linear layers on frozen features by SGD or the like, "logistic" one such layer to
    the optimum of a penalised likelihood; "knn" trains nothing, and "classify" counts the answers of a whole classifier as they are.
    "linear" trains a layer for each of layers x heads x lr_multipliers x decays at once, and the best is chosen as `choose_on` says.
    """

    name: str  # as it stands in results.csv
    kind: Literal["finetune", "linear", "logistic", "knn", "classify"]  # see above
    stage: TrainConfig | None = None  # how to train; logistic regression and k-NN have none
    labels_per_class: int | None = None  # train on so many labels per class, drawn with the run's seed; None = all
    label_fraction: float | None = None  # or on this fraction of all labels, as equal per class as can be, drawn likewise
    label_list: str | None = None  # or on the images named in this file, one a line, by file name or class/file name
    pool: Literal["mean", "class"] = "mean"  # feature: mean of the patch tokens, or the class token
    layers: tuple[int, ...] = (1,)  # frozen: how many last blocks are concatenated, each after the final norm; several for linear only
    # test and frozen images from files: resize the short side to this many pixels before the center crop; 0 stretches the image; None:
    # 256/224 of the image size, or see common.data's view_size
    resize: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"  # by which these are resized
    position: Literal["sincos", "learned", "relative", "none"] | None = None  # fine-tuning: see common.vit.ViT; None = as pre-trained
    drop_path: float = 0.0  # fine-tuning: stochastic depth of the last block
    mixup: float = 0.0  # fine-tuning: mixup alpha
    cutmix: float = 0.0  # fine-tuning: cutmix alpha
    smoothing: float = 0.0  # fine-tuning: label smoothing
    neighbours: int = 20  # k-NN: how many
    temperature: float = 0.07  # k-NN: of the similarity weights
    statistics: Literal["train", "own"] = "train"  # logistic: whose mean and std standardise the test features
    l2: float = 0.0025  # logistic: weight of half the squared norm beside the summed loss; scikit-learn's 1 / C
    # linear: MAE's batch norm without parameters, VISSL's with, or none, before the layer; or a query that attends to the tokens
    heads: tuple[Literal["norm", "norm_affine", "linear", "attentive"], ...] = ("norm",)
    lr_multipliers: tuple[float, ...] = (1.0,)  # linear: multiples of the stage's learning rate
    decays: tuple[float, ...] = ()  # linear: weight decays; () = the stage's
    # linear, several classifiers: by which images the best is chosen. "held_out": a tenth of the labelled training images, on which none is
    # trained. "test": the test images on which it is then reported, as I-JEPA and StoP do; the rows are then called ..._on_test
    choose_on: Literal["held_out", "test"] = "held_out"

    def __post_init__(self) -> None:
        labels = self.labels_per_class, self.label_fraction, self.label_list
        many = self.classifiers > 1
        shared = self.stage is not None and (self.stage.clip_norm is not None or self.stage.final_weight_decay is not None)
        once = (
            (len(set(getattr(self, name))) == len(getattr(self, name)), name) for name in ("layers", "heads", "lr_multipliers", "decays")
        )
        _refuse_unless(
            self,
            f"protocol {self.name}: ",
            (self.kind not in ("finetune", "linear") or self.stage is not None, "kind stage", "give it a stage to train by"),
            (sum(value is not None for value in labels) <= 1, "labels_per_class label_fraction label_list", "at most one may be given"),
            (self.labels_per_class is None or self.labels_per_class > 0, "labels_per_class", "give a whole number from 1 up"),
            (self.label_fraction is None or 0 < self.label_fraction <= 1, "label_fraction", "give a fraction above 0, at most 1"),
            (min(self.layers, default=0) > 0, "layers", "give numbers from 1 up"),
            (self.kind == "linear" or len(self.layers) == 1, "kind layers", "give one number of layers"),
            (self.kind != "finetune" or self.layers == (1,), "kind layers", "fine-tuning reads the last layer, (1,)"),
            (self.resize is None or self.resize >= 0, "resize", "give pixels, from the image size up, or 0"),
            (0 <= self.drop_path < 1, "drop_path", "give a probability from 0 up, below 1"),
            (self.mixup >= 0, "mixup", "give a number above 0, or 0 for none"),
            (self.cutmix >= 0, "cutmix", "give a number above 0, or 0 for none"),
            (0 <= self.smoothing < 1, "smoothing", "give a fraction from 0 up, below 1"),
            (self.neighbours > 0, "neighbours", "give a whole number from 1 up"),
            (self.temperature > 0, "temperature", "give a number above 0"),
            (self.l2 > 0, "l2", "give a number above 0"),
            (len(self.heads) > 0, "heads", "name at least one"),
            (min(self.lr_multipliers, default=0) > 0, "lr_multipliers", "give numbers above 0"),
            (min(self.decays, default=0) >= 0, "decays", "give numbers from 0 up"),
            *((sound, name, "give each once") for sound, name in once),
            (
                not (many and shared),
                "stage",
                "several layers, heads, lr_multipliers or decays go without clip_norm and final_weight_decay",
            ),
        )

    @property
    def classifiers(self) -> int:
        """How many classifiers a linear probe trains: layers x heads x lr_multipliers x decays."""
        return len(self.layers) * len(self.heads) * len(self.lr_multipliers) * max(1, len(self.decays))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method on a data set: encoder, pre-training, evaluations."""

    size: str  # of the encoder: a name of common.vit.SIZES; or any timm model by name, or a class of timm.models for one of another size
    image_size: int  # pixels
    patch_size: int | None  # pixels; None for a timm model as it is
    pretrain: TrainConfig
    protocols: tuple[Protocol, ...]
    method: dict[str, Any] = field(default_factory=dict)  # options of the paper's method
    encoder: dict[str, Any] = field(default_factory=dict)  # options of common.vit.ViT, or of the timm backbone
    targets: dict[str, Any] = field(default_factory=dict)  # how what the method learns from is made of the images before, if it is
    supervised: bool = False  # the method learns from the labels, so its own top-1 counts as training from scratch
    # Variants that are run side by side, by name: what each changes, as `override` takes it. "a+b" is "a" with something added.
    arms: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        """timm's name of the encoder; of a class of timm's, its name with patch and image size. A ViT of another depth says so in it."""
        depth = self.encoder.get("depth", SIZES[self.size][1]) if self.size in SIZES else 0
        family = f"vit_{self.size}" if self.size in SIZES else self.size
        family += f"_depth{depth}" if depth and depth != SIZES[self.size][1] else ""
        return self.size if timm.is_model(self.size) else f"{family}_patch{self.patch_size}_{self.image_size}"

    def build_encoder(self, channels: int, **changes) -> nn.Module:
        """The encoder for images of so many channels, with options changed by keyword.

        A ViT, or a timm backbone without classifier that has `channels` and `image_size` too.
        Raises RecipeError for a size that is neither and for options that the encoder does not have.
        """
        if self.size not in SIZES:
            return self._build_timm(channels, **changes)
        own = {"image_size": self.image_size, "patch_size": self.patch_size, "channels": channels}
        check_options(ViT, self.encoder, taken=(*own, "width", "heads"))
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


def as_json(recipe: Recipe | TrainConfig | Protocol) -> dict:
    """The recipe as JSON holds it (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


# Names of settings until November 2026, and what they are called now.
RENAMED = {
    "drops": "milestones",
    "label_share": "label_fraction",
    "rates": "lr_multipliers",
    "recompute": "grad_checkpointing",
    "squeezed": "squash",
    "strength": "l2",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the new name, the nearest known names, or all of them, or the first twenty of many."""
    known = sorted(known)
    if RENAMED.get(name) in known:
        return f"it is now called {RENAMED[name]!r}"
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

    Protocols are reached by name, such as "finetune.stage.epochs=50". Values are JSON, or text. All values are changed at once, so that
    some may make sense only together. Raises RecipeError with all faults, a line each, naming the path and the nearest field.
    """
    changes, faults = [], []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            faults.append(f"{assignment!r} is no assignment; write path=value, such as pretrain.base_lr=1e-3")
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        changes.append((path.split("."), value, path))
    recipe = _replace(recipe, changes, faults)
    if faults:
        raise RecipeError("\n".join(faults))
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


def base_arm(recipe: Recipe, arm: str) -> str:
    """The arm that `arm` adds something to: "vit" for "vit+rpl". Empty where it is no arm of the recipe, and for an arm without "+"."""
    base, plus, _ = arm.partition("+")
    return base if plus and base in recipe.arms else ""


def _replace(node: Any, changes: list[tuple[list[str], Any, str]], faults: list[str]) -> Any:
    """The node with changes (path below it, value, whole path). Adds to `faults` what cannot be changed, and leaves that as it is."""
    if isinstance(node, Mapping):
        return {**node, **{".".join(path): value for path, value, _ in changes}}
    below: dict[str, list[tuple[list[str], Any, str]]] = {}  # by the field or protocol that they are in
    fields, values = {f.name for f in dataclasses.fields(node)}, {}
    protocols = {protocol.name: protocol for protocol in node.protocols} if isinstance(node, Recipe) else {}
    for (name, *rest), value, whole in changes:
        current = protocols.get(name) or getattr(node, name, None)
        if (name == "protocols" and protocols) or (name in protocols and not rest):
            some = f"such as {next(iter(protocols))}.pool; they are {', '.join(protocols)}"
            faults.append(f"{whole}: protocols are changed field by field, {some}")
        elif name not in protocols and name not in fields:
            faults.append(f"{whole}: there is no {name!r} in a {type(node).__name__}; {nearest(name, [*fields, *protocols])}")
        elif rest and not dataclasses.is_dataclass(current) and not isinstance(current, Mapping):
            faults.append(f"{whole}: {name} is {current!r} and has no parts")
        elif rest:
            below.setdefault(name, []).append((rest, value, whole))
        else:
            try:
                values[name] = _typed(value, typing.get_type_hints(type(node))[name], whole)
            except RecipeError as error:
                faults.append(str(error))
    for name, parts in below.items():
        if name in protocols:
            protocols[name] = _replace(protocols[name], parts, faults)
            values["protocols"] = tuple(protocols.values())
        else:
            values[name] = _replace(getattr(node, name), parts, faults)
    try:
        return dataclasses.replace(node, **values)
    except ValueError as error:
        place = changes[0][2].split(".")[: -len(changes[0][0])]  # a protocol's message has its name already
        faults.append(f"{error}" if isinstance(node, Protocol) else ".".join([*place, str(error)]))
        return node


def _typed(value: Any, hint: Any, path: str) -> Any:
    """The value as the field's type wants it. Raises RecipeError where it is of another."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        origin, parts = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and value in parts:
            return value
        if origin is tuple and isinstance(value, list):
            parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
            if len(parts) == len(value):
                return tuple(_typed(item, part, path) for item, part in zip(value, parts, strict=True))
        if option is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if option in (int, str, bool, type(None)) and type(value) is option:
            return value
    names = [part for option in options for part in typing.get_args(option) if typing.get_origin(option) is Literal]
    if RENAMED.get(str(value)) in names:
        raise RecipeError(f"{path}={value!r} does not fit; {nearest(value, names)}")
    raise RecipeError(f"{path}={value!r} does not fit; expected {hint.__name__ if isinstance(hint, type) else hint}")
