"""Position embeddings and position targets on a grid of height x width cells, in row-major order.

Shapes: L cells (height * width), D width.
"""

from typing import Literal

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

Grid = tuple[int, int]


def sincos_2d(grid: Grid, width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2-D sine-cosine embedding, (L, width), as in MAE: the first half encodes the column, the second the row.

    Each half is [sin | cos] over width/4 frequencies temperature^(-k / (width/4)).
    Raises ValueError if the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width that is a multiple of 4, got {width}")
    frequency = temperature ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = _cells(grid).double().unbind(1)
    halves = [torch.outer(axis, frequency) for axis in (column, row)]
    return torch.cat([f(angle) for angle in halves for f in (torch.sin, torch.cos)], dim=1).float()


def resize_positions(embedding_1TD: Tensor, old: Grid, new: Grid, prefix_tokens: int) -> Tensor:
    """Interpolate a position embedding (1, prefix + L, D) from one grid to another (bicubic); prefix tokens are unchanged."""
    return resample_abs_pos_embed(embedding_1TD, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix_tokens)


def absolute_targets(grid: Grid) -> Tensor:
    """The target class of each token for absolute positions: (L,), 0 .. L-1."""
    return torch.arange(grid[0] * grid[1])


def relative_targets(grid: Grid) -> Tensor:
    """The target class of each ordered pair of tokens, its relative offset: (L, L), in Swin's numbering of (2h-1)(2w-1) offsets."""
    cell = _cells(grid)
    down, right = (cell[:, None] - cell[None, :]).unbind(-1)
    return (down + grid[0] - 1) * (2 * grid[1] - 1) + right + grid[1] - 1


def smoothed_targets(
    grid: Grid,
    sigma: float,
    *,
    distance: Literal["squared", "euclidean"] = "squared",
    normalise: Literal["rows", "columns"] = "rows",
    assumed_side: int | None = None,
) -> Tensor:
    """Soft position labels (L, L): row y is the target of a token in cell y (DropPos, position smoothing).

    w(i, j) = exp(-d(i, j) / sigma^2), where d is the squared (official code) or plain (paper's text) Euclidean distance
    in cells. Each row is divided by its sum. sigma = 0 gives one-hot labels.
    Two errors of the release can be reproduced: `normalise="columns"` divides w(i, j) by the sum of row j, and
    `assumed_side` places the cell numbers on a square grid of this side instead of the actual grid; the first L columns
    are used. Raises ValueError for a negative sigma, or an assumed grid with fewer cells than the actual one.
    """
    if sigma < 0:
        raise ValueError(f"sigma={sigma} must not be negative; 0 gives one-hot targets")
    length = grid[0] * grid[1]
    if assumed_side is not None and assumed_side**2 < length:
        raise ValueError(f"assumed_side={assumed_side} has fewer cells than the actual grid {grid[0]} x {grid[1]}")
    cell = _cells(grid if assumed_side is None else (assumed_side, assumed_side)).float()
    if sigma == 0:
        return torch.eye(length)
    d = (cell[:, None] - cell[None, :]).square().sum(-1)
    weight = torch.exp(-(d if distance == "squared" else d.sqrt()) / sigma**2)
    total = weight.sum(1, keepdim=True)
    return (weight / (total if normalise == "rows" else total.T))[:length, :length]


def _cells(grid: Grid) -> Tensor:
    """(row, column) of each cell, (L, 2)."""
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
