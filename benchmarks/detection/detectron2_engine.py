"""ENGINE=detectron2: the same backbone in detectron2's Mask R-CNN, with ViTDet's LazyConfig (base and large: 100 epochs of 64 images).

Importing this module needs detectron2. Its training resumes from its own checkpoint; draws depend on (seed, step) and (seed, epoch, image).
"""

import re
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

import benchmarks.detection.operators  # noqa: F401  before detectron2 is imported, which takes torchvision's

# isort: split
import detectron2.data.transforms as transforms
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetMapper
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.solver import WarmupParamScheduler
from detectron2.structures import BoxMode
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig, OmegaConf
from pycocotools import mask as coco_mask

from benchmarks.detection.crops import SCALES, fitted, mean_colour
from benchmarks.detection.data import Detections, Photo, detectron2_mask, trained
from benchmarks.detection.torchvision_engine import score
from benchmarks.detection.vitdet import LEVELS, PATCH, SimpleFeaturePyramid
from common.data.loaders import AUGMENTATION, Schedule, training_order
from common.data.workers import make_workers, worker_batches
from common.randomness import reseed, reseed_cpu
from common.recipe import TrainConfig
from common.run import Run
from common.stopping import Stopped, finish_first, stop_requested

LOG_EVERY = 50  # steps


class Pyramid(Backbone):
    """A SimpleFeaturePyramid as detectron2 wants it: it pads images to a square of `size` pixels."""

    def __init__(self, pyramid: SimpleFeaturePyramid, size: int):
        super().__init__()
        self.pyramid, self.size = pyramid, size
        self._out_features = list(LEVELS)
        self._out_feature_channels = dict.fromkeys(LEVELS, pyramid.out_channels)
        self._out_feature_strides = {name: 4 * 2**level for level, name in enumerate(LEVELS)}

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        return self.pyramid(images_BCHW)

    @property
    def size_divisibility(self) -> int:
        return PATCH

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self.size}


def config(
    backbone: SimpleFeaturePyramid,
    data: Detections,
    stage: TrainConfig,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    workers: int,
) -> DictConfig:
    """The LazyConfig: model, optimizer, lr_multiplier, dataloader and max_iter, from detectron2's for ViTDet (mask_rcnn_vitdet.py).

    The schedule, the rates and the layer decay are those of the stage, the backbone is ours, and the images are those of the data.
    """
    found = OmegaConf.create(flags={"allow_objects": True})
    C, L = backbone.out_channels, LazyCall
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    model.backbone = L(Pyramid)(pyramid=backbone, size=size)
    model.pixel_mean, model.pixel_std = [255 * value for value in mean], [255 * value for value in std]
    model.proposal_generator.head.in_channels = C
    model.roi_heads.num_classes = len(data.classes)
    model.roi_heads.box_head.input_shape = L(ShapeSpec)(channels=C, width=7, height=7)
    model.roi_heads.box_head.conv_dims, model.roi_heads.box_head.fc_dims = [C] * 4, [4 * C]
    model.roi_heads.box_predictor.input_shape = L(ShapeSpec)(channels=4 * C)
    model.roi_heads.mask_head.input_shape = L(ShapeSpec)(channels=C, width=14, height=14)
    model.roi_heads.mask_head.conv_dims = [C] * 5
    found.model = model

    steps = stage.epochs * (len(data.train) // stage.batch_size)
    found.max_iter = steps
    ends = [milestone * steps // stage.epochs for milestone in stage.milestones if milestone < stage.epochs]
    values = [0.1**count for count in range(len(ends) + 1)]
    warmup = min(int(stage.warmup_epochs * steps / stage.epochs), steps // 2)
    found.lr_multiplier = L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=values, milestones=ends, num_updates=steps),
        warmup_length=warmup / steps,
        warmup_factor=stage.warmup_lr / stage.lr,
    )
    found.optimizer = model_zoo.get_config("common/optim.py").AdamW
    found.optimizer.lr, found.optimizer.weight_decay = stage.lr, stage.weight_decay
    depth = len(backbone.net.blocks)
    found.optimizer.params.lr_factor_func = partial(rate_factor, depth=depth, decay=stage.layer_decay or 1.0)
    found.optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}

    jitter = [
        L(transforms.RandomFlip)(horizontal=True),
        L(transforms.ResizeScale)(min_scale=SCALES[0], max_scale=SCALES[1], target_height=size, target_width=size),
        L(transforms.FixedSizeCrop)(crop_size=(size, size), pad=False),
    ]
    mapper = L(DatasetMapper)(
        is_train=True,
        augmentations=jitter,
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        recompute_boxes=True,
    )
    # `records` is a function, because a list would be converted to a configuration, entry by entry
    found.dataloader = L(Batches)(records=partial(records, data), mapper=mapper, batch=stage.batch_size, seed=seed, workers=workers)
    return found


def rate_factor(name: str, depth: int, decay: float) -> float:
    """The factor on the learning rate of a parameter: one of `decay` for each layer above it, as of the torchvision engine."""
    layer = depth + 1
    if re.match(r"backbone\.pyramid\.net\.(pos_embed|patch_embed)", name):
        layer = 0
    elif block := re.match(r"backbone\.pyramid\.net\.(?:blocks|relative)\.(\d+)", name):
        layer = int(block[1]) + 1
    return decay ** (depth + 1 - layer)


def records(data: Detections) -> list[dict]:
    """The training images and their objects in detectron2's format."""
    place = {category: index for index, category in enumerate(data.categories)}
    found = []
    for photo in data.train:
        objects = [
            {
                "bbox": own["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": place[own["category_id"]],
                "segmentation": detectron2_mask(own, photo.height, photo.width),
                "iscrowd": 0,
            }
            for own in photo.objects
            if trained(own, photo)
        ]
        size = {"height": photo.height, "width": photo.width}
        found.append({"file_name": photo.path, "image_id": photo.number, "annotations": objects, **size})
    return found


class Batches:
    """Whole batches of detectron2's mapper without end, from step `first` on. Their draws depend only on (seed, epoch, image).

    The workers are those of this repository, because detectron2's are ended by the signal that stops a run.
    """

    def __init__(self, records: Callable[[], list[dict]], mapper: DatasetMapper, batch: int, seed: int, workers: int):
        self.records, self.mapper, self.batch, self.seed, self.first = records(), mapper, batch, seed, 0
        self.schedule = Schedule()
        options: dict = {"batch_sampler": self.schedule, "persistent_workers": workers > 0, "collate_fn": list}
        self.loader = make_workers(_Mapped(self.records, mapper, seed), workers, **options)

    def __iter__(self) -> Iterator[list[dict]]:
        epoch, start = divmod(self.first, len(self.records) // self.batch)
        while True:
            row_E = training_order(len(self.records), self.batch, self.seed, epoch)
            self.schedule.epoch, self.schedule.batches = epoch, list(row_E.view(-1, self.batch))[start:]
            yield from worker_batches(self.loader)
            epoch, start = epoch + 1, 0


class _Mapped(Dataset):
    """(epoch, image) -> what the mapper makes of its record."""

    def __init__(self, records: list[dict], mapper: DatasetMapper, seed: int):
        self.records, self.mapper, self.seed = records, mapper, seed

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        reseed_cpu(self.seed, epoch, index, AUGMENTATION)
        return self.mapper(self.records[index])  # which copies it


class _Keeper(HookBase):
    """Writes metrics and checkpoints, and ends the training after a signal. `begun`: as if the training had never been stopped."""

    def __init__(self, run: Run, checkpointer: DetectionCheckpointer, seconds: float, seed: int):
        self.run, self.checkpointer, self.seconds, self.seed = run, checkpointer, seconds, seed
        self.begun = self.saved = time.perf_counter()
        self.save_seconds = 0.0

    @property
    def hours(self) -> float:
        return (time.perf_counter() - self.begun) / 3600

    def before_step(self) -> None:
        reseed(self.seed, self.trainer.iter)

    def after_step(self) -> None:
        step, last = self.trainer.iter + 1, self.trainer.max_iter
        if step % LOG_EVERY == 0 or step == last:
            latest = {name: value for name, (value, _) in self.trainer.storage.latest().items() if "loss" in name}
            self.run.record(step, latest)
            self.run.say(f"step {step}/{last}, loss {latest.get('total_loss', float('nan')):.4g}")
        stopping = stop_requested()
        begun = time.perf_counter()
        if stopping or step == last or begun - self.saved > max(self.seconds, 50 * self.save_seconds):  # as in common.train.fit
            self.checkpointer.save("last", hours=self.hours)
            self.saved, self.save_seconds = time.perf_counter(), time.perf_counter() - begun
        if stopping and step < last:
            self.run.say(f"stopped by a signal after step {step} of {last}; checkpoint saved, the same command resumes from here")
            raise Stopped


def train(
    fabric: Fabric,
    run: Run,
    backbone: SimpleFeaturePyramid,
    data: Detections,
    stage: TrainConfig,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    workers: int,
    checkpoint_seconds: float,
) -> tuple[nn.Module, float]:
    """Train by detectron2's loop. Returns the model and the hours."""
    reseed(seed, 1)  # every encoder gets the same heads
    lazy = config(backbone, data, stage, size=size, mean=mean, std=std, seed=seed, workers=workers)
    model = instantiate(lazy.model).to(fabric.device)
    lazy.optimizer.params.model = model
    optimizer, loader = instantiate(lazy.optimizer), instantiate(lazy.dataloader)
    if fabric.device.type == "cuda" and fabric._precision.precision != "32-true":
        trainer: SimpleTrainer = AMPTrainer(model, loader, optimizer, precision=torch.bfloat16)
    else:
        trainer = SimpleTrainer(model, loader, optimizer)
    folder = run.directory / "detectron2"
    folder.mkdir(exist_ok=True)
    checkpointer = DetectionCheckpointer(model, str(folder), trainer=trainer)
    keeper = _Keeper(run, checkpointer, checkpoint_seconds, seed)
    trainer.register_hooks([hooks.LRScheduler(scheduler=instantiate(lazy.lr_multiplier)), keeper])
    started = checkpointer.has_checkpoint()
    if started:
        keeper.begun -= 3600 * checkpointer.resume_or_load("", resume=True)["hours"]
    model.train()
    first = loader.first = trainer.iter + 1 if started else 0
    if started:
        run.say(f"resuming from step {first} of {lazy.max_iter}")
    run.forget_after(first)
    with finish_first():
        if first < lazy.max_iter:
            trainer.train(first, lazy.max_iter)
    return model, keeper.hours


@torch.no_grad()
def detect(model: nn.Module, data: Detections, photo: Photo, size: int) -> list[dict]:
    """The objects that a model finds in an image, in COCO's format for results."""
    pixels, (height, width) = fitted(data.read(photo), size, mean_colour((0.0, 0.0, 0.0)))
    found = model([{"image": pixels[:, :height, :width].float(), "height": photo.height, "width": photo.width}])[0]["instances"].to("cpu")
    results = []
    for box, value, place, mask_HW in zip(
        found.pred_boxes.tensor.tolist(), found.scores, found.pred_classes, found.pred_masks, strict=True
    ):
        runs = coco_mask.encode(numpy.asfortranarray(mask_HW.numpy().astype(numpy.uint8)))
        left, top, right, bottom = box
        results.append(
            {
                "image_id": photo.number,
                "category_id": data.categories[int(place)],
                "score": float(value),
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
            }
        )
    return results


def evaluate(model: nn.Module, data: Detections, size: int) -> dict[str, float]:
    """METRICS of the torchvision engine on the validation images, in percent, computed in the same way."""
    model.eval()
    return score(data.truth(), [found for photo in data.val for found in detect(model, data, photo, size)])
