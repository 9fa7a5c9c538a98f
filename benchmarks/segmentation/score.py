"""Evaluation of a segmentation at the masks' own resolution: sliding windows, and intersection over union (IoU).

Shapes: H x W pixels of an image, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from benchmarks.segmentation.data import IGNORED, Scenes
from common.data.augment import normalize
from common.processes import sum_over_processes

WINDOWS = 8  # of one forward pass


@dataclass(frozen=True)
class Scores:
    """Percent of the test pixels that have a class. A class without a pixel, in the masks and in the predictions, does not count."""

    iou: tuple[float, ...]  # of each class; NaN for one without a pixel
    miou: float  # mean over the classes
    mean_accuracy: float  # mean over the classes of the share of their pixels that is found
    pixel_accuracy: float


def score(confusion_KK: Tensor) -> Scores:
    """Scores of a confusion matrix: pixels of class i that were predicted as class j."""
    confusion_KK = confusion_KK.double()
    right_K, true_K, found_K = confusion_KK.diagonal(), confusion_KK.sum(1), confusion_KK.sum(0)
    iou_K, accuracy_K = 100 * right_K / (true_K + found_K - right_K), 100 * right_K / true_K
    mean = 100 * right_K.sum() / confusion_KK.sum()
    return Scores(tuple(iou_K.tolist()), iou_K.nanmean().item(), accuracy_K.nanmean().item(), mean.item())


@torch.no_grad()
def confusion(fabric: Fabric, model: nn.Module, scenes: Scenes, view: "View") -> Tensor:
    """The confusion matrix (K, K) int64 of a model on all test images; each process has a part of them."""
    model.eval()
    count, K = torch.zeros(len(scenes.classes) ** 2, dtype=torch.int64, device=fabric.device), len(scenes.classes)
    for index in range(fabric.global_rank, len(scenes.val), fabric.world_size):
        image, class_HW = scenes.pair(scenes.val, index)
        true_HW = torch.from_numpy(class_HW).to(fabric.device).long()
        found_HW = predict(fabric, model, image, view, class_HW.shape)
        count += torch.bincount((K * true_HW + found_HW)[true_HW != IGNORED], minlength=K * K)
    return sum_over_processes(fabric, count).view(K, K)


@dataclass(frozen=True)
class View:
    """How an image is read for a model of one input size."""

    size: tuple[int, int]  # (height, width) of a window in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_side: int | None  # pixels to which the short side of an image is resized; None: it keeps its size

    def read(self, image: Image.Image, device: torch.device) -> Tensor:
        """The image (1, 3, H, W), resized and normalised, and with zeros to the right and below if it is smaller than a window."""
        if self.short_side is not None:
            scale = self.short_side / min(image.size)
            image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BILINEAR)
        pixels = normalize(torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None].to(device), self.mean, self.std)
        below, right = (max(0, side - own) for side, own in zip(self.size, pixels.shape[2:], strict=True))
        return F.pad(pixels, (0, right, 0, below))

    def read_classes(self, class_HW: numpy.ndarray, image: Image.Image) -> Tensor:
        """The mask of an image as `read` reads it, (H, W) uint8: IGNORED where there are zeros."""
        height, width = self.inside(image)
        found = torch.from_numpy(numpy.array(Image.fromarray(class_HW).resize((width, height), Image.Resampling.NEAREST)))
        return F.pad(found, (0, max(0, self.size[1] - width), 0, max(0, self.size[0] - height)), value=IGNORED)

    def inside(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) of the image in `read`, without the zeros."""
        scale = 1 if self.short_side is None else self.short_side / min(image.size)
        return round(scale * image.height), round(scale * image.width)


def predict(fabric: Fabric, model: nn.Module, image: Image.Image, view: View, size: tuple[int, ...]) -> Tensor:
    """The class of each pixel of an image, (H, W) int64 of the given size.

    The logits of overlapping windows, a third of a window apart from each other at their borders, are averaged, as in mmsegmentation.
    """
    pixels = view.read(image, fabric.device)
    boxes = list(windows(pixels.shape[2:], view.size))
    total, count = torch.zeros(()), torch.zeros(pixels.shape[2:], device=fabric.device)
    for part in (boxes[start : start + WINDOWS] for start in range(0, len(boxes), WINDOWS)):
        with fabric.autocast():
            logits = model(torch.cat([pixels[:, :, rows, columns] for rows, columns in part])).named["logits"]
        logits = F.interpolate(logits.float(), size=view.size, mode="bilinear")
        if total.ndim == 0:
            total = logits.new_zeros(logits.shape[1], *pixels.shape[2:])
        for (rows, columns), found in zip(part, logits, strict=True):
            total[:, rows, columns] += found
            count[rows, columns] += 1
    height, width = view.inside(image)
    whole = F.interpolate((total / count)[None, :, :height, :width], size=size, mode="bilinear")
    return whole[0].argmax(0)


def windows(image: tuple[int, ...], size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the windows that cover an image: two thirds of a window apart, and the last ones at the image's end."""
    starts = []
    for side, own in zip(image, size, strict=True):
        stride = own * 2 // 3
        steps = max(0, side - own + stride - 1) // stride
        starts.append([min(step * stride, side - own) for step in range(steps + 1)])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + size[0]), slice(left, left + size[1])
