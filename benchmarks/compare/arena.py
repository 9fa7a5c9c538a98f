"""Arenas: what all methods of a comparison share. The rest comes from a paper's own recipe: method options, optimizer, augmentation."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.papers import baselines, choose_recipe, paper_module, paper_name, papers
from common.data import Augmentation, Data
from common.files import digest
from common.recipe import (
    DEIT_CROPS,
    LOCATION,
    MAE_FINETUNE,
    Protocol,
    Recipe,
    RecipeError,
    TrainConfig,
    choose_arms,
    nearest,
    without_later,
)

REFERENCES = ("from scratch", "mae")  # what the differences are from
# The data whose recipes are made for an encoder of this size: decoders, initial values and learning rates follow the encoder, not the data.
# With the decoder of MAE's recipe for a ViT-S, 512 wide and 8 deep, MAE takes 22 times as long as with that for this encoder.
SIZED = {"micro": "digits"}
GAP = "mae, half the lr"  # a second recipe of one method: how much of a difference between methods a recipe can make


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What all methods share: the encoder, the budget, and the evaluations with their trainings."""

    name: str
    size: str  # of the encoder, as in Recipe
    image_size: int  # pixels
    patch_size: int  # pixels
    images: int  # images that a pre-training sees, by default
    finetune: TrainConfig  # with all labels
    few: TrainConfig  # with the most of `labels`; with fewer labels, more epochs
    encoder: dict = field(default_factory=dict)  # options of the encoder
    labels: tuple[int, ...] = (5, 20)  # labels per class of `few`
    draws: int = 2  # of these labels; each is used with all seeds of the training
    batch_size: int | None = None  # the largest of a pre-training; learning rates follow it
    limit: int | None = None  # at most this many training and test images

    @property
    def hash(self) -> str:
        """Identifies the arena in its ledger."""
        return hashlib.sha256(json.dumps(without_later(dataclasses.asdict(self)), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def data(self) -> str:
        """The data whose recipes the methods take: digits, cifar10 or folder."""
        return self.name.removesuffix("_gpu")

    def limited(self, data: Data) -> Data:
        """The data within the arena's limit."""
        return data.limited(self.limit) if self.limit else data

    def protocols(self, pool: Any, position: Any) -> tuple[Protocol, ...]:
        """The evaluations. pool: mean or class, as in the method's own k-NN. position: for fine-tuning, None as in the pre-training."""
        tune: dict = {"kind": "finetune", "drop_path": 0.1, "smoothing": 0.1, "pool": pool, "position": position}
        more = {count: max(self.labels) // count for count in self.labels}  # epochs, for the same number of steps
        lengths = {count: (self.few.epochs * more[count], self.few.warmup_epochs * more[count]) for count in self.labels}
        stages = {count: replace(self.few, epochs=epochs, warmup_epochs=warmup) for count, (epochs, warmup) in lengths.items()}
        few = [
            Protocol(name=f"finetune_{count}_per_class_draw{draw}", stage=stage, labels_per_class=count, label_seed=draw, **tune)
            for count, stage in stages.items()
            for draw in range(self.draws)
        ]
        return (
            Protocol(name="finetune", stage=self.finetune, shuffle_test=True, **tune),
            *few,
            Protocol(name="linear", kind="logistic", pool=pool),
            Protocol(name="knn", kind="knn", pool=pool),
            LOCATION,
        )


_SHIFTS = Augmentation(crop="padding", padding=1, flip=0.0)
# Many small steps: with the papers' batch of 128, 28 epochs of digits are 308 steps, after which MAE is worse than no pre-training.
# Batch and learning rate: compared on 300 images held out from the training images; lengths: by time. See README.md.
_TUNE = TrainConfig(epochs=16, batch_size=32, base_lr=4e-3, warmup_epochs=2, clip_norm=1.0, augmentation=_SHIFTS)
_FEW = replace(_TUNE, epochs=48, batch_size=25, base_lr=5e-3)
_PADDED = Augmentation(crop="padding", padding=4)
_MAE = replace(MAE_FINETUNE, batch_size=512, device_batch=512, augmentation=replace(DEIT_CROPS, crop="padding", padding=4))
_CROPPED = Augmentation(scale=(0.2, 1.0))
# Two CPU cores. 12 px in patches of 2 is the smallest grid on which I-JEPA's and StoP's blocks exist.
_DIGITS = Arena(
    name="digits",
    size="micro",
    encoder={"depth": 4},
    image_size=12,
    patch_size=2,
    images=40_000,
    finetune=_TUNE,
    few=_FEW,
    batch_size=32,
)
# Two CPU cores: a method and seed in about ten minutes.
_CIFAR = replace(_DIGITS, name="cifar10", image_size=32, patch_size=4, images=400_000, batch_size=64, limit=20_000)
_CIFAR = replace(_CIFAR, finetune=replace(_TUNE, epochs=5, warmup_epochs=1, augmentation=_PADDED), few=replace(_FEW, augmentation=_PADDED))
# A folder of photographs, on two CPU cores.
_FOLDER = replace(_DIGITS, name="folder", image_size=64, patch_size=8, images=20_000)
_FOLDER = replace(_FOLDER, finetune=replace(_TUNE, epochs=10, augmentation=_CROPPED), few=replace(_FEW, augmentation=_CROPPED))
# One GPU. The time of a method and seed is not measured yet.
_GPU = replace(_CIFAR, name="cifar10_gpu", size="tiny", encoder={}, images=10_000_000, batch_size=None, limit=None)
_GPU = replace(_GPU, finetune=_MAE, few=replace(_MAE, epochs=200, batch_size=50))
_FOLDER_GPU = replace(_GPU, name="folder_gpu", size="small", image_size=224, patch_size=16, images=5_000_000, batch_size=1024)
_PHOTOGRAPHS = replace(MAE_FINETUNE, batch_size=512, epochs=50)
_FOLDER_GPU = replace(_FOLDER_GPU, finetune=_PHOTOGRAPHS, few=replace(_PHOTOGRAPHS, batch_size=50, epochs=100))
ARENAS = {arena.name: arena for arena in (_DIGITS, _CIFAR, _FOLDER, _GPU, _FOLDER_GPU)}


def choose_arena(data: str, device: str, limit: int | None = None) -> Arena:
    """The arena of a data set, of a folder or of this name, on cpu or cuda; `limit` lowers its limit, and batches that are larger."""
    name = data if data in ARENAS else "folder"
    arena = ARENAS.get(f"{name}_gpu" if device == "cuda" else name, ARENAS[name])
    if limit is None:
        return arena
    tune = replace(arena.finetune, batch_size=min(arena.finetune.batch_size, limit))
    return replace(arena, limit=min(limit, arena.limit or limit), batch_size=min(arena.batch_size or limit, limit), finetune=tune)


@dataclass(frozen=True)
class Entry:
    """A method of a comparison."""

    name: str
    module: ModuleType
    recipe: Recipe  # its own, for the data
    arm: str = ""
    start: str = "pretrained"  # or "scratch": nothing is pre-trained
    encoder_file: Path | None = None

    @property
    def trains(self) -> bool:
        """Whether it is pre-trained in the arena."""
        return self.start == "pretrained" and self.encoder_file is None


def entries(arena: Arena, names: tuple[str, ...] = (), encoder_file: Path | None = None) -> dict[str, Entry]:
    """The methods that take part, by name, the references first. A paper enters with its recipe for the data: as it is, or with each arm
    that adds something; or with the recipes and arms that its COMPARED lists for the data, {data: [(recipe, arm), ...]}.

    Raises RecipeError for an unknown name.
    """
    known = [*baselines(), *papers()]
    for name in names:
        if name not in known:
            raise RecipeError(f"PAPERS={name!r} is not known; {nearest(name, known)}")
    module = paper_module("mae")
    mae = _recipes(module, arena)["mae", ""]
    found = [Entry("from scratch", module, mae, start="scratch"), Entry("mae", module, mae)]
    for paper in (name for name in known if name != "mae" and name in (names or known)):
        module = paper_module(paper)
        found += [Entry(name, module, own, arm) for (name, arm), own in _recipes(module, arena).items()]
    if not names:
        halved = replace(mae, pretrain=replace(mae.pretrain, base_lr=mae.pretrain.base_lr / 2))
        found.append(Entry(GAP, found[0].module, halved, "half_lr"))
    if encoder_file is not None:
        name = f"{encoder_file.stem} ({digest(encoder_file)[:6]})"  # two files may have the same name
        found.append(Entry(name, found[0].module, mae, encoder_file=encoder_file))
    return {entry.name: entry for entry in found}


def _recipes(module: ModuleType, arena: Arena) -> dict[tuple[str, str], Recipe]:
    """The recipes with which a paper takes part, by name and arm, with the sizes and rates for the arena's encoder."""
    found, fitting = _listed(module, arena.data), _listed(module, SIZED.get(arena.size, arena.data))
    for key in found.keys() & fitting.keys():
        own, other = found[key], fitting[key]
        sizes = {name: value for name, value in other.method.items() if name.endswith(("_width", "_depth", "_heads", "_std"))}
        rate: dict = {"base_lr": other.pretrain.base_lr, "lr_batch": other.pretrain.lr_batch}
        found[key] = replace(own, method=own.method | sizes, pretrain=replace(own.pretrain, **rate))
    return found


def _listed(module: ModuleType, data: str) -> dict[tuple[str, str], Recipe]:
    """The recipes of a paper that take part for some data, by name and arm."""
    paper, found = paper_name(module), dict[tuple[str, str], Recipe]()
    data = data if data in module.DEFAULTS else "folder"
    for name, arm in getattr(module, "COMPARED", {}).get(data, [(None, None)]):
        arms = choose_arms(choose_recipe(module, data, name)[1], (arm,) if arm else ())
        added = {arm: own for arm, own in arms.items() if "+" in arm} or arms
        found |= {(f"{paper}, {arm}" if name else paper, arm): own for arm, own in added.items()}
    return found


def conditions(arena: Arena, entry: Entry) -> dict[str, str]:
    """What the arena does not make equal, by title."""
    recipe, options = enter(arena, entry, 100), entry.recipe.encoder
    shared = {
        "Class token": "yes" if options.get("class_token", True) else "no",
        "Positions": options.get("position", "sincos"),
        "Feature": str(recipe.protocols[0].pool),
    }
    own = {
        "Labels": "all" if recipe.supervised else "none",
        "Batch": str(recipe.pretrain.batch_size),
        "Learning rate": f"{recipe.pretrain.lr:.2g}",
    }
    return shared | (own if entry.trains else dict.fromkeys(own, "-"))


def enter(arena: Arena, entry: Entry, epochs: int) -> Recipe:
    """The recipe of an entry in the arena. Warm-up and freezing keep their share of the epochs, and the learning rate follows the batch."""
    own, share = entry.recipe, epochs / entry.recipe.pretrain.epochs
    freeze = None if own.pretrain.freeze_epoch is None else own.pretrain.freeze_epoch * share
    batch = min(own.pretrain.batch_size, arena.batch_size or own.pretrain.batch_size)
    length: dict = {"epochs": epochs, "warmup_epochs": own.pretrain.warmup_epochs * share, "freeze_epoch": freeze, "cooldown_epochs": 0}
    pool = next((protocol.pool for protocol in own.protocols if protocol.kind == "knn"), "mean")
    position = "learned" if own.encoder.get("position") == "none" else None
    return replace(
        own,
        size=arena.size,
        image_size=arena.image_size,
        patch_size=arena.patch_size,
        encoder=own.encoder | arena.encoder,
        pretrain=replace(own.pretrain, batch_size=batch, **length),
        protocols=arena.protocols(pool, position),
        arms={},
    )
