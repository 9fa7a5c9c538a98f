"""The settings of a run: a typed recipe. A paper's recipe.py fills it in, and the command line overrides it.

A recipe is plain data. It holds the training settings (TrainConfig), the evaluation settings (Protocol) and the options of the
method (`method`), so the recipe.json of a run contains all of its settings.
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
    """An invalid recipe, or an invalid change to a recipe."""


def _refuse_unless(node: Any, whose: str, *checks: tuple[bool, str, str]) -> None:
    """Raise RecipeError for all checks (is valid, names of fields, valid values) that fail, each with the values of its fields."""
    faults = []
    for sound, names, fit in checks:
        if not sound:
            given = ", ".join(f"{name}={getattr(node, name)!r}" for name in names.split())
            faults.append(f"{given} makes no sense: {fit}")
    if faults:
        raise RecipeError(whose + "; ".join(faults))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one training: length, batches, optimizer. Raises RecipeError for a value that makes no sense by itself.

    Limits that depend on data and devices are checked elsewhere: the batch size by common.train.device_batch, all by benchmarks.preflight.
    """

    epochs: int  # passes over the training images
    batch_size: int  # images per optimizer step, over all devices and accumulation steps
    base_lr: float  # learning rate per `lr_batch` images: the learning rate is base_lr * batch_size / lr_batch
    lr_batch: int = 256  # see base_lr
    warmup_epochs: float = 0.0  # length of the linear warm-up
    warmup_lr: float = 0.0  # learning rate at the start of the warm-up
    min_lr: float = 0.0  # learning rate at the end of the half-cosine schedule
    cooldown_epochs: int = 0  # extra epochs after `epochs`, with learning rate and weight decay constant at their last values
    cosine_from_start: bool = False  # half-cosine from step 0, warm-up replaces its beginning; else the half-cosine starts after warm-up
    linear_decay: bool = False  # after the warm-up the learning rate falls linearly to min_lr, instead of the half-cosine
    milestones: tuple[int, ...] = ()  # epochs after which the learning rate is divided by 10, instead of the half-cosine
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW; LARS and SGD (Nesterov) use the first as momentum
    weight_decay: float = 0.05  # not applied to biases and one-dimensional parameters
    final_weight_decay: float | None = None  # final value of a half-cosine schedule over `epochs`; None: constant weight decay
    freeze_epoch: float | None = None  # after this epoch, learning rate and weight decay stay constant
    layer_decay: float | None = None  # factor on the learning rate per layer below the head
    clip_norm: float | None = None  # clip gradients to this global norm
    ema: float | None = None  # decay of an exponential moving average (EMA) of the weights; if set, the EMA weights are evaluated
    device_batch: int = 512  # maximum number of images per forward pass on one device; larger batches use gradient accumulation
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


# DeiT's image augmentation without repeated augmentation. MAE and DropPos use it for fine-tuning.
DEIT_CROPS = Augmentation(scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", erase=0.25)
# DeiT's supervised training (Touvron et al. 2021, Table 9; AdamW, no clipping, as in its code). Other papers use it for fine-tuning.
# Differences: no ten epochs of cool-down at the lowest learning rate, and the warm-up starts at 0, not 1e-6.
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
DEIT_LABELS: dict = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
DEIT_DROP_PATH = 0.1

# MAE's fine-tuning and linear probe (He et al. 2022, Tables 9 and 10).
MAE_FINETUNE = dataclasses.replace(DEIT, epochs=100, base_lr=1e-3, lr_batch=256, min_lr=1e-6, layer_decay=0.75, augmentation=DEIT_CROPS)
MAE_LINEAR = TrainConfig(
    epochs=90,
    batch_size=16384,
    base_lr=0.1,
    warmup_epochs=10,
    optimizer="lars",
    weight_decay=0.0,
    augmentation=Augmentation(scale=(0.08, 1.0)),
)

# VISSL's linear probe. StoP is evaluated with it, with heads=("norm_affine", "linear") and layers=(1, 4): StoP's configurations of
# ViT-B and ViT-L. 28 epochs are for ImageNet and CIFAR.
VISSL_SGD = TrainConfig(
    epochs=28,
    batch_size=256,
    base_lr=0.01,
    milestones=(8, 16, 24),
    optimizer="sgd",
    weight_decay=5e-4,
    augmentation=Augmentation(scale=(0.08, 1.0)),
)
# The same with LARS. I-JEPA (appendix A.2) tries lr_multipliers=(1.0, 5.0, 0.1) and decays=(5e-4, 0.0). The base rate of 0.01 is per
# 256 images, like the 0.1 in StoP's configuration of ViT-H; the paper does not say.
VISSL_LARS = dataclasses.replace(VISSL_SGD, epochs=50, batch_size=16384, milestones=(15, 30, 45), optimizer="lars")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings of one evaluation of an encoder. Raises RecipeError for values that make no sense, alone or together.

    Kinds: "finetune" trains all weights; "linear" trains linear layers on frozen features, by SGD or LARS; "logistic" fits one linear
    layer to the optimum of a penalised likelihood; "knn" trains nothing; "classify" measures the accuracy of a trained classifier;
    "location" fits, for each block, one linear layer on the tokens that tells the cell of the patch grid (see LOCATION).
    "linear" trains one layer for each of layers x heads x lr_multipliers x decays at once; `choose_on` says how the best is chosen.
    """

    name: str  # the name in results.csv
    kind: Literal["finetune", "linear", "logistic", "knn", "classify", "location"]  # see above
    stage: TrainConfig | None = None  # training settings; logistic regression and k-NN have none
    labels_per_class: int | None = None  # train on this many labels per class, drawn with `label_seed`; None = all
    label_fraction: float | None = None  # or on this fraction of all labels, balanced over classes, drawn with `label_seed`
    label_list: str | None = None  # or on the images listed in this file, one per line, by file name or class/file name
    # seed of the draw of labels, and of the images that a linear probe holds out; None = the run's seed. If it is given, runs with
    # different seeds train on the same images, so the spread of their results is that of the training alone
    label_seed: int | None = None
    pool: Literal["mean", "class"] = "mean"  # feature: mean of the patch tokens, or the class token
    layers: tuple[int, ...] = (1,)  # frozen: number of last blocks to concatenate, each after the final norm; several for linear only
    # test images and images for frozen encoders, from files: resize the short side to this many pixels before the center crop;
    # 0 stretches the image; None: 256/224 of the image size, with exceptions (see view_size in common/data/augment.py)
    resize: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"  # for this resizing
    position: Literal["sincos", "learned", "relative", "none"] | None = None  # fine-tuning: see common.vit.ViT; None = as pre-trained
    drop_path: float = 0.0  # fine-tuning: stochastic depth of the last block
    mixup: float = 0.0  # fine-tuning: mixup alpha
    cutmix: float = 0.0  # fine-tuning: cutmix alpha
    smoothing: float = 0.0  # fine-tuning: label smoothing
    # fine-tuning: also test on images whose patches have changed places, at random for each image; this result is named ..._shuffled
    shuffle_test: bool = False
    neighbours: int = 20  # k-NN: number of neighbours
    temperature: float = 0.07  # k-NN: temperature of the similarity weights
    statistics: Literal["train", "own"] = "train"  # logistic: standardise the test features by mean and std of train or test features
    # logistic, location: weight of half the squared norm, added to the summed loss; 1 / C in scikit-learn. Use 1 for location, as LOCATION
    l2: float = 0.0025
    images: int | None = 256  # location: at most this many training and this many test images, drawn with `label_seed`; None = all
    # linear: before the layer, MAE's batch norm without parameters, VISSL's batch norm with parameters, nothing, or attention pooling
    heads: tuple[Literal["norm", "norm_affine", "linear", "attentive"], ...] = ("norm",)
    lr_multipliers: tuple[float, ...] = (1.0,)  # linear: multiples of the stage's learning rate
    decays: tuple[float, ...] = ()  # linear: weight decays; () = that of the stage
    # linear, several classifiers: images on which the best is chosen. "held_out": a tenth of the labelled training images, not used for
    # training. "test": the test images on which it is also reported, as in I-JEPA and StoP; the rows are then named ..._on_test
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
            (self.label_seed is None or self.label_seed >= 0, "label_seed", "give a whole number from 0 up, or null"),
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
            (not self.shuffle_test or self.kind == "finetune", "kind shuffle_test", "only a fine-tuned classifier has a shuffle test"),
            (self.images is None or self.images > 0, "images", "give a whole number from 1 up, or null"),
            (self.l2 > 0, "l2", "give a number above 0"),
            (len(self.heads) > 0, "heads", "name at least one"),
            (min(self.lr_multipliers, default=0) > 0, "lr_multipliers", "give numbers above 0"),
            (min(self.decays, default=0) >= 0, "decays", "give numbers from 0 up"),
            *((sound, name, "give each once") for sound, name in once),
            (not (many and shared), "stage", "several layers, heads, lr_multipliers or decays go without clip_norm and final_weight_decay"),
        )

    def draw_seed(self, seed: int) -> int:
        """The seed with which a run with seed `seed` draws its labels and images: `label_seed`, if it is given."""
        return seed if self.label_seed is None else self.label_seed

    @property
    def classifiers(self) -> int:
        """Number of classifiers that a linear probe trains: layers x heads x lr_multipliers x decays."""
        return len(self.layers) * len(self.heads) * len(self.lr_multipliers) * max(1, len(self.decays))

    @property
    def training(self) -> TrainConfig:
        """The stage of a protocol that has one. Raises AttributeError for one that trains nothing."""
        if self.stage is None:
            raise AttributeError(f"protocol {self.name} has no stage")
        return self.stage


# How much of the patches' location is in the tokens of each block. A weaker penalty fits the training images better and others worse.
LOCATION = Protocol(name="location", kind="location", l2=1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method on a data set: encoder, pre-training, evaluations."""

    size: str  # encoder: a name in common.vit.SIZES, any timm model by name, or a class of timm.models for a model of another size
    image_size: int  # pixels
    patch_size: int | None  # pixels; None: keep that of the timm model
    pretrain: TrainConfig
    protocols: tuple[Protocol, ...]
    method: dict[str, Any] = field(default_factory=dict)  # options of the paper's method
    encoder: dict[str, Any] = field(default_factory=dict)  # options of common.vit.ViT, or of the timm backbone
    targets: dict[str, Any] = field(default_factory=dict)  # options for computing targets from the images before pre-training, if any
    supervised: bool = False  # the method uses labels, so its own top-1 is reported as training from scratch
    # Variants to compare, by name: the changes of each, as arguments of `override`. "a+b" is "a" with something added.
    arms: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        """timm's name of the encoder; for a class of timm, its name with patch and image size. A ViT of non-default depth includes it."""
        depth = self.encoder.get("depth", SIZES[self.size][1]) if self.size in SIZES else 0
        family = f"vit_{self.size}" if self.size in SIZES else self.size
        family += f"_depth{depth}" if depth and depth != SIZES[self.size][1] else ""
        return self.size if timm.is_model(self.size) else f"{family}_patch{self.patch_size}_{self.image_size}"

    def build_encoder(self, channels: int, **changes: Any) -> nn.Module:
        """Build the encoder for images with `channels` channels; keywords change its options.

        Returns a ViT, or a timm backbone without classifier, with attributes `channels` and `image_size` added.
        Raises RecipeError for an unknown size and for options that the encoder does not have.
        """
        if self.size not in SIZES:
            return self._build_timm(channels, **changes)
        if self.patch_size is None:
            raise RecipeError("patch_size=None: a ViT needs its patch size in pixels")
        own: dict = {"image_size": self.image_size, "patch_size": self.patch_size, "channels": channels}
        check_options(ViT, self.encoder, taken=(*own, "width", "heads"))
        options = own | self.encoder | changes
        return vit(self.size, **options)

    def _build_timm(self, channels: int, **changes: Any) -> nn.Module:
        options: dict = {"in_chans": channels, "num_classes": 0, "img_size": self.image_size, "patch_size": self.patch_size}
        if timm.is_model(self.size):
            make = partial(timm.create_model, self.size)
            known = timm.get_pretrained_cfg(self.size)
            if known is None or not known.fixed_input_size:
                del options["img_size"]  # a convolutional network takes any image size
        elif self.size in timm.models.__dict__ and isinstance(make := getattr(timm.models, self.size), type):
            pass
        else:
            names = [*SIZES, *timm.list_models()]
            raise RecipeError(f"size={self.size!r} is neither a size of ViT nor a model or class of timm; {nearest(self.size, names)}")
        options = {name: value for name, value in options.items() if value is not None} | self.encoder | changes
        try:
            encoder: Any = make(**options)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # how timm refuses options and sizes
            given = ", ".join(f"{name}={value}" for name, value in options.items())
            raise RecipeError(f"timm cannot build {self.size} with {given}: {error}") from error
        encoder.channels, encoder.image_size = channels, (self.image_size, self.image_size)
        return encoder


def as_json(recipe: Recipe | TrainConfig | Protocol) -> dict:
    """The recipe as a JSON-compatible dict (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


LATER = {"linear_decay": False, "held_out": 0}  # settings of TrainConfig and of arenas that earlier runs lack, with what they did


def without_later(settings: Any) -> Any:
    """Settings as JSON, without those of LATER that have these values: so earlier runs and arenas keep their identity."""
    if isinstance(settings, dict):
        kept = {name: value for name, value in settings.items() if name not in LATER or value != LATER[name]}
        return {name: without_later(value) for name, value in kept.items()}
    return [without_later(value) for value in settings] if isinstance(settings, list) else settings


# Names of settings until November 2026, and their current names.
RENAMED = {
    "drops": "milestones",
    "label_share": "label_fraction",
    "rates": "lr_multipliers",
    "recompute": "grad_checkpointing",
    "squeezed": "squash",
    "strength": "l2",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint for an error message: the new name, the nearest known names, or the known names (at most twenty)."""
    known = sorted(known)
    if RENAMED.get(name) in known:
        return f"it is now called {RENAMED[name]!r}"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known[:20])}{more}"


def check_options(function: Any, options: Mapping[str, Any], taken: Iterable[str] = ()) -> None:
    """Raise RecipeError if `function` does not take one of the options by keyword, or if the option is in `taken`."""
    known = [name for name in inspect.signature(function).parameters if name not in taken]
    for name in options:
        if name not in known:
            raise RecipeError(f"{getattr(function, '__name__', function)} has no option {name!r}; {nearest(name, known)}")


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return the recipe with values changed by "path=value", such as "pretrain.base_lr=1e-3" or "method.sigma=2".

    Address protocols by name, such as "finetune.stage.epochs=50". Values are JSON or text. All values are changed at once, so values
    that are valid only together can be set. Raises RecipeError with all errors, one per line, with the path and the nearest field.
    """
    changes, faults = [], []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            faults.append(f"{assignment!r} is not an assignment; write path=value, such as pretrain.base_lr=1e-3")
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
    """Return the recipe of each arm, or of the arms in `names`; a recipe without arms is returned under an empty name.

    Raises RecipeError for an unknown arm.
    """
    alone = dataclasses.replace(recipe, arms={})
    for name in names:
        if name not in recipe.arms:
            raise RecipeError(f"ARMS: {name!r} is not an arm of the recipe; {nearest(name, recipe.arms) if recipe.arms else 'it has none'}")
    return {name: override(alone, recipe.arms[name]) for name in names or recipe.arms} or {"": alone}


def base_arm(recipe: Recipe, arm: str) -> str:
    """The arm that `arm` extends: "vit" for "vit+rpl". Empty if the recipe has no such arm, and for an arm without "+"."""
    base, plus, _ = arm.partition("+")
    return base if plus and base in recipe.arms else ""


def _replace(node: Any, changes: list[tuple[list[str], Any, str]], faults: list[str]) -> Any:
    """Return the node with changes (path below it, value, full path). Invalid changes are skipped and reported in `faults`."""
    if isinstance(node, Mapping):
        return {**node, **{".".join(path): value for path, value, _ in changes}}
    below: dict[str, list[tuple[list[str], Any, str]]] = {}  # by field or protocol
    fields, values = {f.name for f in dataclasses.fields(node)}, {}
    protocols = {protocol.name: protocol for protocol in node.protocols} if isinstance(node, Recipe) else {}
    for (name, *rest), value, whole in changes:
        current = protocols.get(name) or getattr(node, name, None)
        if (name == "protocols" and protocols) or (name in protocols and not rest):
            some = f"such as {next(iter(protocols))}.pool; known: {', '.join(protocols)}"
            faults.append(f"{whole}: change protocols field by field, {some}")
        elif name not in protocols and name not in fields:
            faults.append(f"{whole}: there is no {name!r} in a {type(node).__name__}; {nearest(name, [*fields, *protocols])}")
        elif rest and not dataclasses.is_dataclass(current) and not isinstance(current, Mapping):
            faults.append(f"{whole}: {name} is {current!r} and has no fields")
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
        place = changes[0][2].split(".")[: -len(changes[0][0])]  # a protocol's message already contains its name
        faults.append(f"{error}" if isinstance(node, Protocol) else ".".join([*place, str(error)]))
        return node


def _typed(value: Any, hint: Any, path: str) -> Any:
    """Return the value converted to the type of the field. Raises RecipeError if it has another type."""
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
