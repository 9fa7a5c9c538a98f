"""Large-scale jitter (LSJ), with which ViTDet trains. As in common.data.loaders, its draws depend only on (seed, epoch, image).

Shapes: B images of a micro-batch, K objects of an image, S pixels of a side of the square input, H x W pixels of an image.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.detection.data import Detections
from common.data import DataError
from common.data.augment import normalize
from common.data.loaders import AUGMENTATION, Schedule, training_order
from common.data.workers import make_workers, worker_batches
from common.randomness import reseed_cpu

SCALES = (0.1, 2.0)  # of LSJ (Ghiasi et al. 2021, arXiv 2012.07177), relative to an image that fits the input
Target = dict[str, Any]


def fitted(image: Image.Image, size: int, colour: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The image with `size` pixels on its longer side, in the upper left corner of a square (3, S, S) uint8, and its (height, width)."""
    scale = size / max(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    square = colour[:, None, None].repeat(1, size, size)
    square[:, :height, :width] = _pixels(image.resize((width, height), Image.Resampling.BILINEAR))
    return square, (height, width)


def mean_colour(mean: tuple[float, ...]) -> Tensor:
    """The colour outside images, (3,) uint8: zero after normalisation."""
    return (255 * torch.tensor(mean)).round().to(torch.uint8)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def jitter(image: Image.Image, masks_KHW: numpy.ndarray, classes_K: numpy.ndarray, size: int, colour: Tensor) -> tuple[Tensor, Target]:
    """Large-scale jitter: scale the image by 0.1 to 2 of what fits, crop or pad it to a square of `size` pixels, flip half of them.

    Draws from torch's global generator. Returns pixels (3, S, S) uint8 and the target: boxes (K, 4) int64, as left, top, right, bottom of
    what is visible of the masks; labels (K,) int64 from 1 up; masks (K, S, S) uint8; size, the (height, width) of what is not padding.
    Objects of which no pixel is left are not in it.
    """
    factor, right, down, flip = torch.rand(4).tolist()
    scale = size / max(image.size) * (SCALES[0] + (SCALES[1] - SCALES[0]) * factor)
    width, height = (max(1, round(scale * side)) for side in image.size)
    inner = min(size, width), min(size, height)
    left, top = round(right * (width - inner[0])), round(down * (height - inner[1]))
    # the part of the image that is visible, in its own pixels
    across, along = image.width / width, image.height / height
    ends = min(image.width, (left + inner[0]) * across), min(image.height, (top + inner[1]) * along)
    box = (left * across, top * along, *ends)
    square = colour[:, None, None].repeat(1, size, size)
    square[:, : inner[1], : inner[0]] = _pixels(image.resize(inner, Image.Resampling.BILINEAR, box=box))
    masks_KSS = torch.zeros(len(masks_KHW), size, size, dtype=torch.uint8)
    for place, mask_HW in zip(masks_KSS, masks_KHW, strict=True):
        place[: inner[1], : inner[0]] = torch.from_numpy(
            numpy.array(Image.fromarray(mask_HW).resize(inner, Image.Resampling.NEAREST, box=box))
        )
    if flip < 0.5:  # only the image within the square is mirrored, so that the padding stays to the right
        square[:, :, : inner[0]] = square[:, :, : inner[0]].flip(2)
        masks_KSS[:, :, : inner[0]] = masks_KSS[:, :, : inner[0]].flip(2)
    seen_K = masks_KSS.flatten(1).bool().any(1)
    masks_KSS = masks_KSS[seen_K]
    labels_K = torch.from_numpy(classes_K)[seen_K] + 1
    return square, {"boxes": boxes_of(masks_KSS), "labels": labels_K, "masks": masks_KSS, "size": (inner[1], inner[0])}


def boxes_of(masks_KHW: Tensor) -> Tensor:
    """The smallest boxes (K, 4) int64 around masks that are not empty: left, top, right, bottom, where pixel 0 is from 0 to 1."""
    ends = []
    for line in (masks_KHW.any(1), masks_KHW.any(2)):  # columns, rows
        first = line.float().argmax(1)
        last = line.shape[1] - line.flip(1).float().argmax(1)
        ends.append((first, last))
    return torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], 1)


@dataclass(eq=False)
class Crops:
    """The micro-batches of the training images for one rank. Raises DataError for fewer images than one effective batch."""

    data: Detections
    _: KW_ONLY
    size: int  # side of the input in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int  # images of a micro-batch on one device
    seed: int
    device: torch.device
    workers: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1  # micro-batches per optimizer step

    def __post_init__(self) -> None:
        self.effective = self.batch_size * self.accumulate * self.world_size
        if len(self.data.train) < self.effective:
            raise DataError(f"{len(self.data.train)} training images are fewer than a batch of {self.effective}: lower BATCH")
        self.schedule = Schedule()
        self.loader = make_workers(
            _Crops(self.data, self.size, self.mean, self.seed),
            self.workers,
            batch_sampler=self.schedule,
            persistent_workers=self.workers > 0,
            collate_fn=_collate,
        )

    def __len__(self) -> int:
        return len(self.data.train) // self.effective * self.accumulate

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Yield normalised images (B, 3, S, S) float32 and their targets, as `jitter` returns them, on the device, from `start` on."""
        row_E = training_order(len(self.data.train), self.effective, self.seed, epoch)
        self.schedule.epoch = epoch
        self.schedule.batches = list(row_E.view(-1, self.world_size, self.batch_size)[:, self.rank])[start:]
        for images, targets in worker_batches(self.loader):
            moved = [{key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in own.items()} for own in targets]
            yield normalize(images.to(self.device), self.mean, self.std), moved


def _collate(found: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    return torch.stack([image for image, _ in found]), [target for _, target in found]


class _Crops(Dataset):
    """(epoch, image) -> what `jitter` returns. The draws depend only on (seed, epoch, image)."""

    def __init__(self, data: Detections, size: int, mean: tuple[float, ...], seed: int) -> None:
        self.data, self.size, self.colour, self.seed = data, size, mean_colour(mean), seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        epoch, index = key
        reseed_cpu(self.seed, epoch, index, AUGMENTATION)
        photo = self.data.train[index]
        return jitter(self.data.read(photo), *self.data.target(photo), self.size, self.colour)
