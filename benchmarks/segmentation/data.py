"""Images with a class for each pixel: ADE20K, Pascal VOC, or any folder of images and masks.

A mask is a PNG file of the size of its image, with a class index at each pixel (grey, or a palette, whose colours do not matter).

Shapes: H x W pixels.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.data import DataError
from common.data.images import any_size, read_image
from common.environment import available_cores

IGNORED = 255  # of a pixel without a class
ADE20K_CLASSES = 150
VOC_CLASSES = (
    *"background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep".split(),
    *"sofa train tvmonitor".split(),
)
CHECKED = 1000  # pairs of each split whose pixels are read before a training starts


@dataclass(frozen=True)
class Pairs:
    """The images of a split and their masks, by path, in the order of their names."""

    images: tuple[str, ...]
    masks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A data set for segmentation. `ignored`: values in the mask files that mean no class. `offset`: the value of class 0."""

    name: str
    folder: Path
    classes: tuple[str, ...]
    train: Pairs
    val: Pairs
    ignored: tuple[int, ...] = (IGNORED,)
    offset: int = 0
    short_side: int | None = None  # pixels to which the short side of an image is resized; None: images keep their size

    def mask(self, path: str) -> numpy.ndarray:
        """Class indices (H, W) uint8, IGNORED where there is none. Raises DataError for other values, with the file and the value."""
        try:
            with any_size(), Image.open(path) as image:
                if image.mode not in ("L", "P", "I", "I;16"):
                    raise DataError(
                        f"{path} has colours ({image.mode}), not a class index at each pixel: save it as grey or with a palette"
                    )
                found_HW = numpy.asarray(image).astype(numpy.int64)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{path} cannot be read as a mask: {error}") from error
        nothing_HW = numpy.isin(found_HW, self.ignored)
        class_HW = numpy.where(nothing_HW, IGNORED, found_HW - self.offset)
        wrong = found_HW[~nothing_HW & ((class_HW < 0) | (class_HW >= len(self.classes)))]
        if len(wrong):
            least, most = self.offset, self.offset + len(self.classes) - 1
            fix = f"classes are {least} to {most}, and {', '.join(map(str, self.ignored))} is ignored"
            raise DataError(f"{path} has the value {wrong[0]} at {len(wrong)} pixels, but {fix}: correct the mask or the list of classes")
        return class_HW.astype(numpy.uint8)

    def pair(self, split: Pairs, index: int) -> tuple[Image.Image, numpy.ndarray]:
        """An image (RGB) and its mask (H, W). Raises DataError if they differ in size."""
        image, class_HW = read_image(split.images[index]), self.mask(split.masks[index])
        if image.size[::-1] != class_HW.shape:
            sizes = (
                f"{image.height} x {image.width} pixels, but its mask {split.masks[index]} has {class_HW.shape[0]} x {class_HW.shape[1]}"
            )
            raise DataError(f"{split.images[index]} has {sizes}: make both the same size")
        return image, class_HW

    @property
    def identity(self) -> dict[str, str]:
        """Digests of each split: of the names of its files and, up to CHECKED pairs, of their contents."""
        return {name: _digest(split, self.folder) for name, split in (("train", self.train), ("val", self.val))}

    def check(self, patch: int) -> None:
        """Read up to CHECKED pairs of each split. Raises DataError for one that is wrong, also for an image smaller than a patch."""

        def read(place: tuple[Pairs, int]) -> None:
            image, _ = self.pair(*place)
            if min(image.size) < patch:
                size, path = f"{image.height} x {image.width}", place[0].images[place[1]]
                raise DataError(f"{path} has {size} pixels, less than a patch of {patch} x {patch}: enlarge the images, or remove it")

        places = [(split, index) for split in (self.train, self.val) for index in range(0, len(split), max(1, -(-len(split) // CHECKED)))]
        with ThreadPoolExecutor(available_cores()) as pool:
            for _ in pool.map(read, places):
                pass

    def limited(self, count: int) -> "Scenes":
        """At most `count` images of each split, spread evenly."""
        return replace(self, train=_spread(self.train, count), val=_spread(self.val, count))


def open_scenes(folder: Path) -> Scenes:
    """Open a folder, by its layout:

    - ADE20K (ADEChallengeData2016): images/{training,validation}, annotations/{training,validation}; 0 is ignored
    - Pascal VOC: JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt; with SegmentationClassAug and trainaug.txt, those
    - any other: images/{train,val}, masks/{train,val}, and classes.json: {"names": [...], "ignore_index": 255}

    Raises DataError that says what is missing, and for images without masks and masks without images, with their names.
    """
    if not folder.is_dir():
        raise DataError(f"DATA={folder} is not a folder")
    if (folder / "annotations" / "training").is_dir():
        splits = [_paired(folder / "images" / name, folder / "annotations" / name) for name in ("training", "validation")]
        return Scenes(
            name="ade20k",
            folder=folder,
            classes=_ade20k_names(folder),
            train=splits[0],
            val=splits[1],
            ignored=(0,),
            offset=1,
            short_side=512,
        )
    if (folder / "JPEGImages").is_dir():
        augmented = (folder / "SegmentationClassAug").is_dir() and (folder / "ImageSets/Segmentation/trainaug.txt").exists()
        masks = folder / ("SegmentationClassAug" if augmented else "SegmentationClass")
        lists = [folder / "ImageSets" / "Segmentation" / f"{name}.txt" for name in ("trainaug" if augmented else "train", "val")]
        train, val = (_listed(path, folder / "JPEGImages", masks) for path in lists)
        return Scenes(
            name="voc2012aug" if augmented else "voc2012", folder=folder, classes=VOC_CLASSES, train=train, val=val, short_side=512
        )
    if not (folder / "classes.json").exists():
        fix = 'images/{train,val}, masks/{train,val} and classes.json with {"names": [...], "ignore_index": 255}'
        raise DataError(f"{folder} is neither ADE20K nor Pascal VOC and has no classes.json: a folder of your own needs {fix}")
    try:
        described = json.loads((folder / "classes.json").read_text())
        names, ignored = tuple(map(str, described["names"])), int(described.get("ignore_index", IGNORED))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{folder / "classes.json"} is not {{"names": [...], "ignore_index": 255}}: {error}') from error
    names = names[:ignored] if ignored == len(names) - 1 else names  # a name of the ignored value, if it is the last, is not a class
    if not 2 <= len(names) <= IGNORED:
        raise DataError(f"{folder / 'classes.json'} has {len(names)} classes: 2 to {IGNORED} are possible")
    train, val = (_paired(folder / "images" / name, folder / "masks" / name) for name in ("train", "val"))
    return Scenes(name=folder.resolve().name, folder=folder, classes=names, train=train, val=val, ignored=(ignored,))


def _ade20k_names(folder: Path) -> tuple[str, ...]:
    """The names in objectInfo150.txt, which is part of ADE20K; numbers if it is missing."""
    path = folder / "objectInfo150.txt"
    if not path.exists():
        return tuple(map(str, range(1, ADE20K_CLASSES + 1)))
    return tuple(line.rstrip().rpartition("\t")[2].partition(",")[0] for line in path.read_text().splitlines()[1 : ADE20K_CLASSES + 1])


def _paired(images: Path, masks: Path) -> Pairs:
    """The images of a folder with the masks of the same names in another."""
    for path in (images, masks):
        if not path.is_dir():
            raise DataError(f"{path} is missing: it must have one file for each image")
    found = {path.stem: str(path) for path in _files(images, IMG_EXTENSIONS)}
    drawn = {path.stem: str(path) for path in _files(masks, (".png",))}
    for these, those, what in ((found, drawn, f"no mask in {masks}"), (drawn, found, f"no image in {images}")):
        if lone := [path for stem, path in these.items() if stem not in those]:
            raise DataError(
                f"{len(lone)} of {len(these)} files have {what}, the first is {lone[0]}: add the missing files, or delete these"
            )
    if not found:
        raise DataError(f"{images} has no image ({', '.join(IMG_EXTENSIONS)})")
    return Pairs(tuple(found.values()), tuple(drawn[stem] for stem in found))


def _listed(path: Path, images: Path, masks: Path) -> Pairs:
    """The images of Pascal VOC that a list names."""
    if not path.exists():
        raise DataError(f"{path} is missing: it is part of Pascal VOC")
    stems = path.read_text().split()
    pairs = Pairs(tuple(f"{images / stem}.jpg" for stem in stems), tuple(f"{masks / stem}.png" for stem in stems))
    if absent := [file for file in (*pairs.images, *pairs.masks) if not Path(file).exists()]:
        raise DataError(f"{path} names {len(stems)} images, and {len(absent)} of their files are absent, the first is {absent[0]}")
    return pairs


def _files(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() in endings and not path.name.startswith("."))


def _spread(split: Pairs, count: int) -> Pairs:
    chosen = range(len(split)) if count >= len(split) else [index * len(split) // count for index in range(count)]
    return Pairs(tuple(split.images[index] for index in chosen), tuple(split.masks[index] for index in chosen))


def _digest(split: Pairs, folder: Path) -> str:
    found = hashlib.sha256()
    for path in (*split.images, *split.masks):
        found.update(Path(path).relative_to(folder).as_posix().encode() + b"\0")
        if len(split) <= CHECKED:
            found.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return found.hexdigest()[:16]
