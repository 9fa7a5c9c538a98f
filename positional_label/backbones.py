"""Tokens of any timm backbone, and the authors' Swin: without relative bias, with a convolution that encodes positions.

Shapes: B images, H x W cells, N = H * W tokens, C channels, W windows with T tokens each.
"""

from math import isqrt
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from common.positions import Grid

Backbone: TypeAlias = Any  # a timm model with `channels` and `image_size`; what timm's models have in common has no type


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


def release_swin(encoder: Backbone, keep_grid: bool) -> None:
    """Change a Swin in place into the authors' version: every block gets a convolution and loses its relative bias.

    keep_grid: the last stage keeps the grid of the stage before it, with global attention (as released with APL).
    Raises ValueError for a backbone that is not a Swin.
    """
    if not isinstance(encoder, SwinTransformer):
        raise ValueError(f"swin='released' changes Swin's blocks, but this is a {type(encoder).__name__}; use swin='plain'")
    stages: Any = encoder.layers
    last = stages[-1]
    if keep_grid:
        last.downsample = Widen(last.downsample)
    for layer in stages:
        for index, block in enumerate(layer.blocks):
            whole = layer.input_resolution if keep_grid and layer is last else None
            layer.blocks[index] = ReleasedBlock(block, whole)


class Widen(nn.Module):
    """Swin's transition between two stages without patch merging: a norm and a linear layer to twice the channels."""

    def __init__(self, merging: PatchMerging):
        super().__init__()
        self.norm = nn.LayerNorm(merging.dim)
        self.reduction = nn.Linear(merging.dim, merging.out_dim, bias=False)
        nn.init.trunc_normal_(self.reduction.weight, std=0.02)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, 2C)."""
        return self.reduction(self.norm(x_BHWC))


class ReleasedBlock(nn.Module):
    """A Swin block whose only position information is a depth-wise 3 x 3 convolution before the first norm.

    It reuses the layers of timm's block; `whole` replaces its windows by one window of that size.
    """

    def __init__(self, block: SwinTransformerBlock, whole: Grid | None = None):
        super().__init__()
        self.window, self.shift, self.heads = block.window_size, block.shift_size, block.attn.num_heads
        if whole is not None:
            self.window, self.shift = (whole[0], whole[1]), (0, 0)
        self.cpe = nn.Conv2d(block.dim, block.dim, 3, padding=1, groups=block.dim)
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = nn.ModuleDict({"qkv": block.attn.qkv, "proj": block.attn.proj})
        self.drop_path1, self.drop_path2 = block.drop_path1, block.drop_path2
        mask = None if block.attn_mask is None or whole is not None else nn.Buffer(block.get_buffer("attn_mask") == 0, persistent=False)
        self.visible_WTT = mask  # pairs of a shifted window that are neighbours in the image

    @property
    def attn_mask(self) -> Tensor | None:
        """The buffer of this name in the official code, (W, T, T): 0 for pairs that see each other, -100 for others."""
        return None if self.visible_WTT is None else torch.where(self.visible_WTT, 0.0, -100.0)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x_BHWC = x_BHWC + self.cpe(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x_BHWC = x_BHWC + self.drop_path1(self._attend(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path2(self.mlp(self.norm2(x_BHWC)))

    def _attend(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        if any(self.shift):
            x_BHWC = x_BHWC.roll((-self.shift[0], -self.shift[1]), (1, 2))
        x_WTC = window_partition(x_BHWC, self.window).flatten(1, 2)
        q, k, v = self.attn["qkv"](x_WTC).view(*x_WTC.shape[:2], 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if q.device.type == "cpu":  # on small windows torch's bf16 attention for CPUs takes ten times as long as its fp32 one
            q, k, v = q.float(), k.float(), v.float()
        visible = None if self.visible_WTT is None else self.visible_WTT.repeat(B, 1, 1)[:, None]
        with torch.autocast(q.device.type, enabled=False):
            x_WTC = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).reshape(x_WTC.shape)
        x_BHWC = window_reverse(self.attn["proj"](x_WTC).unflatten(1, self.window), self.window, H, W)
        return x_BHWC.roll(self.shift, (1, 2)) if any(self.shift) else x_BHWC


@torch.no_grad()
def feature_map(encoder: Backbone) -> tuple[int, Grid]:
    """Width and grid of a backbone's last tokens, computed with an all-zero image. Raises ValueError as patch_tokens does."""
    weight, training = next(encoder.parameters()), encoder.training
    blank = torch.zeros(1, encoder.channels, *encoder.image_size, device=weight.device)
    tokens, grid = patch_tokens(encoder.eval().forward_features(blank), encoder)
    encoder.train(training)
    return tokens.shape[-1], grid
