"""Pictures of a model's predictions: positions of patches, and features or tokens of masked patches."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from common.data import Data
from common.vit import patchify


def draw_positions(
    images_BCHW: Tensor,
    patch: int,
    cell_BV: Tensor,
    predicted_BV: Tensor,
    dropped_BV: Tensor,
    framed_BV: Tensor,
    caption: str,
    data: Data,
    path: Path,
) -> None:
    """Write a picture with a row per image: the image, the model's input, and the dropped patches at their predicted cells.

    cell (B, V) is the target cell of each visible patch, predicted (B, V) the predicted cell, dropped (B, V) is true if the position was
    dropped, framed (B, V) if a patch has a golden frame in the middle column, under the caption. Correct predictions have green frames,
    wrong ones red frames; if several patches have the same predicted cell, the last is drawn.
    """
    pixels_BCHW = as_pixels(images_BCHW, data)
    patches_BNP = patchify(pixels_BCHW, patch)
    columns = images_BCHW.shape[-1] // patch
    figure = Figure(figsize=(8.4, 2.6 * len(images_BCHW)), layout="constrained")
    axes = figure.subplots(len(images_BCHW), 3, squeeze=False)
    for row, (image, patches, cell, predicted, dropped, framed) in enumerate(
        zip(pixels_BCHW, patches_BNP, cell_BV, predicted_BV, dropped_BV, framed_BV, strict=True)
    ):
        right = int(((cell == predicted) & dropped).sum())
        titles = ("image", caption, f"placed: {right} of {int(dropped.sum())} right")
        seen = _assemble(image, patch, zip(cell.tolist(), patches[cell], strict=True), columns)
        kept = [(int(c), patches[c]) for c, d in zip(cell, dropped, strict=True) if not d]
        moved = [(int(p), patches[c]) for c, p, d in zip(cell, predicted, dropped, strict=True) if d]
        placed = _assemble(image, patch, [*kept, *moved], columns)
        for axis, title, shown in zip(axes[row], titles, (image, seen, placed), strict=True):
            axis.imshow(_channels_last(shown), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
            if row == 0 or title != "image":
                axis.set_title(title, fontsize=10)
        for c, p, d, f in zip(cell.tolist(), predicted.tolist(), dropped.tolist(), framed.tolist(), strict=True):
            if f:
                _frame(axes[row][1], c, columns, patch, "gold")
            if d:
                _frame(axes[row][2], p, columns, patch, "limegreen" if c == p else "red")
    figure.savefig(path, dpi=100)


def draw_blocks(
    images_BCHW: Tensor, patch: int, context_BM: Tensor, cell_GBT: Tensor, similarity_GBT: Tensor, data: Data, path: Path
) -> None:
    """Write a picture with a row per image: the image, its context, and each target block coloured by its similarity.

    context (B, M) and cell (G, B, T) are the cells of contexts and blocks; similarity (G, B, T) is the cosine similarity of the predicted
    and the target features of each target patch, from -1 to 1.
    """
    pixels_BCHW, columns = as_pixels(images_BCHW, data), images_BCHW.shape[-1] // patch
    patches_BNP = patchify(pixels_BCHW, patch)
    figure = Figure(figsize=(1.9 * (2 + len(cell_GBT)), 2.1 * len(images_BCHW)), layout="constrained")
    axes = figure.subplots(len(images_BCHW), 2 + len(cell_GBT), squeeze=False)
    for row, (image, patches, context) in enumerate(zip(pixels_BCHW, patches_BNP, context_BM, strict=True)):
        seen = _assemble(image, patch, zip(context.tolist(), patches[context], strict=True), columns)
        titles = ["image", f"context: {len(context)} of {len(patches)}", *(f"mean {mean:.2f}" for mean in similarity_GBT[:, row].mean(1))]
        for axis, title, shown in zip(axes[row], titles, [image, seen, *[image] * len(cell_GBT)], strict=True):
            axis.imshow(_channels_last(shown), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(title, fontsize=9)
        for axis, cells, similarity in zip(axes[row, 2:], cell_GBT[:, row], similarity_GBT[:, row].float().cpu(), strict=True):
            shown = torch.full((images_BCHW.shape[-2] // patch, columns), torch.nan)
            shown.view(-1)[cells.cpu()] = similarity
            extent = (-0.5, image.shape[-1] - 0.5, image.shape[-2] - 0.5, -0.5)
            drawn = axis.imshow(shown.numpy(), cmap="RdYlGn", vmin=-1, vmax=1, extent=extent, interpolation="nearest")
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="cosine similarity of predicted and target features")
    figure.savefig(path, dpi=100)


def draw_tokens(images_BCHW: Tensor, patch: int, context_BM: Tensor, cell_BQ: Tensor, right_BQ: Tensor, data: Data, path: Path) -> None:
    """Write a picture with a row per image: the image, its context, and its masked patches numbered in the order of prediction.

    context (B, M) and cell (B, Q) are the visible cells and the predicted cells, in the order of prediction; right (B, Q) is true if the
    token is predicted correctly: a green frame, else a red one.
    """
    pixels_BCHW, columns = as_pixels(images_BCHW, data), images_BCHW.shape[-1] // patch
    patches_BNP = patchify(pixels_BCHW, patch)
    figure = Figure(figsize=(8.4, 2.8 * len(images_BCHW)), layout="constrained")
    axes = figure.subplots(len(images_BCHW), 3, squeeze=False)
    for row, image, patches, context, cells, right in zip(
        axes, pixels_BCHW, patches_BNP, context_BM.tolist(), cell_BQ.tolist(), right_BQ.tolist(), strict=True
    ):
        seen = _assemble(image, patch, ((cell, patches[cell]) for cell in context), columns)
        titles = ("image", f"{len(context)} of {len(patches)} patches seen", f"tokens: {sum(right)} of {len(right)} right")
        for axis, title, shown in zip(row, titles, (image, seen, image), strict=True):
            axis.imshow(_channels_last(shown), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(title, fontsize=10)
        for place, (cell, correct) in enumerate(zip(cells, right, strict=True), 1):
            colour = "limegreen" if correct else "red"
            _frame(row[2], cell, columns, patch, colour)
            if len(patches) <= 64:  # more would not be legible
                (top, left), middle = divmod(cell, columns), (patch - 1) / 2
                row[2].text(left * patch + middle, top * patch + middle, str(place), color=colour, ha="center", va="center", fontsize=8)
    figure.savefig(path, dpi=100)


def draw_codewords(patches: dict[str, list[Tensor]], most: int, data: Data, path: Path) -> None:
    """Write a picture with a row of patches (C, P, P) under each name, the nearest to a code first, at most `most`; in two columns."""
    rows = -(-len(patches) // 2)
    # patches may be white or grey, so the background has another colour
    figure = Figure(figsize=(0.9 * most + 0.4, 0.72 * rows + 0.4), layout="constrained", facecolor="lightsteelblue")
    axes = figure.subplots(rows, 2, squeeze=False).T.ravel()
    for axis, (name, shown) in zip(axes, itertools.chain(patches.items(), itertools.repeat(("", []))), strict=False):
        for place, patch in enumerate(shown):
            pixels, extent = as_pixels(patch[None], data)[0], (place, place + 0.92, 0, 0.92)
            axis.imshow(_channels_last(pixels), cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
        axis.set(xlim=(0, most), ylim=(0, 0.92), aspect="equal")
        axis.set_title(name, loc="left", fontsize=9, pad=2)
        axis.set_axis_off()
    figure.suptitle("Some tokens, from the most frequent to the rarest, and the patches nearest to each", fontsize=10)
    figure.savefig(path, dpi=100)


def as_pixels(images_BCHW: Tensor, data: Data) -> Tensor:
    """Normalised images (B, C, H, W) as pixels from 0 to 1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    return (images_BCHW.float().cpu() * std + mean).clamp(0, 1)


def _assemble(image_CHW: Tensor, patch: int, placed: Iterable[tuple[int, Tensor]], columns: int) -> Tensor:
    """Draw patches at their cells on a mid-grey canvas of the same size as the image."""
    canvas = torch.full_like(image_CHW, 0.45)
    for cell, pixels in placed:
        top, left = divmod(cell, columns)
        canvas[:, top * patch : (top + 1) * patch, left * patch : (left + 1) * patch] = pixels.view(-1, patch, patch)
    return canvas


def _channels_last(image_CHW: Tensor) -> numpy.ndarray:
    return image_CHW.permute(1, 2, 0).squeeze(-1).numpy()


def _frame(axis: Axes, cell: int, columns: int, patch: int, color: str) -> None:
    """Draw a frame just inside its patch, so that frames of neighbours do not overlap."""
    (top, left), inset = divmod(cell, columns), 0.05 * patch
    corner = left * patch - 0.5 + inset, top * patch - 0.5 + inset
    axis.add_patch(Rectangle(corner, patch - 2 * inset, patch - 2 * inset, fill=False, edgecolor=color, linewidth=1.2))
