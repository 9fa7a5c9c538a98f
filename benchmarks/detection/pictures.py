"""Validation images with the boxes and masks of the truth beside those that a model finds."""

from pathlib import Path

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools import mask as coco_mask

from benchmarks.detection.data import Detections, Photo, encoded

IMAGES = 4
LEAST = 0.5  # score of what is shown


def chosen(data: Detections) -> list[Photo]:
    """The images of the picture, spread evenly over those with an object."""
    photos = [photo for photo in data.val if photo.objects]
    count = min(IMAGES, len(photos))
    return [photos[index * len(photos) // count] for index in range(count)]


def draw(data: Detections, found: list[list[dict]], path: Path) -> None:
    """Write a picture with a row for each of the `chosen` images. found: results in COCO's format for each of them."""
    photos = chosen(data)
    figure = Figure(figsize=(10, 3.6 * len(photos)), layout="constrained")
    for axes, photo, results in zip(figure.subplots(len(photos), 2, squeeze=False), photos, found, strict=True):
        _show(axes[0], data, photo, list(photo.objects), "truth")
        _show(axes[1], data, photo, [own for own in results if own["score"] >= LEAST], f"found, score from {LEAST} up")
    figure.savefig(path, dpi=100)


def _show(axis: Axes, data: Detections, photo: Photo, objects: list[dict], title: str) -> None:
    pixels_HWC = numpy.asarray(data.read(photo)).astype(float) / 255
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for own in objects:
        place = data.categories.index(own["category_id"])
        mask_HW = coco_mask.decode(encoded(own, photo.height, photo.width)).astype(bool)
        pixels_HWC[mask_HW] = 0.5 * pixels_HWC[mask_HW] + 0.5 * numpy.array(colours[place % 20])
        left, top, width, height = own["bbox"]
        axis.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=colours[place % 20]))
        text = data.classes[place] + (f" {own['score']:.2f}" if "score" in own else "")
        axis.text(left, top, text, fontsize=6, color="white", backgroundcolor=colours[place % 20])
    axis.imshow(pixels_HWC)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()
