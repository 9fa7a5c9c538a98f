"""Jigsaw-ViT (Chen et al., Pattern Recognition Letters 2023, arXiv 2207.11971): a second pass of a supervised ViT solves a jigsaw puzzle.

The second pass, the jigsaw branch, gets some of the patches, without position embeddings, and a small MLP tells the cell of each. We had
no access to the paper's text. The settings are those of the released code, which has no licence; no part of it was used.

Shapes: B images, N patches, M kept patches, D width, K classes.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from benchmarks.baselines import deit, drloc, mae
from common import backbones
from common.backbones import check_windows, feature_map, new_classifier, patch_tokens
from common.evaluate import Supervision, position_parameters
from common.heads import PixelDecoder, initialise_layers
from common.masking import gather_tokens, kept_tokens, random_order
from common.method import Output, Source
from common.positions import absolute_targets
from common.recipe import DEIT_LABELS, Recipe, check_options
from common.vit import ViT

SOURCE = Source(
    name="Jigsaw-ViT",
    citation="Chen et al., *Jigsaw-ViT: Learning jigsaw puzzles in vision transformer*, Pattern Recognition Letters 2023",
    arxiv="2207.11971",
    code="yingyichen-cyy/JigsawViT",
)
# A Swin is trained as released: see JigsawViT.
_SWIN = ("method.mask_ratio=0", "method.use_positions=true")
# What benchmarks.speed times, without blending: the branch costs 1 - mask_ratio of a pass.
_PLAIN = ("method.mixup=0", "method.cutmix=0")
_SWIN_T = (*_PLAIN, "size=swin_tiny_patch4_window7_224", "patch_size=4", *_SWIN)
VARIANTS = {
    "DeiT-S": (*_PLAIN, "method.weight=0"),
    "DeiT-S + jigsaw": _PLAIN,
    "DeiT-S + jigsaw, all patches": (*_PLAIN, "method.mask_ratio=0"),
    "Swin-T": (*_SWIN_T, "method.weight=0"),
    "Swin-T + jigsaw, released": _SWIN_T,
}


class JigsawViT(nn.Module):
    """Supervised training of a ViT with a jigsaw branch, or of a Swin with absolute labels.

    weight: of the jigsaw loss; 0 is the baseline, without branch and head. mask_ratio: fraction of the patches that the branch does not
    get; the number of kept patches is rounded down. use_positions: keep the position embeddings in the branch. clean_jigsaw_images: the
    branch gets the images before Mixup and CutMix. The release for noisy labels intends this, but timm mixes in place, so its branch gets
    mixed images too: the default. head_depth: linear layers of the head. mixup, cutmix, smoothing: see common.evaluate.Supervision.
    A Swin is trained as released: its last tokens tell their own cells, in one pass, with all patches and with its relative positions. This
    is no jigsaw puzzle, so mask_ratio must be 0 and use_positions true. The release accepts other values and ignores them.
    Raises ValueError for options that are out of range or have no effect, and for an encoder that is neither a Swin nor a ViT with class
    token and absolute positions.
    """

    def __init__(
        self,
        encoder: Any,
        classes: int,
        *,
        weight: float = 0.1,
        mask_ratio: float = 0.5,
        use_positions: bool = False,
        clean_jigsaw_images: bool = False,
        head_depth: int = 3,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
    ):
        super().__init__()
        self.encoder, self.weight, self.use_positions, self.clean_jigsaw_images = encoder, weight, use_positions, clean_jigsaw_images
        self.supervision = Supervision(classes, mixup=mixup, cutmix=cutmix, smoothing=smoothing)
        if clean_jigsaw_images and self.supervision.mixup is None:
            raise ValueError("clean_jigsaw_images=True has no effect without mixup and cutmix: all images are clean")
        if isinstance(encoder, ViT):
            if encoder.cls_token is None:
                raise ValueError("Jigsaw-ViT classifies the class token, but the encoder has none: use encoder.class_token=true")
            if use_positions and encoder.pos_embed is None:
                raise ValueError("use_positions=True has no effect: the encoder has no position embedding")
            width, grid = encoder.width, encoder.grid
            self.head = nn.Linear(width, classes)
            initialise_layers([self.head])
        elif isinstance(encoder, SwinTransformer):
            if mask_ratio != 0 or not use_positions or clean_jigsaw_images:
                given = f"mask_ratio={mask_ratio}, use_positions={use_positions}, clean_jigsaw_images={clean_jigsaw_images}"
                raise ValueError(
                    f"{given}: a Swin has one pass, on all patches with positions; use mask_ratio=0, use_positions=true, no other"
                )
            check_windows(encoder)
            width, grid = feature_map(encoder)
            new_classifier(encoder, classes)
            self.cell_N = nn.Buffer(absolute_targets(grid), persistent=False)
        else:
            raise ValueError(f"Jigsaw-ViT trains this project's ViT, such as size=small, or timm's Swin, not a {type(encoder).__name__}")
        self.cells, self.kept = grid[0] * grid[1], kept_patches(encoder, grid[0] * grid[1], mask_ratio, weight)
        self.jigsaw = jigsaw_head(width, self.cells, head_depth) if weight else None

    def forward(self, images: Tensor, targets: Tensor | None = None, *, noise: Tensor | None = None) -> Output:
        """Compute the loss of images (B, C, H, W) and, in training, classes (B,). noise (B, N) replaces the draw; the lowest are kept.

        `named`: logits (B, K) and, from the branch, jigsaw (B, M, N) and cells (B, M): logits and targets. Evaluation without targets has
        no branch. Metrics: jigsaw_loss; in evaluation top1, top5 and jigsaw_top1 in percent.
        """
        clean = images
        if self.training:
            images, targets = self.supervision.blend(images, targets)

        # The class branch: all patches, with positions.
        if isinstance(self.encoder, ViT):
            patch_BND = self.encoder.embed(images)
            placed_BND = patch_BND if self.encoder.pos_embed is None else patch_BND + self.encoder.patch_positions
            logits_BK = self.head(self.encoder.encode(placed_BND)[:, 0]).float()
        else:
            features = self.encoder.forward_features(images)
            logits_BK = self.encoder.forward_head(features).float()
        loss, metrics = self.supervision.judge(logits_BK, targets, self.training)
        if self.jigsaw is None or (targets is None and not self.training):
            return Output(loss, metrics, {"logits": logits_BK})

        # The jigsaw branch: the kept patches, without positions, through the same encoder. It cannot know their order, so none is made.
        # Both branches share the patch embedding, unless they get different images.
        if isinstance(self.encoder, ViT):
            cell_BM = random_order(torch.rand(len(images), self.cells, device=images.device) if noise is None else noise)[:, : self.kept]
            other = self.training and self.clean_jigsaw_images
            kept_BMD = self.encoder.embed(clean, cell_BM) if other else gather_tokens(patch_BND, cell_BM)
            solved_BMD = encode_puzzle(self.encoder, kept_BMD, cell_BM if self.use_positions else None)
        else:
            solved_BMD, cell_BM = patch_tokens(features, self.encoder)[0], self.cell_N.expand(len(images), -1)
        jigsaw_loss, answer_BMN = judge_puzzle(self.jigsaw, solved_BMD, cell_BM, metrics, self.training)
        return Output(loss + self.weight * jigsaw_loss, metrics, {"logits": logits_BK, "jigsaw": answer_BMN, "cells": cell_BM})

    def no_weight_decay(self) -> set[str]:
        return position_parameters(self)


class JigsawMAE(nn.Module):
    """MAE with a jigsaw branch for the encoder's visible patches: it gets the same patches without positions. Ours; the paper has none.

    encoder: a common.vit.ViT with a class token and absolute positions. mask_ratio, decoder_*: as in MAE; the others as in JigsawViT.
    Raises ValueError for a mask_ratio that leaves fewer than 2 visible patches or none hidden, and for whatever decoder and head refuse.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        weight: float = 0.1,
        head_depth: int = 3,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ):
        super().__init__()
        self.encoder, self.weight, self.cells = encoder, weight, encoder.grid[0] * encoder.grid[1]
        self.visible = kept_patches(encoder, self.cells, mask_ratio, weight)
        if self.visible == self.cells:
            raise ValueError(f"mask_ratio={mask_ratio} hides none of the {self.cells} patches, so there is nothing to reconstruct")
        self.decoder = PixelDecoder(encoder, decoder_width, decoder_depth, decoder_heads)
        self.jigsaw = jigsaw_head(encoder.width, self.cells, head_depth) if weight else None

    def forward(self, images: Tensor, targets: Tensor | None = None, *, noise: Tensor | None = None) -> Output:
        """Compute the loss of images (B, C, H, W). `targets` is unused. noise (B, N) replaces the random draw; the lowest stay visible."""
        order_BN = random_order(torch.rand(len(images), self.cells, device=images.device) if noise is None else noise)
        cell_BM = order_BN[:, : self.visible]
        patch_BMD = self.encoder.embed(images, cell_BM)
        encoded_BTD = self.encoder.encode(patch_BMD + gather_tokens(self.encoder.patch_positions, cell_BM))
        loss, metrics = self.decoder.loss(encoded_BTD, order_BN, images), dict[str, Tensor]()
        if self.jigsaw is not None:
            solved_BMD = encode_puzzle(self.encoder, patch_BMD)
            loss = loss + self.weight * judge_puzzle(self.jigsaw, solved_BMD, cell_BM, metrics, self.training)[0]
        return Output(loss, metrics, {"order": order_BN, "encoded": encoded_BTD})


def kept_patches(encoder: Any, cells: int, mask_ratio: float, weight: float) -> int:
    """Number of patches that the branch gets. Raises ValueError for fewer than 2, for relative positions, and for a weight below 0."""
    if drloc.check_weight(weight) and getattr(encoder, "relative", False):
        raise ValueError("relative positions need all patches in row-major order: use encoder.position=learned for a jigsaw branch")
    kept = kept_tokens(cells, mask_ratio, "mask_ratio")
    if kept < 2:
        raise ValueError(f"mask_ratio={mask_ratio} leaves 1 of {cells} patches, which is no puzzle; use {1 - 2 / cells:.3g} or less")
    return kept


def jigsaw_head(width: int, cells: int, depth: int) -> nn.Sequential:
    """The head: `depth` linear layers with ReLU between them, to one logit per cell. Raises ValueError for a depth below 1."""
    if type(depth) is not int or depth < 1:
        raise ValueError(f"head_depth={depth!r} is not a whole number from 1 up")
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, cells))


def encode_puzzle(encoder: ViT, patch_BMD: Tensor, cell_BM: Tensor | None = None) -> Tensor:
    """Embedded patches to tokens (B, M, D), behind the class token. Nothing has a position, or everything if the cells are given."""
    if cell_BM is not None:
        return encoder.encode(patch_BMD + gather_tokens(encoder.patch_positions, cell_BM))[:, 1:]
    assert encoder.cls_token is not None
    first_B1D = encoder.cls_token.to(patch_BMD.dtype).expand(len(patch_BMD), -1, -1)
    return encoder.norm(encoder.blocks(torch.cat([first_B1D, patch_BMD], dim=1)))[:, 1:]


def judge_puzzle(head: nn.Module, x_BMD: Tensor, cell_BM: Tensor, metrics: dict[str, Tensor], training: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the tokens' cells, and the logits (B, M, N). Adds jigsaw_loss to `metrics` and, in evaluation, jigsaw_top1."""
    answer_BMN = head(x_BMD).float()
    loss = F.cross_entropy(answer_BMN.flatten(0, 1), cell_BM.flatten())
    metrics["jigsaw_loss"] = loss.detach()
    if not training:
        metrics["jigsaw_top1"] = 100 * (answer_BMN.argmax(-1) == cell_BM).float().mean()
    return loss, answer_BMN


def build(recipe: Recipe, encoder: Any, classes: int) -> JigsawViT | JigsawMAE:
    """The method as the recipe wants it: supervised, or added to MAE, which needs no classes. Raises RecipeError for an unknown option."""
    if recipe.supervised:
        check_options(JigsawViT, recipe.method, taken=("encoder", "classes"))
        return JigsawViT(encoder, classes, **recipe.method)
    check_options(JigsawMAE, recipe.method, taken=("encoder",))
    return JigsawMAE(encoder, **recipe.method)


# Maps name prefixes of the released code to those here; the longest matching prefix counts.
OFFICIAL_VIT_NAMES = {"": "encoder.", "head.": "head.", "jigsaw.": "jigsaw."}
OFFICIAL_SWIN_NAMES = {**backbones.OFFICIAL_SWIN_NAMES, "jigsaw.": "jigsaw."}


def _arms(name: str, *changes: str) -> dict[str, tuple[str, ...]]:
    return {name: (*changes, "method.weight=0"), f"{name}+jigsaw": changes}


def _vit_arms(size: str, patch: int, pixels: int) -> dict[str, tuple[str, ...]]:
    sizes = (f"size={size}", f"patch_size={patch}", f"image_size={pixels}")
    return _arms("vit", *sizes, "encoder.position=learned", "encoder.drop_path=0.1")


def imagenet_vits16() -> Recipe:
    """DeiT-S as released: `make reproduce PAPER=jigsaw DATA=/datasets/imagenet`, 8 GPUs. Top-1 in the release's README: 79.8 alone (DeiT's
    own figure; its retrained weights are named 78.85), 80.5 with the branch. Expected of ours: not measured yet."""
    return replace(deit.imagenet_vits16(), encoder={}, arms=_vit_arms("small", 16, 224))


def imagenet_vitb16() -> Recipe:
    """DeiT-B, likewise, RECIPE=imagenet_vitb16. README: 81.8 alone, 82.1 with the branch. Expected of ours: not measured yet."""
    return replace(deit.imagenet_vitb16(), encoder={}, arms=_vit_arms("base", 16, 224))


def imagenet_mae() -> Recipe:
    """MAE ViT-B/16, 800 epochs, with and without the branch, RECIPE=imagenet_mae. Ours. Expected: not measured yet."""
    return replace(mae.imagenet_vitb16_800(), arms=_arms("mae"))


def cifar10() -> Recipe:
    """CIFAR-10 (or 100), ViT-S/4 and Swin-T: `make reproduce PAPER=jigsaw DATA=cifar10`, one GPU. Ours: the trainings of DRLoc's recipe, so
    that the two methods can be compared. Expected: not measured yet."""
    own, swin = drloc.cifar10(), drloc.cifar10().arms["swin+drloc"]
    padded = ("pretrain.augmentation.crop=padding", "pretrain.augmentation.padding=4")
    vit = {arm: (*changes, *padded) for arm, changes in _vit_arms("small", 4, 32).items()}
    return replace(own, size="small", patch_size=4, image_size=32, method=dict(DEIT_LABELS), arms=vit | _arms("swin", *swin, *_SWIN))


def cifar10_mae() -> Recipe:
    """MAE with and without the branch on CIFAR-10, ViT-S/4, RECIPE=cifar10_mae: MAE's cifar10 recipe. Ours. Expected: not measured yet."""
    return replace(mae.cifar10(), arms=_arms("mae"))


def digits() -> Recipe:
    """scikit-learn's handwritten digits, ViT and Swin, alone and with the branch: `make reproduce PAPER=jigsaw`. Ours; not in the paper.

    The trainings of DRLoc's recipe, so that the two methods can be compared; half of the 16 patches are kept. Two CPU cores, on
    average seven minutes a seed on one of them (AMD EPYC). Expected of the ViT: 94.7 alone, 94.8 with the branch; of the Swin: not
    measured yet.
    """
    own, swin = drloc.digits(), drloc.digits().arms["swin+drloc"]
    arms = _vit_arms("micro", 2, 8) | _arms("swin", *swin, "encoder.drop_path_rate=0.1", *_SWIN)
    return replace(own, size="micro", patch_size=2, image_size=8, method={"smoothing": 0.1}, encoder={}, arms=arms)


def digits_mae() -> Recipe:
    """MAE with and without the branch on digits: `make reproduce PAPER=jigsaw RECIPE=digits_mae`: MAE's digits recipe. Ours.

    Two CPU cores. Expected: not measured yet.
    """
    return replace(mae.digits(), arms=_arms("mae"))


# What takes part in comparisons: the branch added to MAE.
COMPARED = {
    data: [(f"{name}_mae", "mae+jigsaw")] for data, name in {"digits": "digits", "cifar10": "cifar10", "folder": "imagenet"}.items()
}
DEFAULTS = {"digits": digits, "cifar10": cifar10, "cifar100": cifar10, "folder": imagenet_vits16}
