"""Inputs that anyone can build: the weights, images and noise on which the official codes printed the golden figures.

All maths in float64, then cast to float32. The counter k runs over a tensor in row-major order.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


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


def numbers(shape: tuple[int, ...], s: int) -> Tensor:
    """z(s): float64 numbers of mean 0 and variance 1 without a pattern, from whole numbers that fit into 64 bits."""
    modulus = 2147483647
    x = (48271 * torch.arange(1, 1 + torch.Size(shape).numel()) + 1103515245 * s) % modulus
    for _ in range(3):
        x = (x * x + 12345) % modulus
    return (12**0.5 * (x.double() / modulus - 0.5)).reshape(shape)


def patternless_weights(official: dict[str, Tensor], fill: float, seed: int) -> dict[str, Tensor]:
    """Rule W on a state dict in official names; the masks of a Swin are counted and keep their values."""
    filled = {}
    for j, name in enumerate(sorted(official)):
        shape, z = official[name].shape, numbers(official[name].shape, 1000 * seed + j)
        if name.endswith("attn_mask"):
            filled[name] = official[name]
        elif name.endswith("bias"):
            filled[name] = (0.2 * z).float()
        elif len(shape) == 1:
            filled[name] = (1 + 0.3 * z).float()
        elif name == "pos_embed":
            filled[name] = (0.5 * z).float()
        else:
            filled[name] = (fill * z / shape[1:].numel() ** 0.5).float()
    return filled


def patternless_images(*shape: int, phase: float, seed: int) -> Tensor:
    """A wave with z added to it."""
    return (torch.sin(0.37 * _counter(shape, 1) + phase) + numbers(shape, 1000 * seed + 999)).float()
