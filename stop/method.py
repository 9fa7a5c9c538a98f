"""StoP (Bar et al., ICML 2024, arXiv 2308.00566) and I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243), in the papers' order.

A ViT (the context encoder) encodes a part of the patches. From its features a narrow predictor predicts the features that an EMA copy (the
target encoder) computes for four target blocks. I-JEPA gives the predictor the exact positions of the blocks. StoP adds Gaussian noise to
them, through the same projection as the features: the model cannot shrink the noise without shrinking the features too.

Shapes: B images, N patches, M context patches, G target blocks of T patches, D width, P width of the predictor.
"""

import copy
import math
from functools import partial
from typing import Any, Literal

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
    """A narrow ViT that predicts the features of hidden patches from those of the context. It has its own positions, of width P."""

    def __init__(self, encoder: ViT, width: int, depth: int, position: Literal["sincos", "learned"], mask_token: bool):
        super().__init__()
        first: Any = encoder.blocks[0]
        heads, cells = first.attn.heads, encoder.grid[0] * encoder.grid[1]
        if position not in ("sincos", "learned"):
            raise ValueError(f"position={position!r} is not known; choose 'sincos' or 'learned'")
        if width % heads or width % 4:
            raise ValueError(f"predictor_width={width} is not a multiple of 4 and of the encoder's {heads} heads")
        self.embed = nn.Linear(encoder.width, width)
        if position == "sincos":
            self.pos_embed: Tensor = nn.Buffer(sincos_2d(encoder.grid, width)[None])
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, cells, width))
        self.mask_token: nn.Parameter | Any = nn.Parameter(torch.empty(1, 1, width)) if mask_token else None
        self.blocks = nn.Sequential(*(Block(width, heads, grad_checkpointing=first.grad_checkpointing) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, encoder.width)
        initialise(self)

    def forward(self, x_CSP: Tensor, hidden: int) -> Tensor:
        """Map sequences (C, S, P), hidden patches last, to features (C, T, D) of the hidden patches. The last block computes only these."""
        *blocks, last = self.blocks
        for block in blocks:
            x_CSP = block(x_CSP)
        return self.head(self.norm(last(x_CSP, queries=hidden)))


class StoP(nn.Module):
    """StoP with two encoders, which have fixed or learned positions and no class token. The given encoder becomes `target_encoder`, an EMA
    of the other; the papers evaluate it. A copy becomes `context_encoder`, which is trained.

    mode: "paper" (a hidden patch is position + noise + mask token, equation 6) or "released" (the bias of the projection replaces the mask
    token). noise: which patches get noise: "masked", "context", "both" (Table 7), or "none" (I-JEPA). sigma: standard deviation of the
    noise, in units of encoder features. covariance: the noise is projected like the context ("tied", equation 6) or added directly in the
    predictor's width ("fixed", Figure 3). position: of the predictor, "sincos" or "learned" (Table 6). masks: "uniform" or "released".
    target_scale to min_keep: see common.masking.MultiBlock. momentum: initial EMA momentum of the target encoder; it rises linearly to 1.
    init_std, patch_std: initial std of all matrices and of the patch embedding; .02 is too small for narrow ViTs or small patches.
    Raises ValueError for invalid values and, like MultiBlock, for a grid that is too small.
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
            raise ValueError("the encoder of I-JEPA and StoP needs positions, and no class token")
        choices = {"mode": (mode, "paper", "released"), "noise": (noise, "masked", "context", "both", "none")}
        for name, (value, *known) in (choices | {"covariance": (covariance, "tied", "fixed")}).items():
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}")
        for name, number in {"sigma": sigma, "init_std": init_std, "patch_std": patch_std, "momentum": momentum}.items():
            if not isinstance(number, int | float) or not 0 <= number <= (1 if name == "momentum" else math.inf):
                raise ValueError(f"{name}={number!r} is not a number from 0 {'to 1' if name == 'momentum' else 'up'}")
        self.mode, self.noise, self.sigma, self.covariance, self.momentum, self.step = mode, noise, sigma, covariance, momentum, 0
        ranges: dict = {"target_scale": target_scale, "target_aspect": target_aspect, "context_scale": context_scale}
        self.masks = MultiBlock(encoder.grid, sampling=masks, context_ratio=context_ratio, min_keep=min_keep, **ranges)
        self.context_encoder = copy.deepcopy(encoder)
        self.predictor = Predictor(encoder, predictor_width, predictor_depth, position, mask_token=mode == "paper")
        # Truncated normal matrices. The official code rescales them by depth, but then a second pass over all layers overwrites this.
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
        """Compute the loss of images (B, C, H, W). `targets` is not used.

        cells: contexts (B, M) and target blocks (G, B, T); they replace the random draw. noise: standard normal numbers for the contexts
        (B, M, D) and the target blocks (G, B, T, D), with P instead of D if the covariance is fixed; they also replace the random draw.
        Raises ValueError in training if a device has only one image.
        """
        if self.training and len(images) == 1:
            raise ValueError("a device batch of 1 image: mask sizes are per batch, and collapse is measured across images; use 2 or more")
        context_BM, target_GBT = self._draw(images) if cells is None else cells
        G, B, T = target_GBT.shape

        # Targets: the target encoder's features of the blocks, from the whole image, after one more LayerNorm without affine parameters.
        with torch.no_grad():
            feature_BND = F.layer_norm(self.target_encoder(images).float(), (self.target_encoder.width,))
            target_GBTD = torch.stack([gather_tokens(feature_BND, cell_BT) for cell_BT in target_GBT])

        # Context: encode only its patches, project them, and add their positions.
        seen_BMD = self.context_encoder(images, context_BM)
        position_1NP = self.predictor.pos_embed
        seen_BMP = self.predictor.embed(seen_BMD) + gather_tokens(position_1NP, context_BM)
        if self.noise in ("context", "both"):
            seen_BMP = seen_BMP + self._noise(context_BM.shape, noise[0])

        # Hidden patches: their positions plus noise (equation 6).
        shared_P = self.predictor.embed.bias if self.mode == "released" else self.predictor.mask_token
        hidden_GBTP = position_1NP[0][target_GBT] + shared_P
        if self.noise in ("masked", "both"):
            hidden_GBTP = hidden_GBTP + self._noise(target_GBT.shape, noise[1])

        # Predictor: one sequence per target block: the context and this block, not the other blocks. All sequences form one batch.
        x_GBSP = torch.cat([seen_BMP.expand(G, -1, -1, -1), hidden_GBTP], dim=2)
        pred_GBTD = self.predictor(x_GBSP.flatten(0, 1), T).float().unflatten(0, (G, B))
        loss = F.smooth_l1_loss(pred_GBTD, target_GBTD)

        metrics: dict = {"context": feature_BND.new_full((), context_BM.shape[1])}
        metrics |= {name: partial(measure, feature_BND) for name, measure in SPREAD.items()}
        named = {"context": context_BM, "cells": target_GBT, "seen": seen_BMD, "target": target_GBTD, "pred": pred_GBTD}
        return Output(loss, metrics, named)

    def at_step(self, step: int, total_steps: int) -> None:
        """Store the step, which determines the block sizes."""
        self.step = step

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        """Update the target encoder (EMA): theta' = m theta' + (1 - m) theta, where m rises linearly from `momentum` to 1."""
        momentum = self.momentum + (1 - self.momentum) * step / total_steps
        average = get_ema_multi_avg_fn(momentum)
        average(list(self.target_encoder.parameters()), list(self.context_encoder.parameters()), step)

    @torch.compiler.disable
    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the cells of a batch. Never compiled: a compiled step would be valid for the block sizes of one step only."""
        cells = self.masks(len(images), self.step, images.device)
        for cell in cells:
            torch._dynamo.maybe_mark_dynamic(cell, cell.ndim - 1)
        return cells

    def _noise(self, shape: torch.Size, given: Tensor | None) -> Tensor:
        """The noise added to tokens (..., P): sigma n; if tied, projected by the weights of the context projection, without its bias."""
        tied, weight_PD = self.covariance == "tied", self.predictor.embed.weight
        n = weight_PD.new_empty(*shape, weight_PD.shape[int(tied)]).normal_() if given is None else given
        return F.linear(self.sigma * n, weight_PD) if tied else self.sigma * n

    @property
    def encoder(self) -> ViT:  # the encoder to export and evaluate
        return self.target_encoder


# Maps name prefixes of the official checkpoints (the same for StoP and I-JEPA) to those here; the longest matching prefix counts.
OFFICIAL_NAMES = {
    "encoder.": "context_encoder.",
    "predictor.predictor_embed.": "predictor.embed.",
    "predictor.predictor_pos_embed": "predictor.pos_embed",
    "predictor.predictor_blocks.": "predictor.blocks.",
    "predictor.predictor_norm.": "predictor.norm.",
    "predictor.predictor_proj.": "predictor.head.",
}
UNUSED = ("predictor.mask_token",)  # in StoP's released checkpoints; the released code does not use it
