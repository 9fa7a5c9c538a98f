"""Batches of a split. Their order and augmentation depend only on (seed, epoch, image, copy).

Random numbers do not depend on earlier batches, the number of workers or the batch size, so a loader has no state. To resume, start the
epoch at a later micro-batch: the batches are bit-identical to those of an uninterrupted run.

Repeated augmentation (Hoffer et al. 2020) draws an image several times per epoch, as if the split were repeated: row r is copy r // N of
image r % N, so the rows of copy 0 are the images themselves.

Shapes: N images of the split, R rows, E rows of an epoch, B rows of a micro-batch, C channels, H x W pixels, K uniform numbers.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.data.augment import DRAWS, Augmentation, augment, erase, normalize, resize, view_name, worker_transform
from common.data.images import REPLACED, any_size, read_image
from common.data.sets import Data, DataError, Split
from common.data.workers import make_workers, worker_batches
from common.randomness import generator, reseed_cpu

# last entry of the random keys; AUGMENTATION must be the largest, because copy c of an image uses AUGMENTATION + c
ORDER, AUGMENTATION = 1, 2

log = logging.getLogger(__name__)


class Batches(Protocol):
    """What a training asks of a loader: micro-batches of images and classes, epoch by epoch."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


def training_order(count: int, effective: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """The rows of an epoch of training (E,) int64: a permutation of `count` images, without the incomplete last effective batch.

    Each effective batch is cut into accumulation steps, and these into ranks. Copies of an image follow each other, so most are in the
    same effective batch. With repeats an epoch has only a part of the images, another one each time.
    """
    order_N = torch.randperm(count, generator=generator(seed, epoch, ORDER))
    place_E = torch.arange(count // effective * effective)
    return order_N[place_E // repeats] + place_E % repeats * count


@dataclass(eq=False)
class Loader:
    """The micro-batches of a split for one rank, epoch by epoch. Only one epoch is read at a time: a new one ends the last.

    Training (with augmentation): shuffled, in full effective batches of batch_size * accumulate * world_size images, which do not depend
    on how they are divided. Evaluation (augmentation None): every image once over all ranks, in order. Images in memory are kept and
    augmented on the device; files, and images that RandAugment needs on the CPU, go through worker processes.

    Raises DataError if the split is smaller than one effective batch of training, for an invalid `resize`, and if images in memory have
    another number of channels than the data set.
    """

    split: Split
    _: KW_ONLY
    data: Data
    image_size: tuple[int, int]  # (height, width) in pixels of the model's input
    batch_size: int  # images of a micro-batch on one device
    augmentation: Augmentation | None  # None: evaluation
    seed: int
    device: torch.device
    workers: int  # processes that decode and augment images that are not in memory; 0: this process
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1  # micro-batches per optimizer step; ignored in evaluation
    resize: int | None = None  # evaluation, images from files: pixels of the short side before the center crop; see view_size
    interpolation: str = "bicubic"  # evaluation: interpolation of the resizing

    def __post_init__(self) -> None:
        self.effective = self.batch_size * self.accumulate * self.world_size
        if min(self.batch_size, self.accumulate, self.world_size) < 1:
            raise DataError(
                f"{self.batch_size} images x {self.accumulate} accumulated x {self.world_size} devices: each must be at least 1"
            )
        if self.augmentation is not None and len(self.split) < self.effective:
            raise DataError(
                f"{len(self.split)} training images are fewer than one effective batch of {self.effective} ({self.batch_size} x "
                f"{self.accumulate} accumulated x {self.world_size} devices): choose an effective batch of at most {len(self.split)}"
            )
        # the augmentation's `resize` is ignored for images in memory
        resize, files = self.resize, self.split.images is None
        if self.augmentation is not None:
            resize = self.augmentation.evaluation_resize if files else None
        if resize is not None and (not files or 0 < resize < min(self.image_size)):
            short = f"smaller than the {min(self.image_size)} pixels of the model" if files else "but all have one size"
            raise DataError(f"images are to be resized to {resize} pixels, {short}: choose a larger `resize`, None, or 0 to stretch images")
        if self.split.images is not None and self.split.images.shape[1] != self.data.channels:
            given = f"images of shape {tuple(self.split.images.shape)} for {self.data.name} with channels={self.data.channels}"
            raise DataError(f"{given}: use a split of (N, {self.data.channels}, H, W)")
        self.in_memory = self.split.images is not None and (self.augmentation is None or self.augmentation.randaugment is None)
        if self.in_memory and self.split.images is not None:
            self.images, self.labels = self.split.images.to(self.device), self.split.labels.to(self.device)
            return
        self.schedule, self.reported = Schedule(), set[str]()
        self.worker_batches = make_workers(
            _Images(self),
            self.workers,
            batch_sampler=self.schedule,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def view(self) -> dict[str, str]:
        """Settings of the evaluation transform, as text: the features of a frozen encoder depend on these besides the image."""
        resized = f"{min(self.image_size)}" if self.in_memory else view_name(self.data, self.image_size, self.resize)
        sizes = {"image_size": "x".join(map(str, self.image_size)), "resize": resized, "interpolation": self.interpolation}
        return sizes | {"mean": str(self.data.mean), "std": str(self.data.std)}

    def __len__(self) -> int:
        """Number of micro-batches per epoch for this rank. In evaluation ranks may differ by one."""
        if self.augmentation is not None:
            return len(self.split) // self.effective * self.accumulate
        return -(-len(range(self.rank, len(self.split), self.world_size)) // self.batch_size)

    def indices(self, epoch: int) -> list[Tensor]:
        """The rows in each micro-batch of this rank (images if nothing is repeated): (B,) int64 each.

        Training: as `training_order`. Evaluation: every world_size-th image, in order, all images.
        """
        if self.augmentation is None:
            mine = torch.arange(len(self.split))[self.rank :: self.world_size]
            return list(mine.split(self.batch_size))[: len(self)]
        row_E = training_order(len(self.split), self.effective, self.seed, epoch, self.augmentation.repeats)
        return list(row_E.view(-1, self.world_size, self.batch_size)[:, self.rank])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, C, H, W) float32 and labels (B,) int64 on the device, from micro-batch `start` of the epoch.

        Raises DataError with the file if an image cannot be read, ValueError if `start` is outside the epoch.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start={start}: the epoch has {len(self)} micro-batches")
        batches = self.indices(epoch)[start:]
        return self._from_memory(epoch, batches) if self.in_memory else self._from_workers(epoch, batches)

    def _from_memory(self, epoch: int, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if self.augmentation is not None:
            # for every image of the data set and every copy, so that the augmentation of an image does not depend on its batch
            draws_RK = torch.empty(self.augmentation.repeats * len(self.split), DRAWS)
            for copy, draws_NK in enumerate(draws_RK.split(len(self.split))):
                draws_NK.uniform_(generator=generator(self.seed, epoch, AUGMENTATION + copy))
        for chosen_B in batches:
            on_device_B = (chosen_B % len(self.split)).to(self.device)
            images_BCHW, labels_B = self.images[on_device_B], self.labels[on_device_B]
            if self.augmentation is None:
                yield normalize(resize(images_BCHW, self.image_size, self.interpolation), self.data.mean, self.data.std), labels_B
            else:
                images_BCHW = augment(images_BCHW, draws_RK[chosen_B], self.augmentation, self.image_size)
                images_BCHW = normalize(images_BCHW, self.data.mean, self.data.std)
                yield erase(images_BCHW, draws_RK[chosen_B], self.augmentation.erase), labels_B

    def _from_workers(self, epoch: int, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        self.schedule.epoch, self.schedule.batches = epoch, batches
        for images_BCHW, labels_B, draws_BK, skipped in worker_batches(self.worker_batches):
            # reported here and not in the workers, so that a file is reported once even if several workers read it
            for path in {path for paths in skipped for path in paths.splitlines()} - self.reported:
                self.reported.add(path)
                log.warning(REPLACED, path)
            images_BCHW = images_BCHW.to(self.device, non_blocking=True)
            images_BCHW = normalize(images_BCHW, self.data.mean, self.data.std)
            if self.augmentation is not None:
                images_BCHW = erase(images_BCHW, draws_BK, self.augmentation.erase)
            yield images_BCHW, labels_B.to(self.device, non_blocking=True)


class Schedule:
    """The next batches for a DataLoader of `make_workers`. Workers persist over epochs, so every index includes the epoch."""

    def __init__(self) -> None:
        self.epoch, self.batches = 0, list[Tensor]()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for chosen_B in self.batches:
            yield [(self.epoch, row) for row in chosen_B.tolist()]


class _Images(Dataset):
    """(epoch, row) -> uint8 image (C, H, W), label, its uniform numbers (K,), and the skipped files, one per line."""

    def __init__(self, loader: Loader) -> None:
        self.split, self.channels, self.seed = loader.split, loader.data.channels, loader.seed
        self.random = loader.augmentation is not None
        view = loader.image_size, loader.resize, loader.interpolation
        self.transform = worker_transform(loader.augmentation, loader.data, *view)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, str]:
        epoch, (copy, index) = key[0], divmod(key[1], len(self.split))
        if self.random:
            # Python's, NumPy's and torch's global generators, because the transforms use all three. Without workers this changes those of
            # the caller's process; they are not restored, as the training loop reseeds before each step. Evaluation does not reseed.
            reseed_cpu(self.seed, epoch, index, AUGMENTATION + copy)
        with any_size():  # cropping also warns about large images
            image, index, skipped = self._read(index)
            image_CHW = self.transform(image)[: self.channels]
        return image_CHW, self.split.labels[index], torch.rand(DRAWS) if self.random else torch.zeros(DRAWS), skipped

    def _read(self, index: int) -> tuple[Image.Image, int, str]:
        if self.split.images is not None:
            pixels_HWC = self.split.images[index].permute(1, 2, 0).numpy()
            return Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC).convert("RGB"), index, ""
        assert self.split.paths is not None
        skipped, faults = list[str](), list[DataError]()
        for candidate in itertools.chain(range(index, len(self.split)), range(index)):
            try:
                return read_image(self.split.paths[candidate]), candidate, "\n".join(skipped)
            except DataError as error:
                if not self.split.skip_corrupt:
                    raise
                skipped.append(self.split.paths[candidate])
                faults = faults or [error]
        raise DataError(f"none of {len(skipped)} images can be read, and --skip-corrupt does not help; the first: {faults[0]}")
