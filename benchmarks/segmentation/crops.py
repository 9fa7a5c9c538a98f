"""Random crops of images with their masks, for training. As in common.data.loaders, their draws depend only on (seed, epoch, image).

The augmentation is that of mmsegmentation's configurations of ADE20K: scale 0.5 to 2, a random crop in which no class has more than three
quarters of the pixels, a horizontal flip, and photometric distortion.

Shapes: B images of a micro-batch, H x W pixels of a crop.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import RandomPhotometricDistort

from benchmarks.segmentation.data import IGNORED, Scenes
from common.data import DataError
from common.data.augment import normalize
from common.data.loaders import AUGMENTATION, Schedule, training_order
from common.data.workers import make_workers, worker_batches
from common.randomness import reseed_cpu

SCALES = (0.5, 2.0)
MOST, TRIES = 0.75, 10  # the largest share of one class in a crop, and how often another crop is tried


@dataclass(eq=False)
class Crops:
    """The micro-batches of the training images for one rank. Raises DataError for fewer images than one effective batch."""

    scenes: Scenes
    _: KW_ONLY
    size: tuple[int, int]  # (height, width) of a crop in pixels
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
        if len(self.scenes.train) < self.effective:
            raise DataError(f"{len(self.scenes.train)} training images are fewer than a batch of {self.effective}: lower BATCH")
        self.schedule = Schedule()
        self.loader = make_workers(
            _Crops(self),
            self.workers,
            batch_sampler=self.schedule,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self.scenes.train) // self.effective * self.accumulate

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, 3, H, W) float32 and classes (B, H, W) uint8 on the device, from micro-batch `start` on."""
        row_E = training_order(len(self.scenes.train), self.effective, self.seed, epoch)
        self.schedule.epoch = epoch
        self.schedule.batches = list(row_E.view(-1, self.world_size, self.batch_size)[:, self.rank])[start:]
        for images, classes in worker_batches(self.loader):
            yield normalize(images.to(self.device, non_blocking=True), self.mean, self.std), classes.to(self.device, non_blocking=True)


class _Crops(Dataset):
    """(epoch, image) -> uint8 crop (3, H, W) and its classes (H, W). Outside the image it has the mean colour and no class."""

    def __init__(self, crops: Crops) -> None:
        self.scenes, self.size, self.seed = crops.scenes, crops.size, crops.seed
        self.colour = (255 * torch.tensor(crops.mean)).round().to(torch.uint8)
        self.distort = RandomPhotometricDistort(contrast=(0.5, 1.5), saturation=(0.5, 1.5))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        reseed_cpu(self.seed, epoch, index, AUGMENTATION)
        image, class_HW = self.scenes.pair(self.scenes.train, index)
        scale = self._scale(image)
        for _ in range(TRIES):
            box = self._box(image, scale)
            left, top, right, bottom = map(round, box)
            count_K = numpy.bincount(class_HW[top:bottom, left:right].ravel(), minlength=IGNORED + 1)[:IGNORED]
            if count_K.max() <= MOST * count_K.sum():
                break
        width, height = (min(own, round(scale * (box[end + 2] - box[end]))) for end, own in enumerate(self.size[::-1]))
        pixels_HWC = numpy.array(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
        part_HW = numpy.array(Image.fromarray(class_HW).resize((width, height), Image.Resampling.NEAREST, box=box))
        crop, classes = self.colour[:, None, None].repeat(1, *self.size), torch.full(self.size, IGNORED, dtype=torch.uint8)
        crop[:, :height, :width] = self.distort(torch.from_numpy(pixels_HWC).permute(2, 0, 1))
        classes[:height, :width] = torch.from_numpy(part_HW)
        return (crop.flip(2), classes.flip(1)) if torch.rand(()) < 0.5 else (crop, classes)

    def _scale(self, image: Image.Image) -> float:
        """How much the image is enlarged."""
        base = 1.0 if self.scenes.short_side is None else self.scenes.short_side / min(image.size)
        return base * (SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(()).item())

    def _box(self, image: Image.Image, scale: float) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a crop in pixels of the image: the whole of a side that is shorter than the crop."""
        sides = [min(crop / scale, own) for crop, own in zip(self.size[::-1], image.size, strict=True)]
        left, top = ((own - side) * torch.rand(()).item() for side, own in zip(sides, image.size, strict=True))
        return left, top, min(left + sides[0], image.width), min(top + sides[1], image.height)
