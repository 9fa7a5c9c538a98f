"""The authors' Swin: without relative bias, with a convolution that encodes positions.

Shapes: B images, H x W cells, C channels, W windows with T tokens each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from common.backbones import Backbone
from common.positions import Grid


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
