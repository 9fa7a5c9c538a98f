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
    override,
    without_later,
)

REFERENCES = ("from scratch", "mae")  # what the differences are from
# The data whose recipes are made for an encoder of this size: decoders, initial values and learning rates follow the encoder, not the data.
# With the decoder of MAE's recipe for a ViT-S, 512 wide and 8 deep, MAE takes 25 times as long as with that for this encoder.
SIZED = {"micro": "digits"}
# A second recipe of one method: how much of a difference between methods a recipe can make. UNTUNED where MAE is tuned.
GAP, UNTUNED = "mae, half the lr", "mae, untuned"


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
    held_out: int = 0  # training images on which the arena is judged instead of the test images: methods are tuned in it

    @property
    def hash(self) -> str:
        """Identifies the arena in its ledger."""
        return hashlib.sha256(json.dumps(without_later(dataclasses.asdict(self)), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def data(self) -> str:
        """The data whose recipes the methods take: digits, cifar10 or folder."""
        return self.name.removesuffix("_tuning").removesuffix("_gpu")

    def limited(self, data: Data) -> Data:
        """The data within the arena's limit, without the test images if training images are held out."""
        data = data.hold_out(self.held_out) if self.held_out else data
        return data.limited(self.limit) if self.limit else data

    def protocols(self, pool: Any, position: Any) -> tuple[Protocol, ...]:
        """The evaluations. pool: mean or class, as in the method's own k-NN. position: for fine-tuning, None as in the pre-training."""
        linear = Protocol(name="linear", kind="logistic", pool=pool)
        if self.held_out:
            return (linear,)
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
            linear,
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
# Two CPU cores: a method and seed in 5 to 31 minutes of one core, two of them at a time.
_CIFAR = replace(_DIGITS, name="cifar10", image_size=32, patch_size=4, images=200_000, batch_size=64, limit=20_000)
_CIFAR = replace(_CIFAR, finetune=replace(_TUNE, epochs=5, warmup_epochs=1, augmentation=_PADDED), few=replace(_FEW, augmentation=_PADDED))
_CIFAR_TUNING = replace(_CIFAR, name="cifar10_tuning", images=40_000, held_out=2_000)
# A folder of photographs, on two CPU cores.
_FOLDER = replace(_DIGITS, name="folder", image_size=64, patch_size=8, images=20_000)
_FOLDER = replace(_FOLDER, finetune=replace(_TUNE, epochs=10, augmentation=_CROPPED), few=replace(_FEW, augmentation=_CROPPED))
# One GPU. The time of a method and seed is not measured yet.
_GPU = replace(_CIFAR, name="cifar10_gpu", size="tiny", encoder={}, images=10_000_000, batch_size=None, limit=None)
_GPU = replace(_GPU, finetune=_MAE, few=replace(_MAE, epochs=200, batch_size=50))
_FOLDER_GPU = replace(_GPU, name="folder_gpu", size="small", image_size=224, patch_size=16, images=5_000_000, batch_size=1024)
_PHOTOGRAPHS = replace(MAE_FINETUNE, batch_size=512, epochs=50)
_FOLDER_GPU = replace(_FOLDER_GPU, finetune=_PHOTOGRAPHS, few=replace(_PHOTOGRAPHS, batch_size=50, epochs=100))
ARENAS = {arena.name: arena for arena in (_DIGITS, _CIFAR, _CIFAR_TUNING, _FOLDER, _GPU, _FOLDER_GPU)}

# The trials of a method: its recipe, half and twice its learning rate, and two other values of one of its own options.
RATES = {"lr x 0.5": 0.5, "lr x 2": 2}
OPTIONS = {
    "mae": ("mask_ratio=0.5", "mask_ratio=0.85"),
    "ijepa": ("momentum=0.99", "momentum=0.999"),
    "deit": ("mixup=0", "cutmix=0"),
    "droppos": ("position_mask_ratio=0.5", "position_mask_ratio=0.9"),
    "mapet": ("context=9", "context=33"),
    "mp3": ("eta=0.25", "eta=0.75"),
    "positional_label, mae+rpl": ("weight=0.1", "weight=2"),
    "stop": ("sigma=0.1", "sigma=0.5"),
    "jigsaw, mae+jigsaw": ("weight=0.02", "weight=0.5"),
    "drloc, mae+drloc": ("weight=0.1", "weight=2"),
}
# Claims of the papers, as pairs of methods. MP3: positions of the fine-tuning.
CLAIMS = {
    "StoP over I-JEPA": ("stop", "ijepa"),
    "MP3: absolute positions over none": ("mp3", "mp3, none"),
    "MP3: relative positions over absolute": ("mp3, relative", "mp3"),
    "RPL over APL": ("positional_label, mae+rpl", "positional_label, mae+apl"),
    "MaPeT over masked prediction": ("mapet", "mapet, masked"),
}
# The arms that only the claims need: of which method, and what they change, in its recipe or as position embedding of the fine-tuning.
ARMS = {
    "mp3, none": ("mp3", "position=none"),
    "mp3, relative": ("mp3", "position=relative"),
    "positional_label, mae+apl": ("positional_label, mae+rpl", "method.label=absolute"),
    "mapet, masked": ("mapet", "method.prediction=masked"),
}
# The best trial of a method in the tuning of an arena, where that is not its recipe.
TUNED = {
    "cifar10": {
        "mae": "lr x 2",
        "deit": "cutmix=0",
        "droppos": "lr x 0.5",
        "mapet": "context=9",
        "positional_label, mae+rpl": "weight=0.1",
        "stop": "sigma=0.1",
    }
}


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
    position: str | None = None  # of the fine-tuning, the only evaluation then; None: as the encoder's, learned where it has none

    @property
    def trains(self) -> bool:
        """Whether it is pre-trained in the arena."""
        return self.start == "pretrained" and self.encoder_file is None


def entries(arena: Arena, names: tuple[str, ...] = (), encoder_file: Path | None = None, claims: bool = False) -> dict[str, Entry]:
    """The methods that take part, by name, the references first. A paper enters with its recipe for the data: as it is, or with each arm
    that adds something; or with the recipes and arms that its COMPARED lists for the data, {data: [(recipe, arm), ...]}. With `claims`,
    their ARMS take part, too.

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
    chosen = TUNED.get(arena.name, {})
    found = [replace(entry, recipe=trials(entry)[chosen[entry.name]].recipe) if entry.name in chosen else entry for entry in found]
    if claims:
        methods = {entry.name: entry for entry in found}
        found += [_arm(methods[method], name, change) for name, (method, change) in ARMS.items() if method in methods]
    if arena.held_out:
        found = [found[0], *(trial for entry in found[1:] for trial in trials(entry).values())]
    elif not names and "mae" in chosen:
        found.append(Entry(UNTUNED, found[0].module, mae, "untuned"))
    elif not names:
        halved = replace(mae, pretrain=replace(mae.pretrain, base_lr=mae.pretrain.base_lr / 2))
        found.append(Entry(GAP, found[0].module, halved, "half_lr"))
    if encoder_file is not None:
        name = f"{encoder_file.stem} ({digest(encoder_file)[:6]})"  # two files may have the same name
        found.append(Entry(name, found[0].module, mae, encoder_file=encoder_file))
    return {entry.name: entry for entry in found}


def _arm(entry: Entry, name: str, change: str) -> Entry:
    what, _, value = change.partition("=")
    own: dict = {"position": value} if what == "position" else {"recipe": override(entry.recipe, [change])}
    return replace(entry, name=name, arm="-".join(filter(None, [entry.arm, value])), **own)


def trial_names(method: str) -> dict[str, str]:
    """The names of a method's trials by what they change: "" is its own recipe."""
    return {title: ", ".join(filter(None, [method, title])) for title in ("", *RATES, *OPTIONS.get(method, ()))}


def trials(entry: Entry) -> dict[str, Entry]:
    """The trials of a method by what they change."""
    found = {}
    for title, name in trial_names(entry.name).items():
        change = f"pretrain.base_lr={entry.recipe.pretrain.base_lr * RATES[title]}" if title in RATES else f"method.{title}"
        arm = "-".join(filter(None, [entry.arm, title.replace(" ", "")]))
        found[title] = replace(entry, name=name, recipe=override(entry.recipe, [change] if title else []), arm=arm)
    return found


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
        "Positions": options.get("position", "sincos") + (f", then {position}" if (position := recipe.protocols[0].position) else ""),
        "Feature": str(recipe.protocols[0].pool),
    }
    shared |= {"Tuned": TUNED[arena.name].get(entry.name, "-")} if arena.name in TUNED else {}
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
    position = entry.position or ("learned" if own.encoder.get("position") == "none" else None)
    protocols = arena.protocols(pool, position)
    return replace(
        own,
        size=arena.size,
        image_size=arena.image_size,
        patch_size=arena.patch_size,
        encoder=own.encoder | arena.encoder,
        pretrain=replace(own.pretrain, batch_size=batch, **length),
        protocols=tuple(one for one in protocols if entry.position is None or one.kind == "finetune"),
        arms={},
    )
