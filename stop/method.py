"""StoP (Bar et al., ICML 2024, arXiv 2308.00566) and I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243), in the papers' order.

A ViT (the context encoder) encodes a part of the patches. From its features a narrow predictor predicts the features that an EMA copy (the
target encoder) computes for four target blocks. I-JEPA gives the predictor the exact positions of the blocks. StoP adds Gaussian noise to
them, through the same projection as the features: the model cannot shrink the noise without shrinking the features too.

Shapes: B images, N patches, M of the context, G target blocks of T patches, D width, P width of the predictor.
"""

import copy
import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.heads import initialise_layers
from common.masking import MultiBlock, gather_tokens
from common.method import Output
from common.positions import sincos_2d
from common.vit import Block, ViT, initialise
from stop.collapse import SPREAD
from stop.collapse import spread as spread


class Predictor(nn.Module):
    """A narrow ViT that tells features of hidden patches from those of the context. It has positions of its own, of width P."""

    def __init__(self, encoder: ViT, width: int, depth: int, position: Literal["sincos", "learned"], mask_token: bool):
        super().__init__()
        first = encoder.blocks[0]
        heads, cells = first.attn.heads, encoder.grid[0] * encoder.grid[1]
        if position not in ("sincos", "learned"):
            raise ValueError(f"position={position!r} is not known; choose 'sincos' or 'learned'")
        if width % heads or width % 4:
            raise ValueError(f"predictor_width={width} is not a multiple of 4 and of the encoder's {heads} heads")
        self.embed = nn.Linear(encoder.width, width)
        if position == "sincos":
            self.register_buffer("pos_embed", sincos_2d(encoder.grid, width)[None])
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, cells, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if mask_token else None
        self.blocks = nn.Sequential(*(Block(width, heads, grad_checkpointing=first.grad_checkpointing) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, encoder.width)
        initialise(self)

    def forward(self, x_CSP: Tensor, hidden: int) -> Tensor:
        """Sequences (C, S, P), the hidden patches last, to features of those (C, T, D). The last block has no use for the others."""
        *blocks, last = self.blocks
        for block in blocks:
            x_CSP = block(x_CSP)
        return self.head(self.norm(last(x_CSP, queries=hidden)))


class StoP(nn.Module):
    """StoP around two encoders with fixed or learned positions and without class token: the one that is given becomes `target_encoder`, an
    average (EMA) of the other, which the papers evaluate; a copy is `context_encoder`, which learns.

    mode: "paper" (a hidden patch has a mask token beside position and noise, equation 6) or "released" (the projection's bias in its
    place). noise: who gets noise, "masked" patches, the "context", "both" (Table 7), or "none": I-JEPA. sigma: its standard deviation, in
    units of encoder features. covariance: noise through the context's projection ("tied", equation 6) or straight into the predictor
    ("fixed", Figure 3). position: the predictor's, "sincos" or "learned" (Table 6). masks: "uniform" or "released", with
    target_scale and the like as in common.masking.MultiBlock. momentum: of the target encoder at first; it rises linearly to 1.
    init_std, patch_std: stds of all matrices and of the patch embedding at first; .02 is too little for narrow ViTs or small patches.
    Raises ValueError for values that make no sense and, as MultiBlock, for a grid that is too small.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        mode: Literal["paper", "released"] = "paper",
        noise: Literal["masked", "context", "both", "none"] = "masked",
        sigma: float = 0.25,
        covariance: Literal["tied", "fixed"] = "tied",
        position: Literal["sincos", "learned"] = "sincos",
        masks: Literal["uniform", "released"] = "uniform",
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        context_ratio: float = 0.25,
        min_keep: int = 10,
        momentum: float = 0.996,
        init_std: float = 0.02,
        patch_std: float = 0.02,
        predictor_width: int = 384,
        predictor_depth: int = 6,
    ):
        super().__init__()
        if encoder.pos_embed is None or encoder.cls_token is not None:
            raise ValueError("I-JEPA and StoP know patches and where they are: the encoder needs positions, and no class token")
        choices = {"mode": (mode, "paper", "released"), "noise": (noise, "masked", "context", "both", "none")}
        for name, (value, *known) in (choices | {"covariance": (covariance, "tied", "fixed")}).items():
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}")
        for name, value in {"sigma": sigma, "init_std": init_std, "patch_std": patch_std, "momentum": momentum}.items():
            if not isinstance(value, int | float) or not 0 <= value <= (1 if name == "momentum" else math.inf):
                raise ValueError(f"{name}={value!r} is not a number from 0 {'to 1' if name == 'momentum' else 'up'}")
        self.mode, self.noise, self.sigma, self.covariance, self.momentum, self.step = mode, noise, sigma, covariance, momentum, 0
        ranges = {"target_scale": target_scale, "target_aspect": target_aspect, "context_scale": context_scale}
        self.masks = MultiBlock(encoder.grid, sampling=masks, context_ratio=context_ratio, min_keep=min_keep, **ranges)
        self.context_encoder = copy.deepcopy(encoder)
        self.predictor = Predictor(encoder, predictor_width, predictor_depth, position, mask_token=mode == "paper")
        # Truncated normal matrices; the official rescaling by depth is undone by a second pass over all layers.
        initialise_layers((layer for layer in self.modules() if isinstance(layer, nn.Linear)), init_std)
        initialise_layers([self.context_encoder.patch_embed.proj], patch_std)
        self.target_encoder = encoder.requires_grad_(False)
        self.target_encoder.load_state_dict(self.context_encoder.state_dict())

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        *,
        cells: tuple[Tensor, Tensor] | None = None,
        noise: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Output:
        """images (B, C, H, W) to the loss. `targets` is not used.

        cells: contexts (B, M) and target blocks (G, B, T), in place of drawn ones. noise: standard normal numbers, in place of drawn
        ones, for the contexts (B, M, D) and for the target blocks (G, B, T, D); P for D where the covariance is fixed.
        Raises ValueError in training where a device has one image only.
        """
        if self.training and len(images) == 1:
            raise ValueError("a device batch of 1 image: masks of a batch share their sizes, and its spread tells collapse; use 2 or more")
        context_BM, target_GBT = self._draw(images) if cells is None else cells
        G, B, T = target_GBT.shape

        # Targets: the blocks' features in the whole image, by the target encoder, normalised once more without affine parameters.
        with torch.no_grad():
            feature_BND = F.layer_norm(self.target_encoder(images).float(), (self.target_encoder.width,))
            target_GBTD = torch.stack([gather_tokens(feature_BND, cell_BT) for cell_BT in target_GBT])

        # Context: its patches alone, encoded, projected, with their positions.
        seen_BMD = self.context_encoder(images, context_BM)
        position_1NP = self.predictor.pos_embed
        seen_BMP = self.predictor.embed(seen_BMD) + gather_tokens(position_1NP, context_BM)
        if self.noise in ("context", "both"):
            seen_BMP = seen_BMP + self._noise(context_BM.shape, noise[0])

        # Hidden patches: where they are, more or less (equation 6).
        shared_P = self.predictor.embed.bias if self.mode == "released" else self.predictor.mask_token
        hidden_GBTP = position_1NP[0][target_GBT] + shared_P
        if self.noise in ("masked", "both"):
            hidden_GBTP = hidden_GBTP + self._noise(target_GBT.shape, noise[1])

        # Predictor: each block beside the context, not beside the other blocks; four sequences of an image are as many images.
        x_GBSP = torch.cat([seen_BMP.expand(G, -1, -1, -1), hidden_GBTP], dim=2)
        pred_GBTD = self.predictor(x_GBSP.flatten(0, 1), T).float().unflatten(0, (G, B))
        loss = F.smooth_l1_loss(pred_GBTD, target_GBTD)

        metrics = {"context": feature_BND.new_full((), context_BM.shape[1])}
        metrics |= {name: partial(measure, feature_BND) for name, measure in SPREAD.items()}
        named = {"context": context_BM, "cells": target_GBT, "seen": seen_BMD, "target": target_GBTD, "pred": pred_GBTD}
        return Output(loss, metrics, named)

    def at_step(self, step: int, total_steps: int) -> None:
        """The sizes of blocks follow from the step."""
        self.step = step

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        """The target encoder goes after the context encoder: theta' = m theta' + (1 - m) theta, m from `momentum` linearly to 1."""
        momentum = self.momentum + (1 - self.momentum) * step / total_steps
        average = get_ema_multi_avg_fn(momentum)
        average(list(self.target_encoder.parameters()), list(self.context_encoder.parameters()), step)

    @torch.compiler.disable
    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The cells of a batch. Never compiled: a compiled step would hold for the sizes of one step only."""
        cells = self.masks(len(images), self.step, images.device)
        for cell in cells:
            torch._dynamo.maybe_mark_dynamic(cell, cell.ndim - 1)
        return cells

    def _noise(self, shape: torch.Size, given: Tensor | None) -> Tensor:
        """What is added to tokens (..., P): sigma n, tied by the projection that the context takes. The bias is no part of it."""
        tied, weight_PD = self.covariance == "tied", self.predictor.embed.weight
        n = torch.randn(*shape, weight_PD.shape[int(tied)], device=weight_PD.device) if given is None else given
        return F.linear(self.sigma * n, weight_PD) if tied else self.sigma * n

    @property
    def encoder(self) -> ViT:  # what is exported and evaluated
        return self.target_encoder


# Where the tensors of the official checkpoints stand here (StoP's and I-JEPA's have the same names); the longest matching prefix counts.
OFFICIAL_NAMES = {
    "encoder.": "context_encoder.",
    "predictor.predictor_embed.": "predictor.embed.",
    "predictor.predictor_pos_embed": "predictor.pos_embed",
    "predictor.predictor_blocks.": "predictor.blocks.",
    "predictor.predictor_norm.": "predictor.norm.",
    "predictor.predictor_proj.": "predictor.head.",
}
UNUSED = ("predictor.mask_token",)  # of StoP's release, which has it and does not use it
