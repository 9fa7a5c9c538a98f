"""ENGINE=torchvision: Mask R-CNN on the pyramid of ViTDet, trained by common.train.fit and scored by pycocotools.

Shapes: B images, S pixels of a side of the square input, K objects of an image, H x W pixels of an image.
"""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import numpy
import torch
import torchvision
from lightning.fabric import Fabric
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

import benchmarks.detection.operators  # noqa: F401  where torchvision's own do not load
from benchmarks.detection.crops import Crops, fitted, mean_colour
from benchmarks.detection.data import Detections, Photo
from benchmarks.detection.vitdet import LEVELS, SimpleFeaturePyramid
from common.data.augment import normalize
from common.method import Output
from common.randomness import reseed
from common.recipe import TrainConfig
from common.run import Run
from common.train import device_batch, fit

METRICS = ("ap_box", "ap50_box", "ap_mask", "ap50_mask")
SHAPES = (0.5, 1.0, 2.0)  # height / width of the anchors


class Detector(nn.Module):
    """Mask R-CNN with the heads of ViTDet: two convolutions in the RPN, four and a linear layer for boxes, four for masks, LayerNorms."""

    def __init__(self, backbone: SimpleFeaturePyramid, classes: int):
        super().__init__()
        self.backbone, C = backbone, backbone.out_channels
        anchors = AnchorGenerator(tuple((32 * 2**level,) for level in range(len(LEVELS))), (SHAPES,) * len(LEVELS))
        counts: dict = {
            "pre_nms_top_n": {"training": 2000, "testing": 1000},
            "post_nms_top_n": {"training": 1000, "testing": 1000},
        }
        samples: dict = {"batch_size_per_image": 256, "positive_fraction": 0.5}
        limits: dict = {"fg_iou_thresh": 0.7, "bg_iou_thresh": 0.3, "nms_thresh": 0.7}
        self.rpn = RegionProposalNetwork(anchors, _RPNHead(C, len(SHAPES), conv_depth=2), **counts, **samples, **limits)
        self.roi_heads = roi_heads.RoIHeads(
            torchvision.ops.MultiScaleRoIAlign(LEVELS[:4], output_size=7, sampling_ratio=2),
            FastRCNNConvFCHead((C, 7, 7), [C] * 4, [4 * C], norm_layer=LayerNorm2d),
            _BoxPredictor(4 * C, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=torchvision.ops.MultiScaleRoIAlign(LEVELS[:4], output_size=14, sampling_ratio=2),
            mask_head=MaskRCNNHeads(C, [C] * 4, 1, norm_layer=LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(C, C, classes + 1),
        )

    def forward(self, images: Tensor, targets: list[dict[str, Any]]) -> Output:
        """images (B, 3, S, S), normalised; targets as `crops.jitter` returns them. The loss is the sum of the five of Mask R-CNN.

        In evaluation only the `size` of the targets is used, and `named["found"]` has, for each image, boxes (K, 4), scores (K,), labels
        (K,) and masks (K, 1, 28, 28) within the boxes.
        """
        maps = {name: level.float() for name, level in self.backbone(images).items()}
        # boxes come as whole pixels, because bf16-mixed would round them
        given = [{**own, "boxes": own["boxes"].float()} for own in targets] if self.training else None
        proposals, losses = self.rpn(ImageList(images, [own["size"] for own in targets]), maps, given)
        square = [(images.shape[2], images.shape[3])] * len(images)  # the strides of the maps are computed from it
        found, more = self.roi_heads(maps, proposals, square, given)
        if not self.training:
            return Output(images.new_zeros(()), named={"found": found})
        losses |= more
        return Output(torch.stack([loss.float() for loss in losses.values()]).sum(), {name: loss.detach() for name, loss in losses.items()})

    def no_weight_decay(self) -> set[str]:
        return {"backbone.net.pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """For timm's layer decay: layer 0 is the stem, layer i + 1 is block i with its relative positions, the rest is the head."""
        return {"stem": r"^backbone\.net\.(?:pos_embed|patch_embed)", "blocks": [(r"^backbone\.net\.(?:blocks|relative)\.(\d+)", None)]}


class _RPNHead(RPNHead):
    """Results are float32 under autocast too: boxes of 1000 pixels need it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, boxes = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in boxes]


class _BoxPredictor(FastRCNNPredictor):
    """Results are float32 under autocast too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = super().forward(x)
        return scores.float(), boxes.float()


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
) -> tuple[Detector, float]:
    """Train on squares of `size` pixels. Returns the model and the hours."""
    batch = device_batch(stage, fabric.world_size)
    crops = Crops(
        data,
        size=size,
        mean=mean,
        std=std,
        batch_size=batch,
        seed=seed,
        device=fabric.device,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        accumulate=stage.batch_size // (batch * fabric.world_size),
    )
    reseed(seed, 1)  # every encoder gets the same heads
    return fit(run, fabric, Detector(backbone, len(data.classes)), stage, crops, seed, checkpoint_seconds=checkpoint_seconds)


@torch.no_grad()
def detect(
    fabric: Fabric, model: Detector, data: Detections, photo: Photo, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> list[dict]:
    """The objects that a model finds in an image, in COCO's format for results: category, score, box and mask in the image's own pixels."""
    pixels, inside = fitted(data.read(photo), size, mean_colour(mean))
    images = normalize(pixels[None].to(fabric.device), mean, std)
    with fabric.autocast():
        found = model(images, [{"size": inside}]).named["found"][0]
    ratio = torch.tensor([photo.width / inside[1], photo.height / inside[0]] * 2)
    boxes_K4 = torchvision.ops.clip_boxes_to_image(found["boxes"].float().cpu() * ratio, (photo.height, photo.width))
    results = []
    for box, score, label, mask in zip(boxes_K4, found["scores"].tolist(), found["labels"].tolist(), found["masks"].cpu(), strict=True):
        left, top, right, bottom = box.tolist()
        whole_HW = roi_heads.paste_masks_in_image(mask[None].float(), box[None], (photo.height, photo.width))[0, 0] > 0.5
        runs = coco_mask.encode(numpy.asfortranarray(whole_HW.numpy().astype(numpy.uint8)))
        shape = {"size": runs["size"], "counts": runs["counts"].decode()}
        place = {"image_id": photo.number, "category_id": data.categories[label - 1], "score": score}
        results.append({**place, "bbox": [left, top, right - left, bottom - top], "segmentation": shape})
    return results


def evaluate(
    fabric: Fabric, model: Detector, data: Detections, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, float]:
    """METRICS on the validation images, in percent; each process has a part of them."""
    model.eval()
    mine = data.val[fabric.global_rank :: fabric.world_size]
    results = [found for photo in mine for found in detect(fabric, model, data, photo, size, mean, std)]
    if fabric.world_size > 1:
        parts: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(parts, results)
        results = [found for part in parts for found in part]
    return score(data.truth(), results)


def score(truth: COCO, results: Iterable[dict]) -> dict[str, float]:
    """METRICS in percent, of results in COCO's format: AP is the mean over IoU from 0.5 to 0.95. Without results all are 0."""
    found = list(results)
    if not found:
        return dict.fromkeys(METRICS, 0.0)
    values: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):
        for kind in ("bbox", "segm"):
            # loadRes changes what it gets: for boxes it would replace the masks
            chosen = [{**own} if kind == "segm" else {key: own[key] for key in own if key != "segmentation"} for own in found]
            evaluation = COCOeval(truth, truth.loadRes(chosen), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values += [100 * float(evaluation.stats[place]) for place in (0, 1)]
    return dict(zip(METRICS, values, strict=True))
