"""Tokens and classifiers of any timm backbone.

Shapes: B images, H x W cells, N = H * W tokens, C channels.
"""

from math import isqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor

from common.heads import initialise_layers
from common.positions import Grid

Backbone: TypeAlias = Any  # a timm model with `channels` and `image_size`; what timm's models have in common has no type
# Maps name prefixes of the official Swin to those of a method around timm's, which merges patches before a stage instead of after one.
OFFICIAL_SWIN_NAMES = {
    "": "encoder.",
    "head.": "encoder.head.fc.",
    **{f"layers.{stage}.downsample.": f"encoder.layers.{stage + 1}.downsample." for stage in range(3)},
}


def patch_tokens(features: Tensor, encoder: Backbone) -> tuple[Tensor, Grid]:
    """Convert the output of timm's forward_features to tokens (B, N, C) in row-major order, without class tokens, and their grid.

    Three layouts are supported: tokens, such as ViT's; NHWC, such as Swin's; NCHW, such as NesT's and convolutional networks'.
    Raises ValueError for an output that is no grid of cells.
    """
    name = type(encoder).__name__
    if isinstance(features, Tensor) and features.ndim == 4:
        channels = encoder.num_features
        last = getattr(encoder, "output_fmt", "NHWC" if features.shape[1] != channels else "NCHW") == "NHWC"
        map_BHWC = features if last else features.permute(0, 2, 3, 1)
        return map_BHWC.flatten(1, 2), (map_BHWC.shape[1], map_BHWC.shape[2])
    if isinstance(features, Tensor) and features.ndim == 3:
        tokens = features[:, getattr(encoder, "num_prefix_tokens", 0) :]
        cells, grid = tokens.shape[1], getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
        if grid is None or grid[0] * grid[1] != cells:
            grid = (isqrt(cells), isqrt(cells))
        if grid[0] * grid[1] == cells > 1:
            return tokens, tuple(grid)
    found = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
    raise ValueError(f"{name} has no grid of cells but ends in {found}, so its tokens have no positions to label; choose another backbone")


def check_windows(encoder: Backbone) -> None:
    """Raise ValueError if attention windows do not fit the grid of a stage; timm would pad it with cells that do not exist."""
    stages: list[Any] = [block for block in encoder.modules() if hasattr(block, "input_resolution") and hasattr(block, "window_size")]
    for block in stages:
        grid, window = block.input_resolution, block.window_size
        if any(side % part for side, part in zip(grid, window, strict=True)):
            sides = [side for other in stages for side in other.input_resolution]
            fit = [size for size in range(2, min(max(sides), 32) + 1) if all(side % min(size, side) == 0 for side in sides)]
            near = sorted(sorted(fit, key=lambda size: abs(size - window[0]))[:3])
            fix = f"encoder.window_size={' or '.join(map(str, near))} fits" if fit else "choose another image or patch size"
            raise ValueError(f"windows of {window[0]} x {window[1]} do not fit a stage of {grid[0]} x {grid[1]} cells; {fix}")


@torch.no_grad()
def feature_map(encoder: Backbone) -> tuple[int, Grid]:
    """Width and grid of a backbone's last tokens, computed with an all-zero image. Raises ValueError as patch_tokens does."""
    weight, training = next(encoder.parameters()), encoder.training
    blank = torch.zeros(1, encoder.channels, *encoder.image_size, device=weight.device)
    tokens, grid = patch_tokens(encoder.eval().forward_features(blank), encoder)
    encoder.train(training)
    return tokens.shape[-1], grid


def new_classifier(encoder: Backbone, classes: int) -> None:
    """Give a backbone a classifier with initial weights as in Positional Label's Swin; a distilled DeiT gets two."""
    encoder.reset_classifier(classes)
    classifiers = encoder.get_classifier()
    initialise_layers(classifiers if isinstance(classifiers, tuple) else (classifiers,))
