"""Time the loading of training images, relative to torchvision's.

    python -m benchmarks.speed.input FOLDER     a folder with train/ and val/ in ImageFolder layout

Both loaders decode each image, take a random resized crop, flip it with probability 0.5, normalise it, and move batches of float32 images
to the device. torchvision is ImageFolder, its transforms and torch's DataLoader. The loaders take turns, each with the same images and
number of workers. The results:

    images/s    per worker, median over the turns
    ratio       images/s of ours / images/s of torchvision in the same turn, median over the turns
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas
import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from benchmarks.speed.measure import show, wait
from common import keep_freed_memory
from common.data import Augmentation, DataError, Loader, open_data

Epoch = Callable[[], Iterable]  # yields batches of images (B, 3, H, W) float32, normalised, and labels (B,), on the device
AUGMENTATION = Augmentation(scale=(0.2, 1.0))  # as in the pre-trainings


def make_loaders(folder: str, device: torch.device, workers: int, images: int, batch: int, size: int) -> dict[str, Epoch]:
    """Both loaders of the same training images of a folder, at most `images`: ours and torchvision's.

    Raises DataError if the folder has no data set or fewer images than a batch.
    """
    data = open_data(folder)
    chosen = torch.linspace(0, len(data.train) - 1, min(images, len(data.train))).long()  # the images are sorted by class
    sizes: dict = {"image_size": (size, size), "batch_size": batch}
    ours = Loader(data.train.subset(chosen), data=data, augmentation=AUGMENTATION, seed=0, device=device, workers=workers, **sizes)
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(size, AUGMENTATION.scale, AUGMENTATION.ratio, bicubic),
        transforms.RandomHorizontalFlip(AUGMENTATION.flip),
        transforms.ToTensor(),
        transforms.Normalize(data.mean, data.std),
    ]
    theirs = DataLoader(
        Subset(datasets.ImageFolder(str(Path(folder) / "train"), transforms.Compose(steps)), chosen.tolist()),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )

    def moved() -> Iterable:
        for pair in theirs:
            yield [tensor.to(device, non_blocking=True) for tensor in pair]

    return {"ours": lambda: ours.epoch(0), "torchvision": moved}


def measure(loaders: dict[str, Epoch], device: torch.device, images: int, turns: int) -> dict[str, list[float]]:
    """Images per second of each loader in each turn, over whole epochs of `images` or more images in total."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(turns + 1):
        for name, epoch in loaders.items():
            count, begun = 0, time.perf_counter()
            while count < (images if turn else 1):
                count += sum(len(labels) for _, labels in epoch())
            wait(device)
            if turn:  # the first turn starts the workers
                rates[name].append(count / (time.perf_counter() - begun))
    return rates


def main(arguments: list[str] | None = None) -> int:
    """Time and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.input", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder with train/ and val/, each with one folder per class")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of loader processes (default: 1 2)")
    parser.add_argument("--turns", type=int, default=5, help="number of timings of each loader (default: 5)")
    parser.add_argument("--images", type=int, default=4000, help="images of a timing (default: 4000)")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side of the crops (default: 224)")
    options = parser.parse_args(arguments)
    for name in ("workers", "turns", "images", "batch", "size"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} {value}: give whole numbers from 1 up")
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for workers in options.workers:
        try:
            loaders = make_loaders(options.folder, device, workers, options.images, options.batch, options.size)
        except DataError as error:
            parser.error(str(error))
        rates = measure(loaders, device, options.images, options.turns)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(*rates.values(), strict=True))
        medians = {f"{name}, images/s per worker": round(statistics.median(rates[name]) / workers) for name in rates}
        lines.append({"workers": workers, **medians, "ratio": round(ratio, 2)})
    show(pandas.DataFrame(lines), f"{Path(options.folder).resolve().name}, {options.size} px", device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
