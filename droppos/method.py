"""DropPos (Wang et al., NeurIPS 2023, arXiv 2309.03576), from the images to the loss, in the paper's order.

A ViT sees a random quarter of the patches. Most of these patches lose their position embedding. A light decoder predicts,
for each patch without its position, which of the L grid cells it comes from.

Shapes: B images, L cells of the grid, V visible patches, T tokens (class token first), D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.heads import PixelDecoder, PositionDecoder
from common.masking import gather_tokens, kept_tokens, random_order
from common.method import Output
from common.positions import smoothed_targets
from common.vit import ViT


class DropPos(nn.Module):
    """DropPos around an encoder with a class token and a position embedding.

    mask_ratio: fraction of hidden patches (gamma). position_mask_ratio: fraction of the visible patches whose position is
    dropped (gamma_pos). sigma: width of the position smoothing, in cells; it decreases linearly towards zero over
    `sigma_epochs` epochs, in one step per epoch, and is constant if that is None. smoothing: "paper" (true grid, every
    target sums to 1) or "released" (grid and normalisation of the official code: faults 7.1 and 7.2 in README.md).
    distance: "squared" as in the official code, or "euclidean" as in the paper's text. attentive: weight tokens by their
    affinity to the class token, a softmax at `temperature`. position_token: replaces a dropped position: a "learned"
    vector, "zeros", or "wrong" (other dropped positions). ignore_confident: exclude tokens whose predicted probability of
    the true cell is at least that of the soft label. shuffle: permute the visible tokens (changes only the rounding).
    position_weight: if set, the loss is position_weight times the position loss, plus MAE's pixel loss.
    Raises ValueError for ratios that leave no visible patch or nothing to predict.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        mask_ratio: float = 0.75,
        position_mask_ratio: float = 0.75,
        sigma: float = 1.0,
        sigma_epochs: int | None = None,
        smoothing: Literal["paper", "released"] = "paper",
        distance: Literal["squared", "euclidean"] = "squared",
        attentive: bool = True,
        temperature: float = 0.1,
        position_token: Literal["learned", "zeros", "wrong"] = "learned",
        ignore_confident: bool = False,
        shuffle: bool = False,
        position_weight: float | None = None,
        decoder_width: int = 512,
        decoder_depth: int = 2,
        decoder_heads: int = 16,
    ):
        super().__init__()
        if encoder.pos_embed is None or encoder.cls_token is None:
            raise ValueError("DropPos drops position embeddings and reads the class token: the encoder needs both")
        if not 0 < position_mask_ratio <= 1:
            raise ValueError(f"position_mask_ratio={position_mask_ratio} drops no position, so there is nothing to predict; use (0, 1]")
        self.encoder, self.cells = encoder, encoder.grid[0] * encoder.grid[1]
        self.visible = kept_tokens(self.cells, mask_ratio, "mask_ratio")
        self.placed = int(self.visible * (1 - position_mask_ratio))
        self.sigma, self.sigma_epochs, self.smoothing, self.distance = sigma, sigma_epochs, smoothing, distance
        self.attentive, self.temperature = attentive, temperature
        self.ignore_confident, self.shuffle, self.position_weight = ignore_confident, shuffle, position_weight

        self.position_token = position_token
        if position_token == "learned":
            self.dropped_position = nn.Parameter(torch.empty(1, 1, encoder.width).normal_(std=0.02))
        self.decoder = PositionDecoder(encoder.width, self.cells, decoder_width, decoder_depth, decoder_heads)
        if position_weight is not None:
            self.pixel_decoder = PixelDecoder(encoder, decoder_width, decoder_depth, decoder_heads)
        self.sigma_epoch = 0
        self.target_LL = nn.Buffer(self._smoothed(sigma), persistent=False)

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        *,
        noise_patch: Tensor | None = None,
        noise_position: Tensor | None = None,
        noise_shuffle: Tensor | None = None,
    ) -> Output:
        """Compute the loss of images (B, C, H, W). `targets` is not used.

        noise_patch (B, L), noise_position (B, V) and noise_shuffle (B, V) replace the random draws; lowest noise first.
        """
        B, V = images.shape[0], self.visible

        # Patch masking: keep the V patches of lowest noise, in noise order.
        order_BL = random_order(torch.rand(B, self.cells, device=images.device) if noise_patch is None else noise_patch)
        cell_BV = order_BL[:, :V]

        # Position masking: drop the positions of the visible patches, except for `placed` of them.
        noise_position = torch.rand(B, V, device=images.device) if noise_position is None else noise_position
        slot_BV = random_order(noise_position)
        dropped_BV = torch.ones_like(cell_BV, dtype=torch.bool).scatter_(1, slot_BV[:, : self.placed], False)
        position_BVD = self._positions(cell_BV, dropped_BV)

        # The encoder sees the visible patches; the light decoder sees the encoder's output.
        x_BVD = self.encoder.embed(images, cell_BV) + position_BVD
        if self.shuffle:
            shuffled = random_order(torch.rand(B, V, device=images.device) if noise_shuffle is None else noise_shuffle)
            encoded_BTD = self.encoder.encode(gather_tokens(x_BVD, shuffled))
            encoded_BTD = torch.cat([encoded_BTD[:, :1], gather_tokens(encoded_BTD[:, 1:], shuffled.argsort(1))], 1)
        else:
            encoded_BTD = self.encoder.encode(x_BVD)
        logit_BVL = self.decoder(encoded_BTD)[:, 1:].float()

        # Position smoothing: cross-entropy with the soft label of the true cell.
        target_BVL = self.target_LL[cell_BV]
        log_p_BVL = logit_BVL.log_softmax(-1)
        loss_BV = -(target_BVL * log_p_BVL).sum(-1)

        # Attentive reconstruction, and the weighted mean over the tokens whose position was dropped.
        weight_BV = dropped_BV.float()
        if self.ignore_confident:
            true_cell = cell_BV[..., None]
            confidence_BV = log_p_BVL.detach().exp().gather(-1, true_cell)[..., 0]
            weight_BV = weight_BV * (confidence_BV < target_BVL.gather(-1, true_cell)[..., 0])
        affinity_BV = self._affinity(images, cell_BV) if self.attentive else None
        if affinity_BV is not None:
            weight_BV = weight_BV * affinity_BV
        loss = (weight_BV * loss_BV).sum() / weight_BV.sum().clamp(min=torch.finfo(torch.float32).tiny)

        predicted_BV = logit_BVL.argmax(-1)
        right_BV = (predicted_BV == cell_BV) & dropped_BV
        metrics = {"position_top1": 100 * (right_BV.sum() / dropped_BV.sum())}
        named = {"cells": cell_BV, "dropped": dropped_BV, "predicted": predicted_BV, "encoded": encoded_BTD, "affinity": affinity_BV}
        if self.position_weight is not None:
            pixel_loss = self.pixel_decoder.loss(encoded_BTD, order_BL, images)
            metrics |= {"position_loss": loss.detach(), "pixel_loss": pixel_loss.detach()}
            loss = self.position_weight * loss + pixel_loss
        weighted = (self.attentive or self.ignore_confident) and self.position_weight is None
        return Output(loss, metrics, named, weight_BV.sum() if weighted else None)

    def at_step(self, step: int, total_steps: int) -> None:
        """Decrease sigma linearly, once per epoch: (1 - e / E) sigma in epoch e = 0 .. E-1."""
        if self.sigma_epochs is None:
            return
        epoch = step * self.sigma_epochs // total_steps
        if epoch != self.sigma_epoch:
            self.sigma_epoch = epoch
            self.target_LL.copy_(self._smoothed((1 - epoch / self.sigma_epochs) * self.sigma))

    def _smoothed(self, sigma: float) -> Tensor:
        grid = self.encoder.grid
        if self.smoothing == "paper":
            return smoothed_targets(grid, sigma, distance=self.distance)
        # The released code computes the grid side as image size // tokens per side: 16 instead of 14 at 224 px (fault 7.1).
        side = self.encoder.image_size[1] // grid[1]
        return smoothed_targets(grid, sigma, distance=self.distance, normalise="columns", assumed_side=side)

    def _positions(self, cell_BV: Tensor, dropped_BV: Tensor) -> Tensor:
        """Position embeddings of the visible patches, (B, V, D), with a replacement where they are dropped."""
        true_BVD = gather_tokens(self.encoder.patch_positions, cell_BV)
        if self.position_token == "learned":
            return torch.where(dropped_BV[..., None], self.dropped_position, true_BVD)
        if self.position_token == "zeros":
            return true_BVD * ~dropped_BV[..., None]
        # "wrong": permute the dropped positions of each image, with one permutation for all images of the batch.
        # argsort instead of nonzero(), because nonzero() waits for the GPU.
        slot_BK = (~dropped_BV).int().argsort(dim=1, stable=True)[:, : self.visible - self.placed]
        order_K = torch.randperm(slot_BK.shape[1], device=cell_BV.device)
        taken = gather_tokens(true_BVD, slot_BK[:, order_K])
        return true_BVD.scatter(1, slot_BK[..., None].expand_as(taken), taken)

    @torch.no_grad()
    def _affinity(self, images: Tensor, cell_BV: Tensor) -> Tensor:
        """Affinity of each visible patch to the class token in the whole, unmasked image; (B, V), each row sums to 1."""
        encoded_BTD = self.encoder(images).float()
        cosine_BL = F.cosine_similarity(encoded_BTD[:, :1], encoded_BTD[:, 1:], dim=-1)
        # A softmax over all L cells, renormalised over the visible cells, equals this softmax over the visible cells.
        return (cosine_BL.gather(1, cell_BV) / self.temperature).softmax(-1)


# Maps name prefixes of the official checkpoints to those here; the longest matching prefix counts.
OFFICIAL_NAMES = {
    "": "encoder.",
    "mask_pos_token": "dropped_position",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
    "mask_token": "pixel_decoder.mask_token",
    "aux_decoder_embed.": "pixel_decoder.embed.",
    "aux_decoder_pos_embed": "pixel_decoder.pos_embed",
    "aux_decoder_blocks.": "pixel_decoder.blocks.",
    "aux_decoder_norm.": "pixel_decoder.norm.",
    "aux_decoder_pred.": "pixel_decoder.head.",
}
