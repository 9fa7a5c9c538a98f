"""Arenas: what all methods of a comparison share. A paper's own recipe for the data gives its method options, optimizer and augmentation."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

from benchmarks.papers import baselines, choose_recipe, paper_module, papers
from common.data import Augmentation, Data
from common.recipe import DEIT_CROPS, Protocol, Recipe, RecipeError, TrainConfig, choose_arms, nearest, override

REFERENCES = ("from scratch", "mae")  # what the differences are from
GAP = "mae, half the lr"  # a second recipe of one method: how much of a difference between methods a recipe can make
FEW = (5, 20)  # labels per class


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What all methods share: the encoder, the budget, and the evaluations with their trainings."""

    name: str
    size: str  # of the encoder, as in Recipe
    image_size: int  # pixels
    patch_size: int  # pixels
    images: int  # images that a pre-training sees, by default
    finetune: TrainConfig  # with all labels
    few: TrainConfig  # with FEW labels per class
    linear: TrainConfig  # linear probe
    encoder: dict = field(default_factory=dict)  # options of the encoder
    draws: int = 2  # of the labels of `few`, each with all seeds
    limit: int | None = None  # use only this many images of the training and the test set

    @property
    def hash(self) -> str:
        """Identifies the arena in its ledger."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def protocols(self, pool: str, position: str | None) -> tuple[Protocol, ...]:
        """The evaluations. pool: of the method's own k-NN. position: for fine-tuning, if the encoder has none from its pre-training."""
        tune: dict = {"kind": "finetune", "drop_path": 0.1, "smoothing": 0.1, "pool": pool, "position": position}
        few = [
            Protocol(name=f"finetune_{count}_per_class_draw{draw}", stage=self.few, labels_per_class=count, label_seed=draw, **tune)
            for count in FEW
            for draw in range(self.draws)
        ]
        return (
            Protocol(name="finetune", stage=self.finetune, shuffle_test=True, **tune),
            *few,
            Protocol(name="linear", kind="linear", stage=self.linear, pool=pool),
            Protocol(name="knn", kind="knn", pool=pool),
            Protocol(name="location", kind="location"),
        )


_SHIFTS = Augmentation(crop="padding", padding=1, flip=0.0)
_TUNE = TrainConfig(epochs=20, batch_size=128, base_lr=2e-3, warmup_epochs=2, augmentation=_SHIFTS)
_PROBE = replace(_TUNE, epochs=20, optimizer="lars", base_lr=10.0, weight_decay=0.0)
_CROPS = replace(DEIT_CROPS, crop="padding", padding=4)
_CIFAR = TrainConfig(
    epochs=100,
    batch_size=512,
    base_lr=1e-3,
    warmup_epochs=5,
    min_lr=1e-6,
    layer_decay=0.75,
    augmentation=Augmentation(crop="padding", padding=4),
)
ARENAS = {
    # 12 px in patches of 2: the smallest grid on which I-JEPA's and StoP's blocks exist.
    "digits": Arena(
        name="digits",
        size="micro",
        encoder={"depth": 4},
        image_size=12,
        patch_size=2,
        images=43_000,
        finetune=_TUNE,
        few=replace(_TUNE, epochs=60, batch_size=50),
        linear=_PROBE,
    ),
}


@dataclass(frozen=True)
class Entry:
    """A method of a comparison."""

    name: str
    module: ModuleType
    recipe: Recipe  # its own, for the data
    arm: str = ""
    start: str = "pretrained"  # or "scratch": nothing is pre-trained
    encoder_file: Path | None = None


def entries(data: str, names: tuple[str, ...] = (), encoder_file: Path | None = None) -> list[Entry]:
    """The methods that take part, references first. A paper enters with the recipe for the data: as it is, or with each arm that adds
    something; or with what its COMPARED says, {data: [(recipe, arm), ...]}.

    Raises RecipeError for an unknown name.
    """
    known = [name for name in (*baselines(), *papers())]
    for name in names:
        if name not in known:
            raise RecipeError(f"PAPERS={name!r} is not known; {nearest(name, known)}")
    mae = paper_module("mae")
    _, own = choose_recipe(mae, data, None)
    found = [Entry("from scratch", mae, own, start="scratch")]
    for paper in ["mae", *(name for name in known if name != "mae" and (not names or name in names))]:
        module = paper_module(paper)
        for name, arm in getattr(module, "COMPARED", {}).get(data if data in module.DEFAULTS else "folder", [(None, "")]):
            _, recipe = choose_recipe(module, data, name)
            arms = choose_arms(recipe, (arm,) if arm else ())
            added = {arm: own for arm, own in arms.items() if "+" in arm} or arms
            for arm, own in added.items():
                plain = len(added) == 1 and name is None
                found.append(Entry(paper if plain else f"{paper} {arm}", module, own, arm))
    if not names:
        found.append(
            Entry(GAP, mae, override(own_of(found, "mae"), [f"pretrain.base_lr={own_of(found, 'mae').pretrain.base_lr / 2}"]), "half_lr")
        )
    if encoder_file is not None:
        found.append(Entry(encoder_file.stem, mae, own, encoder_file=encoder_file))
    return found


def own_of(found: list[Entry], name: str) -> Recipe:
    """The recipe of an entry."""
    return next(entry.recipe for entry in found if entry.name == name)


def enter(arena: Arena, entry: Entry, epochs: int) -> Recipe:
    """The recipe of an entry in the arena. Warm-up and freezing keep their share of the epochs."""
    own, share = entry.recipe, epochs / entry.recipe.pretrain.epochs
    freeze = None if own.pretrain.freeze_epoch is None else own.pretrain.freeze_epoch * share
    pretrain = replace(
        own.pretrain, epochs=epochs, warmup_epochs=own.pretrain.warmup_epochs * share, freeze_epoch=freeze, cooldown_epochs=0
    )
    pool = next((protocol.pool for protocol in own.protocols if protocol.kind == "knn"), "mean")
    position = "learned" if own.encoder.get("position") == "none" else None
    shape: dict = {"size": arena.size, "image_size": arena.image_size, "patch_size": arena.patch_size}
    return replace(own, **shape, encoder=own.encoder | arena.encoder, pretrain=pretrain, protocols=arena.protocols(pool, position), arms={})


def limited(arena: Arena, data: Data) -> Data:
    """The data, with only the first images of each class if the arena has a limit."""
    if arena.limit is None:
        return data
    each = math.ceil(arena.limit / data.classes)
    parts = {}
    for name in ("train", "val"):
        split = getattr(data, name)
        chosen = [index for label in range(data.classes) for index in (split.labels == label).nonzero()[:each, 0].tolist()]
        parts[name] = split.subset(sorted(chosen))
    return replace(data, **parts)
