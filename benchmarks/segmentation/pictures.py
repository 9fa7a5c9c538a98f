"""Test images beside their masks and the predicted classes."""

from pathlib import Path

import matplotlib
import numpy
import torch
from lightning.fabric import Fabric
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn

from benchmarks.segmentation.data import IGNORED, Scenes
from benchmarks.segmentation.score import View, predict

IMAGES = 4
MOST = 20  # classes in the legend, and colours of tab20


@torch.no_grad()
def draw(fabric: Fabric, model: nn.Module, scenes: Scenes, view: View, path: Path) -> None:
    """Write a picture with a row per image: image, mask, prediction. Pixels without a class are black in both."""
    model.eval()
    chosen = [index * len(scenes.val) // min(IMAGES, len(scenes.val)) for index in range(min(IMAGES, len(scenes.val)))]
    figure = Figure(figsize=(10, 2.6 * len(chosen) + 1), layout="constrained")
    shown = set[int]()
    for axes, index in zip(figure.subplots(len(chosen), 3, squeeze=False), chosen, strict=True):
        image, class_HW = scenes.pair(scenes.val, index)
        found_HW = predict(fabric, model, image, view, class_HW.shape).cpu().numpy()
        found_HW[class_HW == IGNORED] = IGNORED
        shown |= {*numpy.unique(class_HW), *numpy.unique(found_HW)} - {IGNORED}
        for axis, title, pixels in zip(axes, ("image", "mask", "prediction"), (numpy.asarray(image), class_HW, found_HW), strict=True):
            axis.imshow(pixels if title == "image" else colours(len(scenes.classes))[pixels])
            axis.set_axis_off()
            axis.set_title(title if index == chosen[0] else "", fontsize=10)
    names = [Patch(color=colours(len(scenes.classes))[k], label=scenes.classes[k]) for k in sorted(shown)[:MOST]]
    figure.legend(handles=names, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def colours(classes: int) -> numpy.ndarray:
    """A colour for each value of a mask, (256, 3): black for IGNORED."""
    table = numpy.zeros((256, 3))
    places = numpy.arange(classes) if classes <= MOST else numpy.linspace(0, 1, classes)  # integers choose colours, in their order
    table[:classes] = matplotlib.colormaps["tab20" if classes <= MOST else "gist_rainbow"](places)[:, :3]
    return table
