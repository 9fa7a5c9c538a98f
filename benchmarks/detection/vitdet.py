"""The backbone of ViTDet (Li et al. 2022, arXiv 2203.16527): a plain ViT with attention in windows, and a pyramid from its last map.

Shapes: B images, C channels, H x W pixels, h x w patches, D width, A heads, S side of a window, Q windows of all images.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.positions import resize_positions
from common.recipe import RecipeError
from common.vit import Attention, Block, ViT, patchify

PATCH = 16  # pixels; the anchors and the strides of the pyramid are made for it
LEVELS = ("p2", "p3", "p4", "p5", "p6")  # strides 4, 8, 16, 32 and 64


class WindowedViT(nn.Module):
    """The blocks of a ViT on a map of patches, without class token and without the final norm (ViTDet, section 3).

    Attention is within windows of `window` x `window` patches, and global in `global_blocks` blocks: the last of each of so many equal
    parts. Maps that are no multiple of the window are padded with zeros to the right and below. relative_positions: add a learned score
    for the distance in rows and one for that in columns (decomposed relative positions, Li et al. 2021, arXiv 2112.01526), both from zero.
    The modules of the ViT are used, not copied. Raises RecipeError for an encoder or settings that do not fit.
    """

    def __init__(self, vit: ViT, window: int = 14, global_blocks: int = 4, relative_positions: bool = True):
        super().__init__()
        if vit.patch_size != PATCH:
            raise RecipeError(
                f"the encoder has patches of {vit.patch_size} pixels: detection needs {PATCH}, for the strides of its pyramid"
            )
        if vit.relative:
            raise RecipeError("the encoder has relative positions of all pairs of patches (position=relative), which do not fit windows")
        if window < 1:
            raise RecipeError(f"window={window}: give the side of a window in patches, from 1 up")
        depth = len(vit.blocks)
        if not 0 <= global_blocks <= depth:
            raise RecipeError(f"global_blocks={global_blocks}: the encoder has {depth} blocks, so choose 0 to {depth}")
        self.grid, self.width, self.channels, self.window = vit.grid, vit.width, vit.channels, window
        self.global_blocks = {(part + 1) * depth // global_blocks - 1 for part in range(global_blocks)}
        self.patch_embed, self.blocks = vit.patch_embed, vit.blocks
        # trained even where the pre-training keeps them fixed, as in ViTDet
        self.pos_embed = None if vit.pos_embed is None else nn.Parameter(vit.patch_positions.detach().clone())
        if relative_positions:
            grids = [vit.grid if number in self.global_blocks else (window, window) for number in range(depth)]
            pairs: Any = zip(self.blocks, grids, strict=True)
            self.relative: nn.ModuleList | None = nn.ModuleList(RelativePositions(block.attn, grid) for block, grid in pairs)
        else:
            self.relative = None

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images to the map of the last block, (B, D, h, w). Raises ValueError if H or W is no multiple of a patch."""
        height, width = images_BCHW.shape[2:]
        if height % PATCH or width % PATCH:
            raise ValueError(f"images of {height} x {width} pixels are no multiple of a patch of {PATCH}: pad them")
        grid = height // PATCH, width // PATCH
        x_BND = self.patch_embed(patchify(images_BCHW, PATCH))
        if self.pos_embed is not None:
            x_BND = x_BND + (self.pos_embed if grid == self.grid else resize_positions(self.pos_embed, self.grid, grid, 0))
        x_BhwD = x_BND.unflatten(1, grid)
        block: Any
        for number, block in enumerate(self.blocks):
            relative: Any = None if self.relative is None else self.relative[number]
            side = None if number in self.global_blocks else self.window
            if block.grad_checkpointing and torch.is_grad_enabled():
                x_BhwD = checkpoint(run_block, block, x_BhwD, side, relative, use_reentrant=False)
            else:
                x_BhwD = run_block(block, x_BhwD, side, relative)
        return x_BhwD.permute(0, 3, 1, 2)


class RelativePositions(nn.Module):
    """Scores for the distance of two patches in rows and in columns, from the query; the heads share them. A table has 2 side - 1 rows."""

    def __init__(self, attention: Attention, grid: tuple[int, int]):
        super().__init__()
        width = attention.qkv.in_features // attention.heads
        self.rows = nn.Parameter(torch.zeros(2 * grid[0] - 1, width))
        self.columns = nn.Parameter(torch.zeros(2 * grid[1] - 1, width))

    def forward(self, q_QAND: Tensor, k_QAND: Tensor, v_QAND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention with these scores, (Q, A, N, D / A). N patches in row-major order of a grid.

        The scores are part of the product of longer queries and keys: a query has its score for each row and each column, a key has a one
        at its row and its column. So no scores of all pairs are stored, and the fused kernels of attention take it.
        """
        q_QAhwD, width = q_QAND.unflatten(2, grid), q_QAND.shape[-1]
        rows = torch.einsum("qahwd,hkd->qahwk", q_QAhwD, _by_distance(self.rows, grid[0]).to(q_QAND.dtype))
        columns = torch.einsum("qahwd,wkd->qahwk", q_QAhwD, _by_distance(self.columns, grid[1]).to(q_QAND.dtype))
        scores_QANS = torch.cat([rows, columns], -1).flatten(2, 3) * width**0.5  # attention divides all scores by this
        ones_h, ones_w = (torch.eye(side, dtype=q_QAND.dtype, device=q_QAND.device) for side in grid)
        place_NS = torch.cat([ones_h.repeat_interleave(grid[1], 0), ones_w.repeat(grid[0], 1)], -1)
        query = torch.cat([q_QAND, scores_QANS], -1)
        key = torch.cat([k_QAND, place_NS.expand(*k_QAND.shape[:2], -1, -1)], -1)
        # the fused kernels of a GPU want values of the same width; on a CPU the plain one is faster than the fused one at this width
        value = F.pad(v_QAND, (0, sum(grid))) if v_QAND.is_cuda else v_QAND
        return F.scaled_dot_product_attention(query, key, value, scale=width**-0.5)[..., :width]


def _by_distance(table: Tensor, side: int) -> Tensor:
    """The entry for each pair (query, key) along one side, (side, side, D / A); a table for another side is interpolated linearly."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None].float(), size=2 * side - 1, mode="linear")[0].T
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1]


def run_block(block: Block, x_BhwD: Tensor, window: int | None, relative: RelativePositions | None) -> Tensor:
    """A block on a map, with attention within windows, or global without `window`."""
    x_BhwD = x_BhwD + block.drop_path(block.ls1(windowed_attention(block.attn, block.norm1(x_BhwD), window, relative)))
    return x_BhwD + block.drop_path(block.ls2(block.mlp(block.norm2(x_BhwD))))


def windowed_attention(attention: Attention, x_BhwD: Tensor, window: int | None, relative: RelativePositions | None = None) -> Tensor:
    """Self-attention of a map within windows, or global without `window`. Padded patches are zero before the layer and take part in it."""
    B, h, w, D = x_BhwD.shape
    sides = (h, w) if window is None else (window, window)
    below, right = -h % sides[0], -w % sides[1]
    down, across = (h + below) // sides[0], (w + right) // sides[1]
    # of a patch that is zero the layer's output is its bias, so only the others are multiplied
    qkv = F.pad(F.linear(x_BhwD, attention.qkv.weight), (0, 0, 0, right, 0, below)) + attention.qkv.bias
    qkv = qkv.view(B, down, sides[0], across, sides[1], 3, attention.heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = qkv.reshape(3, B * down * across, attention.heads, sides[0] * sides[1], -1)
    out_QAND = F.scaled_dot_product_attention(q, k, v) if relative is None else relative(q, k, v, sides)
    out = out_QAND.view(B, down, across, attention.heads, *sides, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return attention.proj(out.reshape(B, h + below, w + right, D)[:, :h, :w])


class SimpleFeaturePyramid(nn.Module):
    """A ViT with maps of strides 4, 8, 16 and 32 pixels, all from its last map, and one of stride 64 by max pooling (ViTDet, section 3).

    Each map gets a 1 x 1 and a 3 x 3 convolution to `channels`, with a LayerNorm over channels after both.
    """

    def __init__(self, net: WindowedViT, channels: int = 256):
        super().__init__()
        self.net, self.out_channels, D = net, channels, net.width
        scales: list[list[nn.Module]] = [
            [_double(D, D // 2), LayerNorm2d(D // 2), nn.GELU(), _double(D // 2, D // 4)],
            [_double(D, D // 2)],
            [],
            [nn.MaxPool2d(2)],
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scale,
                nn.Conv2d(inner, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for scale, inner in zip(scales, (D // 4, D // 2, D, D), strict=True)
        )

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Images to the maps p2 to p6, (B, channels, H / stride, W / stride)."""
        last = self.net(images_BCHW)
        maps = [level(last) for level in self.levels]
        return OrderedDict(zip(LEVELS, [*maps, F.max_pool2d(maps[-1], 1, 2)], strict=True))


def _double(inner: int, outer: int) -> nn.Module:
    return nn.ConvTranspose2d(inner, outer, 2, stride=2)
