"""Images with boxes and masks in COCO's format.

Shapes: K objects of an image, H x W pixels of an image.
"""

import contextlib
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from common.data import DataError
from common.data.images import read_image
from common.environment import available_cores

CHECKED = 1000  # images of a split whose contents identify it, and that are read before a training


@dataclass(frozen=True)
class Photo:
    """An image and its annotations, as in the file. Training uses those that are no crowd and have an area inside the image."""

    path: str
    number: int  # its id
    height: int
    width: int
    objects: tuple[dict, ...]


@dataclass(frozen=True, kw_only=True)
class Detections:
    """A data set for detection. Class k of a model is category `categories[k]`."""

    name: str
    folder: Path
    classes: tuple[str, ...]
    categories: tuple[int, ...]
    train: tuple[Photo, ...]  # only those with an object
    val: tuple[Photo, ...]
    left_out: str  # what is not used in the training, in words
    identity: dict[str, str]  # digests of annotations and images of each split

    def read(self, photo: Photo) -> Image.Image:
        """The image (RGB). Raises DataError if its size is not that of the annotation file."""
        image = read_image(photo.path)
        if (image.height, image.width) != (photo.height, photo.width):
            sizes = f"{image.height} x {image.width} pixels, but the annotation file says {photo.height} x {photo.width}"
            raise DataError(f"{photo.path} has {sizes}: correct height and width there")
        return image

    def check(self, patch: int) -> None:
        """Raise DataError for an image smaller than a patch; up to CHECKED of each split are read: those must be as `read` wants them."""
        for photo in (*self.train, *self.val):
            if min(photo.height, photo.width) < patch:
                size = f"{photo.height} x {photo.width}"
                raise DataError(f"{photo.path} has {size} pixels, less than a patch of {patch} x {patch}: enlarge the images, or remove it")

        def read(photo: Photo) -> None:  # without a result, which would wait in memory
            self.read(photo)

        chosen = [photo for split in (self.train, self.val) for photo in split[:: max(1, -(-len(split) // CHECKED))]]
        with ThreadPoolExecutor(available_cores()) as pool:
            for _ in pool.map(read, chosen):
                pass

    def target(self, photo: Photo) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Masks (K, H, W) uint8 and classes (K,) int64 of the objects for training."""
        chosen = [found for found in photo.objects if trained(found, photo)]
        masks = [coco_mask.decode(encoded(found, photo.height, photo.width)) for found in chosen]
        place = {category: index for index, category in enumerate(self.categories)}
        shape = (0, photo.height, photo.width)
        return numpy.stack(masks) if masks else numpy.zeros(shape, numpy.uint8), numpy.array(
            [place[found["category_id"]] for found in chosen], numpy.int64
        )

    def truth(self) -> COCO:
        """The validation images for pycocotools' evaluation."""
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": photo.number, "height": photo.height, "width": photo.width} for photo in self.val],
            "annotations": [_complete(found, photo, number) for number, (photo, found) in enumerate(_pairs(self.val), 1)],
            "categories": [{"id": number, "name": name} for number, name in zip(self.categories, self.classes, strict=True)],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def limited(self, count: int) -> "Detections":
        """At most `count` images of each split, spread evenly."""

        def spread(photos: tuple[Photo, ...]) -> tuple[Photo, ...]:
            return photos if count >= len(photos) else tuple(photos[index * len(photos) // count] for index in range(count))

        chosen = replace(self, train=spread(self.train), val=spread(self.val))
        if not any(photo.objects for photo in chosen.val):
            raise DataError(f"LIMIT={count}: none of these validation images has an object; raise it")
        return chosen


def trained(found: dict, photo: Photo) -> bool:
    """Whether an annotation is used in the training: no crowd, and its box has an area inside the image."""
    x, y, width, height = found["bbox"]
    inside = min(x + width, photo.width) - max(x, 0), min(y + height, photo.height) - max(y, 0)
    return not found.get("iscrowd", 0) and min(*inside, width, height) > 0


def encoded(found: dict, height: int, width: int) -> dict:
    """The mask of an annotation in pycocotools' run-length encoding."""
    shape = found["segmentation"]
    if isinstance(shape, list):
        return coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    return coco_mask.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape


def detectron2_mask(found: dict, height: int, width: int) -> list | dict:
    """The mask of an annotation as detectron2 reads it: polygons as they are, run lengths in pycocotools' encoding."""
    return found["segmentation"] if isinstance(found["segmentation"], list) else encoded(found, height, width)


def _pairs(photos: tuple[Photo, ...]) -> Iterator[tuple[Photo, dict]]:
    return ((photo, found) for photo in photos for found in photo.objects)


def _complete(found: dict, photo: Photo, number: int) -> dict:
    """An annotation with all that the evaluation reads."""
    area = found["area"] if "area" in found else float(coco_mask.area(encoded(found, photo.height, photo.width)))
    return {**found, "id": number, "iscrowd": found.get("iscrowd", 0), "area": area}


def open_detections(folder: Path) -> Detections:
    """Open a folder: annotations/instances_{train,val}.json and images/, or COCO 2017's own names (train2017/, instances_train2017.json).

    Raises DataError, with names and numbers, for what is missing, categories that do not exist, images that are absent, annotations
    without mask, and a split without an object. No image is read for its size: see Detections.check.
    """
    if not folder.is_dir():
        raise DataError(f"DATA={folder} is not a folder")
    original = (folder / "annotations" / "instances_train2017.json").exists()
    files = [folder / "annotations" / f"instances_{split}{'2017' * original}.json" for split in ("train", "val")]
    homes = [folder / f"{split}2017" if original else folder / "images" for split in ("train", "val")]
    contents = [_load(path) for path in files]
    names = [{each["id"]: each["name"] for each in content["categories"]} for content in contents]
    if names[0] != names[1]:
        raise DataError(f"{files[0]} and {files[1]} have different categories: give both the same list")
    if not names[0]:
        raise DataError(f"{files[0]} has no categories")
    train, val = (_photos(content, path, home, names[0]) for content, path, home in zip(contents, files, homes, strict=True))
    used = tuple(photo for photo in train if any(trained(found, photo) for found in photo.objects))
    for path, some in zip(files, (used, [photo for photo in val if photo.objects]), strict=True):
        if not some:
            raise DataError(f"{path} has no object in any image: nothing can be {'learned' if path == files[0] else 'measured'}")
    crowds = sum(bool(found.get("iscrowd", 0)) for _, found in _pairs(train))
    empty = sum(not trained(found, photo) for photo, found in _pairs(train)) - crowds
    left_out = f"{len(train) - len(used)} images without an object, {crowds} crowds, {empty} boxes without area inside their image"
    order = sorted(names[0])
    digests = {split: _digest(path, photos) for split, path, photos in zip(("train", "val"), files, (train, val), strict=True)}
    return Detections(
        name="coco2017" if original else folder.resolve().name,
        folder=folder,
        classes=tuple(names[0][number] for number in order),
        categories=tuple(order),
        train=used,
        val=val,
        left_out=left_out,
        identity=digests,
    )


def _digest(path: Path, photos: Sequence[Photo]) -> str:
    """Of an annotation file and, up to CHECKED images, of the contents of the images."""
    found = hashlib.sha256(path.read_bytes())
    for photo in photos if len(photos) <= CHECKED else ():
        found.update(hashlib.sha256(Path(photo.path).read_bytes()).digest())
    return found.hexdigest()[:16]


def _load(path: Path) -> dict:
    if not path.exists():
        raise DataError(f"{path} is missing: a COCO folder has annotations/instances_train.json, instances_val.json and images/")
    try:
        content = json.loads(path.read_text())
        missing = [name for name in ("images", "annotations", "categories") if not isinstance(content.get(name), list)]
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a COCO annotation file: {error}") from error
    if missing:
        raise DataError(f"{path} has no list of {', '.join(missing)}: it is not a COCO annotation file")
    return content


def _photos(content: dict, path: Path, home: Path, names: dict[int, str]) -> tuple[Photo, ...]:
    """The images of a file in the order of their ids, all checked."""
    where = f"in {path}"
    try:
        images = {each["id"]: each for each in content["images"]}
        if len(images) < len(content["images"]):
            twice = Counter(each["id"] for each in content["images"]).most_common(1)[0][0]
            raise DataError(f"image id {twice} is there more than once {where}: give each image its own id")
        sizes = {number: (int(each["height"]), int(each["width"])) for number, each in images.items()}
        objects: dict[int, list[dict]] = {number: [] for number in images}
        for found in content["annotations"]:
            _check(found, images, sizes, names, where)
            objects[found["image_id"]].append(found)
        photos = [Photo(str(home / images[n]["file_name"]), n, *sizes[n], tuple(objects[n])) for n in sorted(images)]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a COCO annotation file: {error} is missing or of a wrong type") from error
    if absent := [photo.path for photo in photos if not Path(photo.path).exists()]:
        raise DataError(f"{path} names {len(photos)} images, and {len(absent)} of their files are absent, the first is {absent[0]}")
    return tuple(photos)


def _check(found: dict, images: dict, sizes: dict[int, tuple[int, int]], names: dict[int, str], where: str) -> None:
    """Raise DataError for an annotation that cannot be used."""
    what = f"annotation {found.get('id', '?')} {where}"
    if found["image_id"] not in images:
        raise DataError(f"{what} is of image {found['image_id']}, which is not in the list of images: remove it, or add the image")
    if found["category_id"] not in names:
        known = ", ".join(map(str, sorted(names)[:10])) + (", ..." if len(names) > 10 else "")
        raise DataError(f"{what} has category_id {found['category_id']}, which does not exist: the categories are {known}")
    if len(found["bbox"]) != 4 or not all(math.isfinite(value) for value in found["bbox"]):
        raise DataError(f"{what} has the box {found['bbox']}: give x, y, width and height in pixels")
    shape, size = found.get("segmentation"), sizes[found["image_id"]]
    polygons = isinstance(shape, list) and shape and all(isinstance(each, list) and len(each) >= 6 for each in shape)
    runs = isinstance(shape, dict) and "counts" in shape and tuple(shape.get("size", ())) == size
    if not polygons and not runs:
        fix = f"give polygons of 3 points or more, or run lengths of the image's size {size[0]} x {size[1]}"
        raise DataError(f"{what} has no usable mask (segmentation): {fix}")
