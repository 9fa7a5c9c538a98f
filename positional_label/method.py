"""Positional Label (Zhang and Gong, AAAI 2023, arXiv 2206.04981), from the images to the loss, in the paper's order.

In addition to its own task, a network predicts the grid cell of each token of its last layer (absolute labels, APL), or the relative
offset of every pair of tokens (relative labels, RPL). The position head is discarded after training.

Shapes: B images, K classes, N tokens (and cells), M visible patches, T tokens (class token first), D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from common import backbones
from common.backbones import Backbone, check_windows, feature_map, new_classifier, patch_tokens
from common.evaluate import Supervision, position_parameters
from common.heads import AbsoluteLabelHead, PixelDecoder, RelativeLabelHead
from common.masking import kept_tokens, random_order
from common.method import Output
from common.positions import Grid, absolute_targets
from common.vit import ViT
from positional_label.backbones import release_swin

Label = Literal["none", "absolute", "relative"]


class PositionalLabel(nn.Module):
    """Supervised training of a timm backbone, with positional labels as an auxiliary task.

    encoder: a timm backbone with `channels` and `image_size`; its classifier is created here. label: "none" is the baseline.
    weight: lambda, the weight of the position loss. swin: "plain" leaves a Swin unchanged; "released" applies the authors' changes.
    queries: see RelativeLabelHead. mixup, cutmix, smoothing: see common.evaluate.Supervision.
    Raises ValueError for an unknown label or swin, a backbone whose output is no grid of cells, windows that do not fit its grids, and
    whatever the heads raise.
    """

    def __init__(
        self,
        encoder: Backbone,
        classes: int,
        *,
        label: Label = "relative",
        weight: float = 0.5,
        swin: Literal["plain", "released"] = "plain",
        queries: int | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
    ):
        super().__init__()
        check_windows(encoder)
        if swin not in ("plain", "released"):
            raise ValueError(f"swin={swin!r} is not known; choose 'plain' or 'released'")
        if swin == "released":
            release_swin(encoder, keep_grid=label == "absolute")
        self.encoder, self.weight = encoder, weight
        width, self.grid = feature_map(encoder)
        self.cell_N = nn.Buffer(absolute_targets(self.grid), persistent=False)
        new_classifier(encoder, classes)
        self.head = make_head(label, width, self.grid, queries)
        self.supervision = Supervision(classes, mixup=mixup, cutmix=cutmix, smoothing=smoothing)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Output:
        """Compute the loss of images (B, C, H, W) and, in training, classes (B,). `named`: logits (B, K), tokens (B, N, D).

        Metrics in evaluation: top1, top5 and position_top1 in percent.
        """
        # Mixup and CutMix blend two images and their classes. Both have the same grid, so the positional labels do not change.
        if self.training:
            images, targets = self.supervision.blend(images, targets)

        # The network's own task: classification from the pooled tokens.
        features = self.encoder.forward_features(images)
        logits_BK = self.encoder.forward_head(features).float()
        loss, metrics = self.supervision.judge(logits_BK, targets, self.training)

        # Positional labels: the cell of each last-layer token, after the final norm, on the grid of the augmented image.
        tokens_BND, grid = patch_tokens(features, self.encoder)
        if grid != self.grid:
            raise ValueError(f"the grid is {grid[0]} x {grid[1]}, but was {self.grid[0]} x {self.grid[1]} at first; use images of one size")
        loss = add_position_loss(self, loss, metrics, tokens_BND, self.cell_N.expand(len(images), -1))
        return Output(loss, metrics, {"logits": logits_BK, "tokens": tokens_BND})

    def no_weight_decay(self) -> set[str]:
        return position_parameters(self)


class PositionalMAE(nn.Module):
    """MAE with positional labels for the encoder's visible tokens. The labels are the tokens' cells in the whole image.

    The paper says that its labels can be combined with self-supervised ViTs such as MAE, but not how: this is our interpretation.
    encoder: a common.vit.ViT with a class token and positions. mask_ratio, decoder_*: as in MAE; the others as in PositionalLabel.
    Raises ValueError for a mask_ratio that leaves fewer than 2 visible patches or none hidden, and whatever decoder and heads raise.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        label: Label = "relative",
        weight: float = 0.5,
        queries: int | None = None,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ):
        super().__init__()
        self.encoder, self.weight, self.cells = encoder, weight, encoder.grid[0] * encoder.grid[1]
        self.visible = kept_tokens(self.cells, mask_ratio, "mask_ratio")
        if not 1 < self.visible < self.cells:
            raise ValueError(f"mask_ratio={mask_ratio} leaves {self.visible} of {self.cells} patches visible; use at least 2, but not all")
        self.decoder = PixelDecoder(encoder, decoder_width, decoder_depth, decoder_heads)
        self.head = make_head(label, encoder.width, encoder.grid, queries)

    def forward(self, images: Tensor, targets: Tensor | None = None, *, noise: Tensor | None = None) -> Output:
        """Compute the loss of images (B, C, H, W). `targets` is unused. noise (B, N) replaces the random draw; the lowest stay visible."""
        order_BN = random_order(torch.rand(len(images), self.cells, device=images.device) if noise is None else noise)
        cell_BM = order_BN[:, : self.visible]
        encoded_BTD = self.encoder(images, cell_BM)
        loss, metrics = self.decoder.loss(encoded_BTD, order_BN, images), dict[str, Tensor]()
        loss = add_position_loss(self, loss, metrics, encoded_BTD[:, self.encoder.prefix_tokens :], cell_BM)
        return Output(loss, metrics, {"order": order_BN, "encoded": encoded_BTD})


def add_position_loss(
    model: PositionalLabel | PositionalMAE, loss: Tensor, metrics: dict[str, Tensor], x_BMD: Tensor, cell_BM: Tensor
) -> Tensor:
    """Add lambda times the position loss of tokens (B, M, D) to the loss. Without a position head, return the loss unchanged.

    Adds position_loss to `metrics` and, in evaluation, position_top1 in percent.
    """
    if model.head is None:
        return loss
    position_loss = model.head.loss(x_BMD, cell_BM)
    metrics["position_loss"] = position_loss.detach()
    if not model.training:
        metrics["position_top1"] = 100 * model.head.accuracy(x_BMD, cell_BM)
    return loss + model.weight * position_loss


def make_head(label: Label, width: int, grid: Grid, queries: int | None) -> AbsoluteLabelHead | RelativeLabelHead | None:
    """Return the head for a label, or None for "none". Raises ValueError for an unknown label, and for queries without relative labels."""
    if label not in ("none", "absolute", "relative"):
        raise ValueError(f"label={label!r} is not known; choose 'none', 'absolute' or 'relative'")
    if queries is not None and label != "relative":
        raise ValueError(f"queries={queries} needs label='relative', but label is {label!r}")
    if label == "none":
        return None
    return AbsoluteLabelHead(width, grid) if label == "absolute" else RelativeLabelHead(width, grid, queries=queries)


# Maps name prefixes of the released code to those here; the longest matching prefix counts. No checkpoints were published.
_HEAD = {"To2D.": "head.", "head_coordinate.": "head.classify."}
OFFICIAL_VIT_NAMES = {"": "encoder.", **_HEAD}
OFFICIAL_SWIN_NAMES = {
    **backbones.OFFICIAL_SWIN_NAMES,
    "layers.2.FinalLayer_norm.": "encoder.layers.3.downsample.norm.",  # with absolute labels, instead of the last merging
    "layers.2.FinalLayer_Mlp.": "encoder.layers.3.downsample.reduction.",
    **_HEAD,
}
