"""Positional Label (Zhang and Gong, AAAI 2023, arXiv 2206.04981), from the images to the loss, in the paper's order.

Beside its own task, a network says of each of its last tokens which cell of the grid it is in (absolute labels, APL), or of each pair
of tokens how one lies to the other (relative labels, RPL). After training that head is thrown away.

Shapes: B images, K classes, N tokens (and cells), M visible patches, T tokens (class token first), D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.evaluate import Supervision, best_five, position_parameters
from common.heads import AbsoluteLabelHead, PixelDecoder, RelativeLabelHead, initialise_layers
from common.masking import kept_tokens, random_order
from common.method import Output
from common.positions import Grid, absolute_targets
from common.vit import ViT
from positional_label.backbones import check_windows, feature_map, patch_tokens, release_swin

Label = Literal["none", "absolute", "relative"]


class PositionalLabel(nn.Module):
    """Supervised training of a timm backbone, with positional labels as an auxiliary task.

    encoder: a timm backbone with `channels` and `image_size`; it gets its classifier here. label: "none" is the control.
    weight: lambda, the weight of the position loss. swin: "plain" leaves a Swin as it is; "released" is the authors' change of it.
    queries: see RelativeLabelHead. mixup, cutmix, smoothing: see common.evaluate.Supervision.
    Raises ValueError for a label or swin that is not known, a backbone without a map of cells, windows that do not fit its grids, and
    what the heads raise.
    """

    def __init__(
        self,
        encoder: nn.Module,
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
        self.register_buffer("cell_N", absolute_targets(self.grid), persistent=False)
        encoder.reset_classifier(classes)
        classifiers = encoder.get_classifier()  # a distilled DeiT has two
        initialise_layers(classifiers if isinstance(classifiers, tuple) else (classifiers,))
        self.head = make_head(label, width, self.grid, queries)
        self.supervision = Supervision(classes, mixup=mixup, cutmix=cutmix, smoothing=smoothing)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Output:
        """images (B, C, H, W) and, in training, classes (B,) to the loss. `named`: logits (B, K), tokens (B, N, D).

        Metrics in evaluation: top1, top5 and position_top1 in percent.
        """
        # Blending mixes two images and their classes. Their grids are one, and so are their positional labels.
        if self.training:
            images, targets = self.supervision.blend(images, targets)

        # Its own task: the classes, from the pooled tokens.
        features = self.encoder.forward_features(images)
        logits_BK = self.encoder.forward_head(features).float()
        loss, metrics = self._classification(logits_BK, targets)

        # Where is each of the last tokens, after the final norm, on the grid as it came out of the augmentation?
        tokens_BND, grid = patch_tokens(features, self.encoder)
        if grid != self.grid:
            raise ValueError(f"the grid is {grid[0]} x {grid[1]} here and was {self.grid[0]} x {self.grid[1]}; images must be of one size")
        loss = add_position_loss(self, loss, metrics, tokens_BND, self.cell_N.expand(len(images), -1))
        return Output(loss, metrics, {"logits": logits_BK, "tokens": tokens_BND})

    def _classification(self, logits_BK: Tensor, targets: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training:
            return self.supervision.loss(logits_BK, targets), {}
        if targets is None:
            return logits_BK.new_zeros(()), {}
        right_B5 = best_five(logits_BK, targets)
        metrics = {"top1": 100 * right_B5[:, 0].float().mean(), "top5": 100 * right_B5.any(1).float().mean()}
        return F.cross_entropy(logits_BK, targets), metrics

    def no_weight_decay(self) -> set[str]:
        return position_parameters(self)


class PositionalMAE(nn.Module):
    """MAE with positional labels on the encoder's visible tokens, whose labels are their cells in the whole image.

    The paper says that its labels combine with self-supervised ViTs such as MAE, but not how: this is our reading.
    encoder: a common.vit.ViT with a class token and positions. mask_ratio, decoder_*: as MAE's; the rest as PositionalLabel's.
    Raises ValueError for a mask_ratio that leaves no pair of patches to see, or nothing to paint, and what decoder and heads raise.
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
            raise ValueError(f"mask_ratio={mask_ratio} leaves {self.visible} of {self.cells} patches; some must be left, and some hidden")
        self.decoder = PixelDecoder(encoder, decoder_width, decoder_depth, decoder_heads)
        self.head = make_head(label, encoder.width, encoder.grid, queries)

    def forward(self, images: Tensor, targets: Tensor | None = None, *, noise: Tensor | None = None) -> Output:
        """images (B, C, H, W) to the loss. `targets` is not used. noise (B, N) replaces the random draw: the lowest stay visible."""
        order_BN = random_order(torch.rand(len(images), self.cells, device=images.device) if noise is None else noise)
        cell_BM = order_BN[:, : self.visible]
        encoded_BTD = self.encoder(images, cell_BM)
        loss, metrics = self.decoder.loss(encoded_BTD, order_BN, images), {}
        loss = add_position_loss(self, loss, metrics, encoded_BTD[:, self.encoder.prefix_tokens :], cell_BM)
        return Output(loss, metrics, {"order": order_BN, "encoded": encoded_BTD})


def add_position_loss(
    model: PositionalLabel | PositionalMAE, loss: Tensor, metrics: dict[str, Tensor], x_BMD: Tensor, cell_BM: Tensor
) -> Tensor:
    """The loss with lambda times that of telling the cells of the tokens (B, M, D), where they are to be told.

    `metrics` is given position_loss and, in evaluation, position_top1 in percent.
    """
    if model.head is None:
        return loss
    position_loss = model.head.loss(x_BMD, cell_BM)
    metrics["position_loss"] = position_loss.detach()
    if not model.training:
        metrics["position_top1"] = 100 * model.head.accuracy(x_BMD, cell_BM)
    return loss + model.weight * position_loss


def make_head(label: Label, width: int, grid: Grid, queries: int | None) -> AbsoluteLabelHead | RelativeLabelHead | None:
    """The head of a label, or None for "none". Raises ValueError for one that is not known, and for queries without relative labels."""
    if label not in ("none", "absolute", "relative"):
        raise ValueError(f"label={label!r} is not known; choose 'none', 'absolute' or 'relative'")
    if queries is not None and label != "relative":
        raise ValueError(f"queries={queries} is of relative labels, and label is {label!r}")
    if label == "none":
        return None
    return AbsoluteLabelHead(width, grid) if label == "absolute" else RelativeLabelHead(width, grid, queries=queries)


# Where the tensors of the released trainings stand here; the longest matching prefix counts. No checkpoints were published.
_HEAD = {"To2D.": "head.", "head_coordinate.": "head.classify."}
OFFICIAL_VIT_NAMES = {"": "encoder.", **_HEAD}
OFFICIAL_SWIN_NAMES = {
    "": "encoder.",
    "head.": "encoder.head.fc.",
    **{f"layers.{stage}.downsample.": f"encoder.layers.{stage + 1}.downsample." for stage in range(3)},  # timm merges before a stage
    "layers.2.FinalLayer_norm.": "encoder.layers.3.downsample.norm.",  # with absolute labels, in the place of the last merging
    "layers.2.FinalLayer_Mlp.": "encoder.layers.3.downsample.reduction.",
    **_HEAD,
}
