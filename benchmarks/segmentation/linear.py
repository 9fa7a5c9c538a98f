"""Segmentation with a linear layer on the patch tokens, trained end to end or on a frozen encoder, and k-NN retrieval of patch classes.

Published work found that a linear layer on an encoder that is trained with it ranks encoders as heavy decoders do, at a thirteenth of the
cost (Kerssies et al. 2024, arXiv 2404.12172). Retrieval needs no training (Balazevic et al. 2023, arXiv 2306.01667).

Shapes: B images, H x W pixels, h x w patches, N = h w, D width, K classes, R patches in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.segmentation.data import IGNORED
from common.evaluate.finetune import Classifier
from common.method import Output
from common.vit import ViT


class Segmenter(nn.Module):
    """An encoder with a linear layer that gives the logits of each patch; they are interpolated bilinearly to pixels."""

    def __init__(self, encoder: ViT, classes: int, frozen: bool = False):
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        if frozen:
            encoder.requires_grad_(False)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "Segmenter":
        """A frozen encoder has no stochastic depth."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Output:
        """images (B, C, H, W) of the encoder's size and, in training, classes (B, H, W) uint8. `named["logits"]` is (B, K, h, w)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            token_BND = self.encoder(images)[:, self.encoder.prefix_tokens :]
        logits_BKhw = self.head(token_BND).mT.unflatten(2, self.encoder.grid)
        if classes is None:
            return Output(logits_BKhw.new_zeros(()), named={"logits": logits_BKhw.float()})
        logits_BKHW = F.interpolate(logits_BKhw.float(), size=classes.shape[1:], mode="bilinear")
        count = (classes != IGNORED).sum().clamp(min=1)  # the loss is the mean over all pixels of the effective batch that have a class
        loss = F.cross_entropy(logits_BKHW, classes.long(), ignore_index=IGNORED, reduction="sum") / count
        return Output(loss, named={"logits": logits_BKhw}, weight=count)

    no_weight_decay = Classifier.no_weight_decay
    group_matcher = Classifier.group_matcher


class Retrieval(nn.Module):
    """Classes of patches from the most similar patches of the training images, by cosine similarity. Nothing is trained.

    The weight of a neighbour is softmax(similarity / temperature); its class is the share of each class among its pixels.
    """

    def __init__(self, encoder: ViT, classes: int, *, neighbours: int = 30, temperature: float = 0.02):
        super().__init__()
        self.encoder, self.classes = encoder.requires_grad_(False), classes
        self.neighbours, self.temperature = neighbours, temperature
        self.key_RD, self.share_RK = torch.empty(0), torch.empty(0)

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to patch tokens of length 1, (B N, D) float32."""
        return F.normalize(self.encoder(images)[:, self.encoder.prefix_tokens :].flatten(0, 1).float(), dim=-1)

    def remember(self, token_RD: Tensor, share_RK: Tensor) -> None:
        """Keep patches: tokens as `tokens` returns them, and their shares of each class as `shares` returns them."""
        self.key_RD, self.share_RK = token_RD, share_RK

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Output:
        """images (B, C, H, W) of the encoder's size. `named["logits"]` are the shares of the classes, (B, K, h, w)."""
        found = [self._shares(query_QD) for query_QD in self.tokens(images).split(1024)]
        logits_BKhw = torch.cat(found).view(len(images), -1, self.classes).mT.unflatten(2, self.encoder.grid)
        return Output(logits_BKhw.new_zeros(()), named={"logits": logits_BKhw})

    def _shares(self, query_QD: Tensor) -> Tensor:
        """The shares of the classes of some patches, (Q, K)."""
        nearest = (query_QD @ self.key_RD.T).topk(min(self.neighbours, len(self.key_RD)))
        weight_QM = (nearest.values / self.temperature).softmax(-1)
        return (weight_QM[:, None] @ self.share_RK[nearest.indices])[:, 0]


def shares(classes: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """The share of each class among the pixels of each patch, (B, h, w, K); 0 for all classes where less than half of them have one.

    classes: (B, H, W) uint8, H and W multiples of h and w.
    """
    B, H, W = classes.shape
    pixels = classes.view(B, grid[0], H // grid[0], grid[1], W // grid[1]).transpose(2, 3).flatten(3).long()
    pixels = pixels.where(pixels != IGNORED, count)
    found = torch.zeros(*pixels.shape[:3], count + 1, device=classes.device).scatter_add_(3, pixels, torch.ones_like(pixels).float())
    known = found[..., :count].sum(-1, keepdim=True)
    return (found[..., :count] / known.clamp(min=1)).where(2 * known >= pixels.shape[3], 0)
