"""Masks as indices or ranks of tokens, never as a tokens x tokens matrix.

Shapes: B images, N tokens, M kept tokens. In multi-block masks: G target blocks of T cells, H x W cells of the grid.
"""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from common.positions import Grid
from common.randomness import generator


def kept_tokens(tokens: int, hidden_ratio: float, name: str) -> int:
    """Number of tokens that remain if the fraction `hidden_ratio` is masked: int(tokens * (1 - ratio)), as in MAE and DropPos.

    Raises ValueError, with the argument's `name`, for a ratio outside [0, 1] and for one that leaves no token.
    """
    if type(hidden_ratio) not in (int, float) or not 0 <= hidden_ratio <= 1:
        raise ValueError(f"{name}={hidden_ratio!r} is not a fraction between 0 and 1")
    kept = int(tokens * (1 - hidden_ratio))
    if kept == 0:
        raise ValueError(f"{name}={hidden_ratio} leaves none of the {tokens} tokens; use a ratio below {1 - 1 / tokens:.4g}")
    return kept


def random_order(noise_BN: Tensor) -> Tensor:
    """A random order of the tokens of each image: the indices (B, N) that sort the noise, lowest first."""
    return noise_BN.argsort(dim=1)


def permutation_ranks(order_BN: Tensor) -> Tensor:
    """The inverse of an order: ranks (B, N), where ranks[b, order[b, i]] = i."""
    rank_BN = torch.empty_like(order_BN)
    return rank_BN.scatter_(1, order_BN, torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN))


def gather_tokens(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """The tokens x[b, index[b, m]], (B, M, D). x may have one image (B = 1) for an index of several images."""
    x_BND = x_BND.expand(index_BM.shape[0], -1, -1)
    return x_BND.gather(1, index_BM[:, :, None].expand(-1, -1, x_BND.shape[2]))


class MultiBlock:
    """I-JEPA's masks (Assran et al. 2023, section 3): `blocks` target blocks per image, and a context that excludes their cells.

    A target covers a fraction of the grid within `target_scale`, with an aspect ratio (height / width, relative to that of the grid) within
    `target_aspect`. The context is part of a block with the grid's shape that covers a fraction within `context_scale`. All images of a
    step have blocks of the same size.

    sampling="uniform": every cell can be target or context. Sizes and places are drawn uniformly from all that are possible. Each context
    has int(context_ratio N) cells, drawn from the allowed ones; if these are too few, other cells are added, target cells last.

    sampling="released": draws exactly the masks of the official collators for the same state of torch's CPU generator. One draw sets scale
    and aspect; the last row and column are never used; a context with `min_keep` cells or fewer is drawn again, and after every 20 tries
    may overlap with one more target; the contexts of a batch are truncated to the shortest, which removes their last rows.

    Raises ValueError if the grid has no such blocks, with values that fit.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        sampling: Literal["uniform", "released"] = "uniform",
        blocks: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        context_ratio: float = 0.25,
        min_keep: int = 10,
    ):
        if sampling not in ("uniform", "released"):
            raise ValueError(f"masks={sampling!r} is not known; choose 'uniform' or 'released'")
        for name, (low, high) in {"target_scale": target_scale, "target_aspect": target_aspect, "context_scale": context_scale}.items():
            if not 0 < low <= high or ("scale" in name and high > 1):
                raise ValueError(f"{name}=({low}, {high}) is not a range (low, high) with 0 < low <= high; a scale is at most 1")
        self.grid, self.cells, self.sampling, self.blocks, self.min_keep = grid, grid[0] * grid[1], sampling, blocks, min_keep
        self.target_scale, self.target_aspect, self.context_scale = target_scale, target_aspect, context_scale
        if sampling == "released":
            self._check_released()
            return
        self.target_sizes = self._sizes("target_scale", target_scale, target_aspect)
        self.context_sizes = self._sizes("context_scale", context_scale, (1, 1))
        self.context, largest = int(context_ratio * self.cells), max(map(math.prod, self.target_sizes))
        if not 0 < self.context <= self.cells - largest:
            fit = f"{1 / self.cells:.3g} to {1 - largest / self.cells:.3g}"
            raise ValueError(f"context_ratio={context_ratio} of {self.cells} cells, of which one target takes up to {largest}: use {fit}")

    def __call__(self, images: int, step: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return the cells of the contexts (B, M), in ascending order, and of the targets (G, B, T). Sizes depend only on the step, so
        that all processes agree; places are drawn from the global generators."""
        return self._released(images, step, device) if self.sampling == "released" else self._uniform(images, step, device)

    def _uniform(self, images: int, step: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        draws = torch.rand(2, generator=generator(step))
        target, context = (
            sizes[int(draw * len(sizes))] for sizes, draw in zip((self.target_sizes, self.context_sizes), draws, strict=True)
        )
        corner_GB2 = self._corners(target, (self.blocks, images), device)
        inside_BN = self._inside(self._corners(context, (images,), device), context)
        taken_BN = self._inside(corner_GB2, target).any(0)
        order_BN = random_order(torch.rand(images, self.cells, device=device) + ~inside_BN + 2 * taken_BN)
        return order_BN[:, : self.context].sort(1).values, self._block_cells(corner_GB2, target)

    def _released(self, images: int, step: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        target, context = self._released_sizes(*torch.rand(2, generator=torch.Generator().manual_seed(step)).tolist())
        # Each target and each try of a context takes two draws. The tries of an image are known only after those of the images before it.
        draws, failures_B = _raw_draws(2 * (self.blocks + 1) * images), torch.zeros(images, dtype=torch.int64)
        while True:
            tried_B = failures_B.cumsum(0)
            first_B = 2 * (self.blocks + 1) * torch.arange(images) + 2 * (tried_B - failures_B)
            corner_GB2 = self._released_corners(draws, first_B + 2 * torch.arange(self.blocks)[:, None], target)
            corner_B2 = self._released_corners(draws, first_B + 2 * self.blocks + 2 * failures_B, context)
            avoided_GB = torch.arange(self.blocks)[:, None] < self.blocks - failures_B // 20
            taken_BN = (self._inside(corner_GB2, target) & avoided_GB[..., None]).any(0)
            context_BN = self._inside(corner_B2, context) & ~taken_BN
            length_B = context_BN.sum(1)
            short_B = length_B <= self.min_keep
            if not short_B.any():
                break
            failures_B[short_B.int().argmax()] += 1
            draws = torch.cat([draws, _raw_draws(2)])
        ascending_BN = (~context_BN).int().sort(dim=1, stable=True).indices
        context_BM = ascending_BN[:, : int(length_B.min())]
        return context_BM.to(device, non_blocking=True), self._block_cells(corner_GB2, target).to(device, non_blocking=True)

    def _corners(self, size: Grid, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """Draw top and left of blocks anywhere on the grid, (*shape, 2)."""
        draws = torch.rand(*shape, 2, device=device).unbind(-1)
        places = (side - block + 1 for side, block in zip(self.grid, size, strict=True))  # plain numbers: a tensor would wait for the GPU
        return torch.stack([draw * count for draw, count in zip(draws, places, strict=True)], -1).long()

    def _released_corners(self, draws: Tensor, first: Tensor, size: Grid) -> Tensor:
        """As `_corners`, from the two draws at each index `first`; never in the last row or column."""
        places = torch.tensor([side - block for side, block in zip(self.grid, size, strict=True)])
        return torch.stack([draws[first], draws[first + 1]], -1) % places

    def _inside(self, corner_2: Tensor, size: Grid) -> Tensor:
        """Which cells the block at each corner (..., 2) covers, (..., N) bool."""
        rows, columns = (
            (torch.arange(side, device=corner_2.device) - start[..., None]).div(block, rounding_mode="floor") == 0
            for side, start, block in zip(self.grid, corner_2.unbind(-1), size, strict=True)
        )
        return (rows[..., :, None] & columns[..., None, :]).flatten(-2)

    def _block_cells(self, corner_2: Tensor, size: Grid) -> Tensor:
        """The cells of the block at each corner (..., 2) in row-major order, (..., T)."""
        down, right = (torch.arange(side, device=corner_2.device) for side in size)
        top, left = (start[..., None, None] for start in corner_2.unbind(-1))
        return ((top + down[:, None]) * self.grid[1] + left + right).flatten(-2)

    def _sizes(self, name: str, scale: tuple[float, float], aspect: tuple[float, float]) -> list[Grid]:
        """All block sizes within the ranges."""
        (H, W), slack = self.grid, 1e-9
        ratios = {(h, w): h * W / (w * H) for h, w in itertools.product(range(1, H + 1), range(1, W + 1))}
        fraction = {size: math.prod(size) / self.cells for size in ratios if aspect[0] - slack <= ratios[size] <= aspect[1] + slack}
        found = [size for size in fraction if scale[0] - slack <= fraction[size] <= scale[1] + slack]
        if not found:
            nearest = min(fraction, key=lambda size: max(scale[0] - fraction[size], fraction[size] - scale[1]), default=self.grid)
            fits = f"({min(scale[0], fraction.get(nearest, 1)):.3g}, {max(scale[1], fraction.get(nearest, 1)):.3g})"
            raise ValueError(
                f"{name}={scale}: a grid of {H} x {W} cells has no block with this fraction and a height / width from {aspect[0]} to "
                f"{aspect[1]}; the nearest is {nearest[0]} x {nearest[1]}: use a larger grid, or {name}={fits}"
            )
        return found

    def _released_sizes(self, target_draw: float, context_draw: float) -> tuple[Grid, Grid]:
        """Height and width of the targets and of the contexts, from a uniform number for each."""
        sizes: list[Grid] = []
        for draw, scale, aspect in (target_draw, self.target_scale, self.target_aspect), (context_draw, self.context_scale, (1.0, 1.0)):
            fraction, ratio = (low + draw * (high - low) for low, high in (scale, aspect))
            area = int(self.cells * fraction)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            sizes.append((min(height, self.grid[0] - 1), min(width, self.grid[1] - 1)))
        return sizes[0], sizes[1]

    def _check_released(self) -> None:
        """Raise ValueError if a block cannot have more than `min_keep` cells: the official collators would never return."""
        smallest = min((size for draw in range(1000) for size in self._released_sizes(draw / 1000, draw / 1000)), key=math.prod)
        if math.prod(smallest) <= self.min_keep:
            fits = f"use min_keep={math.prod(smallest) - 1} or less" if math.prod(smallest) else "use a larger grid"
            raise ValueError(
                f"min_keep={self.min_keep}: on a grid of {self.grid[0]} x {self.grid[1]} cells some blocks have only {smallest[0]} "
                f"x {smallest[1]} cells, and the released sampling would never end: {fits}, or masks='uniform'"
            )


def _raw_draws(count: int) -> Tensor:
    """The next `count` (even) 32-bit numbers of torch's CPU generator; torch.randint uses one of them per draw, modulo its range."""
    pairs = torch.empty(count // 2, dtype=torch.int64).random_(-(2**63), None)
    return torch.stack([pairs >> 32 & 0xFFFFFFFF, pairs & 0xFFFFFFFF], 1).flatten()
