"""Inputs that anyone can build: the weights, images and noise on which the official codes printed the golden figures.

All maths in float64, then cast to float32. The counter k runs over a tensor in row-major order.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
MODULUS = 2147483647


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def _counter(shape: tuple[int, ...], start: int) -> Tensor:
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def weights(official: dict[str, Tensor], untouched: tuple[str, ...], fill: tuple[float, float] = (0.15, 1.3)) -> dict[str, Tensor]:
    """Rule S(a, b) on a state dict in official names; the names in `untouched` keep their values."""
    filled = {}
    for j, name in enumerate(sorted(official)):
        k = _counter(official[name].shape, 1)
        if name in untouched:
            filled[name] = official[name]
        elif "norm" in name and name.endswith("weight"):
            filled[name] = (1 + 0.1 * torch.sin(0.7 * k + j)).float()
        elif name.endswith("bias"):
            filled[name] = (0.05 * torch.sin(0.9 * k + j)).float()
        else:
            filled[name] = (fill[0] * torch.sin(fill[1] * k + j)).float()
    return filled


def images(*shape: int, phase: float = 0.2) -> Tensor:
    """Rule I."""
    return (1.5 * torch.sin(0.37 * _counter(shape, 1) + phase)).float()


def noise(*shape: int, s: int) -> Tensor:
    """Rule U."""
    return (torch.sin(12.9898 * _counter(shape, 1) + 78.233 * s) * 43758.5453).remainder(1).float()


def whole_numbers(shape: tuple[int, ...], s: int) -> Tensor:
    """x(s): int64 numbers without a pattern, below 2147483647; nothing on the way goes beyond 64 bits."""
    x = (48271 * torch.arange(1, 1 + torch.Size(shape).numel()) + 1103515245 * s) % MODULUS
    for _ in range(3):
        x = (x * x + 12345) % MODULUS
    return x.reshape(shape)


def numbers(shape: tuple[int, ...], s: int) -> Tensor:
    """z(s): float64 numbers of mean 0 and variance 1, from x(s)."""
    return 12**0.5 * (whole_numbers(shape, s).double() / MODULUS - 0.5)


def patternless_weights(official: dict[str, Tensor], fill: float, seed: int, untouched: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Rule W on a state dict in official names; `untouched` ones, and what a Swin computes itself, are counted and keep their values."""
    filled = {}
    for j, name in enumerate(sorted(official)):
        if name.endswith(("attn_mask", "relative_position_index")) or name in untouched:
            filled[name] = official[name]
            continue
        shape, z = official[name].shape, numbers(official[name].shape, 1000 * seed + j)
        if name.endswith("bias"):
            filled[name] = (0.2 * z).float()
        elif len(shape) == 1:
            filled[name] = (1 + 0.3 * z).float()
        elif name in ("pos_embed", "pos_embedding", "cls_token"):
            filled[name] = (0.5 * z).float()
        else:
            filled[name] = (fill * z / shape[1:].numel() ** 0.5).float()
    return filled


def patternless_images(*shape: int, phase: float, seed: int) -> Tensor:
    """A wave with z added to it."""
    return (torch.sin(0.37 * _counter(shape, 1) + phase) + numbers(shape, 1000 * seed + 999)).float()


def relative_error(found: list[float], official: list[float]) -> float:
    """The largest difference divided by the largest official value."""
    return max(abs(a - b) for a, b in zip(found, official, strict=True)) / max(map(abs, official))


def shift_mask(windows: int, cells: int) -> Tensor:
    """The buffer (W, T, T) of an official Swin on a square grid: 0 for two patches of a shifted window that are neighbours in the image,
    else -100."""
    side, window = round((windows * cells) ** 0.5), round(cells**0.5)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).reshape(side, side, 2)
    shifted = place.roll((-(window // 2), -(window // 2)), (0, 1))
    count = side // window
    cell_WT2 = shifted.reshape(count, window, count, window, 2).transpose(1, 2).reshape(windows, cells, 2)
    near_WTT = ((cell_WT2[:, :, None] - cell_WT2[:, None]).abs() < window).all(-1)
    return torch.where(near_WTT, 0.0, -100.0)


def swin_buffers(depths: list[int], side: int, window: int) -> dict[str, Tensor]:
    """What an official Swin saves besides its parameters: an index per block, and a mask where the windows are shifted."""
    cell = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    down, right = (cell[:, None] - cell[None, :] + window - 1).unbind(-1)
    found = {}
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            found[f"{name}.attn.relative_position_index"] = down * (2 * window - 1) + right
            if block % 2 and side >> stage > window:
                found[f"{name}.attn_mask"] = shift_mask((side >> stage) ** 2 // window**2, window**2)
    return found
