"""Vision Transformer that runs on all tokens or on a kept subset. Its state dict has timm's names.

Shapes: B images, C channels, P patch side, N patches, M kept patches, T tokens (the class token, if any, first), D width,
H heads, K keys.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, RelPosBias
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.attention import Window, attend
from common.masking import gather_tokens
from common.positions import Grid, sincos_2d

# width, depth, heads
SIZES = {
    "micro": (96, 6, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def patchify(images_BCHW: Tensor, patch: int) -> Tensor:
    """Cut images into patches (B, N, C*P*P), cells in row-major order, pixels of a patch in a convolution's order (C, P, P)."""
    B, C, H, W = images_BCHW.shape
    x = images_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // patch) * (W // patch), C * patch * patch)


class PatchEmbed(nn.Module):
    """A convolution of stride P, computed as a matrix product on patches, so that masked patches cost nothing."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, patches_BNP: Tensor) -> Tensor:
        """(B, N, C*P*P) to (B, N, D)."""
        return F.linear(patches_BNP, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention. `relative` (timm's RelPosBias) adds a bias per head and relative offset to the scores."""

    def __init__(self, width: int, heads: int, relative: RelPosBias | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos = relative

    def forward(
        self,
        x_BTD: Tensor,
        keys: int | None = None,
        queries: int | None = None,
        window: Window | None = None,
        scale: nn.Module | None = None,
    ) -> Tensor:
        """Queries: the last `queries` tokens, or all; keys and values: the first `keys` tokens, or all. Returns (B, queries, D).

        `window` defines, for all tokens, which of these keys each token sees; `scale` is a LayerScale. Raises ValueError, as attend
        does, if the window does not fit.
        """
        B, T, D = x_BTD.shape
        keys, queries = keys or T, queries or T
        if keys == queries == T:
            q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        else:
            weights, biases = (parameter.split([D, 2 * D]) for parameter in (self.qkv.weight, self.qkv.bias))
            q_BQD = F.linear(x_BTD[:, T - queries :], weights[0], biases[0])
            kv_BKD = F.linear(x_BTD[:, :keys], weights[1], biases[1])
            q = q_BQD.view(B, queries, self.heads, D // self.heads).transpose(1, 2)
            k, v = kv_BKD.view(B, keys, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        bias = None if self.rel_pos is None else self.rel_pos.get_bias()[0]
        seen: dict = {} if window is None else {"time": window.time[:, -queries:]}
        seen |= {} if window is None else {"visible_from": window.visible_from[:, :keys], "visible_until": window.visible_until[:, :keys]}
        return _scaled(self.proj, scale, attend(q, k, v, bias_HQK=bias, **seen).transpose(1, 2).reshape(B, queries, D))


class Block(nn.Module):
    """Pre-norm Transformer block with optional LayerScale and stochastic depth. `grad_checkpointing` as in ViT."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        relative: RelPosBias | None = None,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, relative)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BTD: Tensor, keys: int | None = None, queries: int | None = None, window: Window | None = None) -> Tensor:
        """`keys`, `queries` and `window` as in Attention. Returns the query tokens, (B, queries, D)."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BTD, keys, queries, window, use_reentrant=False)
        return self._forward(x_BTD, keys, queries, window)

    def _forward(self, x_BTD: Tensor, keys: int | None, queries: int | None, window: Window | None) -> Tensor:
        query_BQD = x_BTD[:, -(queries or 0) :]
        query_BQD = self._add(query_BQD, self.attn(self.norm1(x_BTD), keys, queries, window, self.ls1))
        hidden_BQD = self.mlp.act(self.mlp.fc1(self.norm2(query_BQD)))
        return self._add(query_BQD, _scaled(self.mlp.fc2, self.ls2, hidden_BQD))  # type: ignore[arg-type]  # no Conv2d here

    def _add(self, x_BQD: Tensor, branch_BQD: Tensor) -> Tensor:
        """x + drop_path(branch), in one pass."""
        if not self.training or not self.drop_path.drop_prob:
            return x_BQD + branch_BQD
        return torch.addcmul(x_BQD, branch_BQD, self.drop_path(x_BQD.new_ones(len(x_BQD), 1, 1)))


def _scaled(layer: nn.Linear, scale: nn.Module | None, x_BTD: Tensor) -> Tensor:
    """A linear layer followed by a LayerScale (or none). The scale is multiplied into the weights, which are smaller than the tokens."""
    if not isinstance(scale, LayerScale):
        return layer(x_BTD)
    return F.linear(x_BTD, scale.gamma[:, None] * layer.weight, scale.gamma * layer.bias)


class ViT(nn.Module):
    """Vision Transformer encoder.

    image_size and patch_size: in pixels. position: "sincos" (fixed, saved, never trained) or "learned" (both are added to the
    tokens), "relative" (added to the attention scores, one table per block, initialised to zero) or "none". layer_scale: initial
    value of LayerScale. drop_path: rate of the last block; rates increase linearly from 0. grad_checkpointing: recompute the
    activations of the blocks in the backward pass instead of storing them: less memory, a third more time.
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        position: Literal["sincos", "learned", "relative", "none"] = "sincos",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.patch_size, self.channels, self.width = patch_size, channels, width
        if any(side % patch_size or side < patch_size for side in self.image_size):
            raise ValueError(f"image size {self.image_size[0]} x {self.image_size[1]} is not a multiple of the patch size {patch_size}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        if position not in ("sincos", "learned", "relative", "none"):
            raise ValueError(f"position={position!r} is not known; choose 'sincos', 'learned', 'relative' or 'none'")
        self.grid: Grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.prefix_tokens, self.relative = int(class_token), position == "relative"
        tokens = self.prefix_tokens + self.grid[0] * self.grid[1]

        self.patch_embed = PatchEmbed(channels, patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
        if position == "sincos":
            table = torch.cat([torch.zeros(self.prefix_tokens, width), sincos_2d(self.grid, width)])
            self.pos_embed: Tensor | None = nn.Buffer(table[None])
        elif position == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        else:
            self.pos_embed = None
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        relative = [RelPosBias(self.grid, heads, self.prefix_tokens) if self.relative else None for _ in rates]
        blocks = (
            Block(width, heads, mlp_ratio, layer_scale, *options, grad_checkpointing) for options in zip(rates, relative, strict=True)
        )
        self.blocks = nn.Sequential(*blocks)
        self.norm: nn.Module = nn.LayerNorm(width, eps=1e-6)
        initialise(self)

    def embed(self, images_BCHW: Tensor, keep_BM: Tensor | None = None) -> Tensor:
        """Return patch tokens without position: all, (B, N, D), or those at the indices `keep`, in that order, (B, M, D)."""
        if images_BCHW.shape[1:] != (self.channels, *self.image_size):
            raise ValueError(f"expected images of {(self.channels, *self.image_size)}, got {tuple(images_BCHW.shape[1:])}")
        patches_BNP = patchify(images_BCHW, self.patch_size)
        return self.patch_embed(patches_BNP if keep_BM is None else gather_tokens(patches_BNP, keep_BM))

    @property
    def patch_positions(self) -> Tensor:
        """The position embedding of the patches, (1, N, D)."""
        assert self.pos_embed is not None
        return self.pos_embed[:, self.prefix_tokens :]

    @property
    def first_token(self) -> Tensor:
        """The class token, with its position where there are positions, (1, 1, D)."""
        assert self.cls_token is not None
        return self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]

    def encode(self, x_BMD: Tensor, context: int | None = None) -> Tensor:
        """Prepend the class token, run the blocks and the final norm: (B, M, D) to (B, T, D).

        With `context`, the keys in every block are only the class token and the first `context` of the M tokens (MP3).
        Raises ValueError if `context` is not within 1 .. M, and for a subset of the patches with relative positions.
        """
        return self._encode(x_BMD, context)[-1]

    def _encode(self, x_BMD: Tensor, context: int | None = None, count: int = 1) -> list[Tensor]:
        """Return the outputs of the last `count` blocks, each after the final norm."""
        if context is not None and not 0 < context <= x_BMD.shape[1]:
            raise ValueError(f"context={context}: choose 1 to {x_BMD.shape[1]}, the number of tokens of {tuple(x_BMD.shape)}")
        if self.relative and (context is not None or x_BMD.shape[1] != self.grid[0] * self.grid[1]):
            raise ValueError(f"relative positions need all {self.grid[0]} x {self.grid[1]} patches as keys, in row-major order")
        if self.cls_token is not None:
            x_BMD = torch.cat([self.first_token.to(x_BMD.dtype).expand(x_BMD.shape[0], -1, -1), x_BMD], dim=1)
        keys = None if context is None else self.prefix_tokens + context
        normed = []
        for number, block in enumerate(self.blocks, 1):
            x_BMD = block(x_BMD, keys)
            if number > len(self.blocks) - count:
                normed.append(self.norm(x_BMD))
        return normed

    def forward(self, images_BCHW: Tensor, keep_BM: Tensor | None = None) -> Tensor:
        """Images to tokens (B, T, D) after the final norm, of all patches or of those at the indices `keep`."""
        return self.encode(self._place(images_BCHW, keep_BM))

    def last_blocks(self, images_BCHW: Tensor, count: int) -> list[Tensor]:
        """Return the tokens (B, T, D) after each of the last `count` blocks and the final norm; the last entry equals forward's output.

        VISSL's linear probes use several layers in this way. Raises ValueError if `count` is not within 1 .. number of blocks.
        """
        if not 1 <= count <= len(self.blocks):
            raise ValueError(f"the last {count} blocks were requested; this encoder has {len(self.blocks)}: choose 1 to {len(self.blocks)}")
        return self._encode(self._place(images_BCHW), count=count)

    def levels(self, images_BCHW: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the tokens (B, T, D) after the blocks of these numbers, from 0, without the final norm: levels of a feature pyramid."""
        x_BTD, found = self._place(images_BCHW), []
        if self.cls_token is not None:
            x_BTD = torch.cat([self.first_token.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1), x_BTD], dim=1)
        for number in range(max(blocks) + 1):
            x_BTD = self.blocks[number](x_BTD)
            if number in blocks:
                found.append(x_BTD)
        return found

    def _place(self, images_BCHW: Tensor, keep_BM: Tensor | None = None) -> Tensor:
        """Return patch tokens, each with the position embedding of its cell added."""
        x = self.embed(images_BCHW, keep_BM)
        if self.pos_embed is None:
            return x
        return x + (self.patch_positions if keep_BM is None else gather_tokens(self.patch_positions, keep_BM))


def vit(size: str, **options: Any) -> ViT:
    """Build a ViT of a named size (micro, tiny, small, base, large, huge); options as in ViT. `depth` overrides that of the size.

    Raises ValueError for an unknown name.
    """
    if size not in SIZES:
        raise ValueError(f"ViT size {size!r} is not known; choose one of {', '.join(SIZES)}")
    width, depth, heads = SIZES[size]
    return ViT(width=width, heads=heads, **{"depth": depth} | options)


def initialise(module: nn.Module) -> None:
    """Apply MAE's initialisation, also used by DropPos: Xavier-uniform matrices, zero biases, tokens and learned positions N(0, 0.02).

    The patch convolution is initialised as a matrix, and its bias keeps torch's default. Relative positions start at zero.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, PatchEmbed):
            nn.init.xavier_uniform_(layer.proj.weight.view(layer.proj.weight.shape[0], -1))
        elif isinstance(layer, RelPosBias):
            nn.init.zeros_(layer.relative_position_bias_table)
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith(("token", "pos_embed")):
            nn.init.normal_(parameter, std=0.02)
