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
