"""Evaluate an encoder by a protocol: `evaluate` takes our encoders, timm models and other modules, on any data set.

    encoder = timm.create_model("vit_small_patch16_224", pretrained=True)
    for result in evaluate(encoder, open_data("/datasets/imagenet"), "knn"):
        print(result.protocol, result.top1, result.settings)

Shapes: N images, D width, G classifiers of a grid.
"""

import copy
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn

from common.data import Augmentation, Batches, Data, Loader, Split
from common.data.augment import view_name
from common.data.workers import default_workers
from common.evaluate.encoder import TokenEncoder, as_encoder, input_size, patch_size
from common.evaluate.finetune import Classifier, accuracies, accuracy
from common.evaluate.frozen import features, knn_accuracy, layers_name, logistic_accuracy
from common.evaluate.location import CellLoader, LocationProbe, drawn
from common.evaluate.probe import FeatureLoader, LinearProbe, can_cache, hold_out
from common.evaluate.shuffle import ShuffledPatches
from common.method import Output
from common.processes import once
from common.recipe import DEIT_DROP_PATH, DEIT_LABELS, LOCATION, MAE_FINETUNE, VISSL_SGD, Protocol, RecipeError, TrainConfig, nearest
from common.run import Run
from common.train import fit, make_fabric, make_loader
from common.vit import ViT

_VIT_B = replace(MAE_FINETUNE, base_lr=5e-4, layer_decay=0.65)  # as MAE's code fine-tunes ViT-B
# Protocols by name, for encoders without a recipe. A recipe has the protocols of its paper.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="knn", kind="knn"),
        Protocol(name="logistic", kind="logistic"),
        # VISSL's linear probe, on the last layer, with a single classifier
        Protocol(name="linear", kind="linear", stage=VISSL_SGD, heads=("norm_affine",)),
        Protocol(name="finetune", kind="finetune", stage=_VIT_B, drop_path=DEIT_DROP_PATH, **DEIT_LABELS),
        LOCATION,
        Protocol(name="classify", kind="classify"),
    )
}


@dataclass(frozen=True)
class Result:
    """One result of an evaluation, with the settings that it depends on besides encoder, data and seed."""

    protocol: str  # name of the protocol; for a grid of classifiers with the choice: linear_last, linear_best
    top1: float  # percent of the test images
    settings: str  # layers=last pool=mean neighbours=20 temperature=0.07
    hours: float  # wall-clock hours of the evaluation
    top5: float | None = None  # percent; k-NN has none
    held_out_top1: float | None = None  # percent, on the held-out training images by which the best classifier of a grid is chosen
    converged: bool | None = None  # logistic regression: whether the solver reached the optimum
    grid: tuple["Result", ...] = ()  # for the best of a grid: the results of all its classifiers


def evaluate(
    encoder: nn.Module | None,
    data: Data,
    protocol: Protocol | str,
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 256,
    fabric: Fabric | None = None,
    workers: int | None = None,
    run: Run | None = None,
    cache: Path | None = None,
    compile: bool = False,
    checkpoint_seconds: float = 20.0,
) -> list[Result]:
    """Return the results of a protocol, or of one of PROTOCOLS by name.

    There are several for several layers (the best last), for a location probe (one per block, the last block last) and with a shuffle
    test (that of the unchanged images last).

    encoder: a module as in TokenEncoder; it is copied and not changed. None: raw pixels (k-NN, logistic). For "classify", a whole
    classifier that returns logits. Its device does not matter: `fabric` defines where to compute; by default on a GPU if available.
    seed: of the choice of labels (unless the protocol has a `label_seed`), the order of images and all random draws of training, but not of
    a classifier's initial weights, which come from torch's global generator (torch.manual_seed). image_size: (height, width) in pixels; by
    default that of the encoder. batch_size: images per forward pass of a frozen encoder on one device. run: the directory for logs and
    checkpoints of a training; by default a temporary one. cache: where to cache features, as in `features`; by default they are not cached.
    Raises ValueError for an encoder, a protocol or data that do not fit together, and RunError for features that are not finite.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise RecipeError(f"protocol {protocol!r} is not known; {nearest(protocol, PROTOCOLS)}")
        protocol = PROTOCOLS[protocol]
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1")
    if fabric is None:
        fabric = make_fabric()
        fabric.launch()
    size = image_size or input_size(encoder, data)
    if encoder is None and protocol.kind not in ("knn", "logistic"):
        raise ValueError(f"protocol {protocol.name}: {protocol.kind} needs an encoder; for raw pixels use knn or logistic")
    if encoder is not None and protocol.kind not in ("knn", "logistic"):  # these two copy it themselves
        encoder = copy.deepcopy(encoder)
    if encoder is not None and protocol.kind != "classify":
        encoder = as_encoder(encoder, data.channels, size)
    with ExitStack() as stack:
        if run is None:
            directory = Path(stack.enter_context(TemporaryDirectory())) / protocol.name
            run = stack.enter_context(Run(directory, {}, fabric.device, main=fabric.is_global_zero))
        training = {"compile": compile, "checkpoint_seconds": checkpoint_seconds}
        workers = default_workers() if workers is None else workers
        evaluation = _Evaluation(data, protocol, seed, size, batch_size, fabric, workers, run, cache, training)
        return getattr(evaluation, protocol.kind)(encoder)


def labelled_images(protocol: Protocol, train: Split, seed: int) -> Split:
    """The training images that a protocol uses with their labels, drawn with its `label_seed` or else with `seed`.

    Raises DataError if there are too few, or if a list does not fit.
    """
    if protocol.labels_per_class is not None:
        return train.per_class(protocol.labels_per_class, protocol.draw_seed(seed))
    if protocol.label_fraction is not None:
        return train.balanced(protocol.label_fraction, protocol.draw_seed(seed))
    if protocol.label_list is not None:
        return train.listed(Path(protocol.label_list))
    return train


@dataclass
class _Evaluation:
    """State shared by all kinds of protocols. Each kind is a method that takes an encoder and returns results."""

    data: Data
    protocol: Protocol
    seed: int
    image_size: tuple[int, int]
    batch_size: int
    fabric: Fabric
    workers: int
    run: Run
    cache: Path | None
    training: dict[str, Any]

    def __post_init__(self) -> None:
        self.labelled = labelled_images(self.protocol, self.data.train, self.seed)
        self.begun = time.perf_counter()

    def finetune(self, encoder: ViT | TokenEncoder) -> list[Result]:
        protocol = self.protocol
        model = Classifier(encoder, self.data.classes, protocol)
        train = self.loader(self.labelled, protocol.stage, protocol.training.augmentation)
        patch = patch_size(encoder) if protocol.shuffle_test else None  # some encoders are refused, before they are trained
        model, hours = fit(self.run, self.fabric, model, protocol.training, train, self.seed, **self.training)
        test = self.loader(self.data.val, protocol.stage)
        tests: dict[str, Batches] = {} if patch is None else {"_shuffled": ShuffledPatches(test, patch)}
        results, settings = [], self.settings(pool=protocol.pool)
        for part, images in (tests | {"": test}).items():
            found: dict = accuracy(self.fabric, model, images)
            results.append(Result(protocol.name + part, settings=settings, hours=hours, **found))
            if part:
                self.run.say(f"{self.run.directory.name} {protocol.name}{part}: top1 {found['top1']:.6g}")
        return results

    def linear(self, encoder: ViT | TokenEncoder) -> list[Result]:
        """Train the whole grid at once, on cached features if every epoch has the same images.

        The best of a grid is chosen on held-out labelled images, or with choose_on="test" on the test images.
        """
        protocol = self.protocol
        model = LinearProbe(encoder, self.data.classes, protocol)
        train_N, held_N = hold_out(protocol, self.labelled.labels, self.seed)
        train_images = self.loader(self.labelled.subset(train_N), protocol.stage, protocol.training.augmentation)
        test_images = self.loader(self.data.val, protocol.stage)
        held_images = self.loader(self.labelled.subset(held_N), protocol.stage) if len(held_N) else None
        train: Batches = train_images
        test: Batches = test_images
        held: Batches | None = held_images
        if can_cache(protocol):
            (feature_ND, target_N), found = self.features(encoder)
            train, test = FeatureLoader(train_images, (feature_ND[train_N], target_N[train_N])), FeatureLoader(test_images, found)
            held = FeatureLoader(held_images, (feature_ND[held_N], target_N[held_N])) if held_images is not None else None
        model, hours = fit(self.run, self.fabric, model, protocol.training, train, self.seed, **self.training)
        grid = (len(model.grid),)
        top1_G, top5_G = accuracies(self.fabric, model, test, grid).tolist()
        held_top1_G: list[Any] = [None] * len(top1_G) if held is None else accuracies(self.fabric, model, held, grid)[0].tolist()
        facts = self.settings(pool=protocol.pool, **({} if held is None else {"held_out": len(held_N)}))
        results = [
            Result(protocol.name, top1, f"{name} {facts}", hours, top5, held_top1)
            for name, top1, top5, held_top1 in zip(model.names(), top1_G, top5_G, held_top1_G, strict=True)
        ]
        for result in results:
            chosen_by = "" if held is None else f" ({result.held_out_top1:.6g} on the {len(held_N)} images held out)"
            self.run.say(f"{self.run.directory.name} {result.settings}: top1 {result.top1:.6g}{chosen_by}")
        best = model.best(top1_G if held is None else held_top1_G)
        chosen = [replace(results[place], protocol=protocol.name + part) for part, place in best.items()]
        return [*chosen[:-1], replace(chosen[-1], grid=tuple(results))]

    def logistic(self, encoder: ViT | TokenEncoder | None) -> list[Result]:
        options: dict = {"statistics": self.protocol.statistics, "l2": self.protocol.l2}
        train, test = self.features(encoder)
        found: dict = once(self.fabric, lambda: logistic_accuracy(*train, *test, classes=self.data.classes, **options))
        if not found["converged"]:
            self.run.say(f"{self.run.directory.name}: the solver has not converged; the accuracy is that of its last iteration")
        return [Result(self.protocol.name, settings=self.settings(**self.frozen(encoder), **options), hours=self.hours(), **found)]

    def knn(self, encoder: ViT | TokenEncoder | None) -> list[Result]:
        options: dict = {"neighbours": self.protocol.neighbours, "temperature": self.protocol.temperature}
        train, test = self.features(encoder)
        top1 = once(self.fabric, lambda: knn_accuracy(*train, *test, classes=self.data.classes, **options))
        return [Result(self.protocol.name, top1, self.settings(**self.frozen(encoder), **options), self.hours())]

    def location(self, encoder: ViT | TokenEncoder) -> list[Result]:
        """Fit a classifier of cells for each block on all tokens of some training images; test it on those of some test images."""
        protocol, probe = self.protocol, LocationProbe(encoder)
        key = protocol.draw_seed(self.seed)
        train, test = (drawn(split, protocol.images, key, part) for part, split in enumerate((self.labelled, self.data.val)))
        converged_L = probe.fit(self.fabric, lambda: self.loader(train, alone=True), protocol.l2)
        found = accuracies(self.fabric, probe, CellLoader(self.loader(test), probe.cells), (probe.depth,)).T.tolist()
        facts = {"images": len(train), "tokens": len(train) * probe.cells, "test_tokens": len(test) * probe.cells}
        settings = self.settings(**facts, l2=protocol.l2, chance=f"{100 / probe.cells:.4g}")
        hours, results = self.hours(), []
        for block, ((top1, top5), converged) in enumerate(zip(found, converged_L, strict=True), 1):
            results.append(Result(f"{protocol.name}_{block}", top1, settings, hours, top5, converged=converged))
            doubt = "" if converged else "; the solver has not converged"
            self.run.say(f"{self.run.directory.name} block {block} of {probe.depth}: top1 {top1:.6g} of the cells{doubt}")
        return results

    def classify(self, classifier: nn.Module) -> list[Result]:
        model = _Logits(classifier.to(self.fabric.device), self.data.classes)
        found: dict = accuracy(self.fabric, model, self.loader(self.data.val))
        return [Result(self.protocol.name, settings=self.settings(), hours=self.hours(), **found)]

    def features(self, encoder: ViT | TokenEncoder | None) -> list[tuple[Tensor, Tensor]]:
        """Features (N, D) and classes (N,) of the labelled training images, and of the test images."""
        found = []
        for part, split in ("train", self.labelled), ("val", self.data.val):
            cache = self.cache and self.cache.with_name(f"{self.cache.name}-{part}")
            found.append(features(self.fabric, encoder, self.loader(split), self.protocol.pool, max(self.protocol.layers), cache))
        return found

    def loader(
        self, split: Split, stage: TrainConfig | None = None, augmentation: Augmentation | None = None, alone: bool = False
    ) -> Loader:
        """Create a Loader for this process, with the micro-batches of a training stage or with batches of `batch_size` images.

        With `alone` it loads all images, else this process's share of them.
        """
        stage = stage or TrainConfig(
            epochs=1, batch_size=self.batch_size * self.fabric.world_size, base_lr=0.0, device_batch=self.batch_size
        )
        view: dict = {"resize": self.protocol.resize, "interpolation": self.protocol.interpolation}
        options: dict = {"data": self.data, "image_size": self.image_size, "seed": self.seed, "workers": self.workers}
        return make_loader(self.fabric, split, stage, augmentation, alone=alone, **options, **view)

    def frozen(self, encoder: nn.Module | None) -> dict[str, str]:
        """Settings for reading a frozen encoder."""
        return {} if encoder is None else {"layers": layers_name(self.protocol.layers[0]), "pool": self.protocol.pool}

    def settings(self, **facts: Any) -> str:
        """`facts`, the resizing of the images, the number of labels and the seed of their draw, as one string."""
        if self.data.val.images is None:
            resize = view_name(self.data, self.image_size, self.protocol.resize)
            facts |= {"resize": resize, "interpolation": self.protocol.interpolation}
        if len(self.labelled) < len(self.data.train):
            facts["labels"] = len(self.labelled)
        if self.protocol.label_seed is not None:
            facts["label_seed"] = self.protocol.label_seed
        return " ".join(f"{name}={value}" for name, value in facts.items())

    def hours(self) -> float:
        return (time.perf_counter() - self.begun) / 3600


class _Logits(nn.Module):
    """A classifier with a check that it returns logits (B, K) for the classes of the data."""

    def __init__(self, module: nn.Module, classes: int):
        super().__init__()
        self.module, self.classes = module, classes

    def forward(self, images: Tensor) -> Output:
        answer = self.module(images)
        logits_BK = answer.named["logits"] if isinstance(answer, Output) else answer
        if not isinstance(logits_BK, Tensor) or logits_BK.shape != (len(images), self.classes):
            given = tuple(logits_BK.shape) if isinstance(logits_BK, Tensor) else type(logits_BK).__name__
            wanted = f"logits of shape {(len(images), self.classes)}"
            raise ValueError(f"a classifier of {self.classes} classes must return {wanted}; {type(self.module).__name__} returns {given}")
        return Output(logits_BK.new_zeros(()), named={"logits": logits_BK})
