"""Linear probes: classifiers on the features of an encoder that stays as it is.

Shapes: B images, D width, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.evaluate.finetune import pool
from common.method import Output
from common.recipe import Protocol
from common.vit import ViT


class LinearProbe(nn.Module):
    """A linear layer on frozen features, behind a batch norm without affine parameters (MAE, appendix A.1)."""

    def __init__(self, encoder: ViT, classes: int, protocol: Protocol):
        super().__init__()
        self.encoder, self.how = encoder.requires_grad_(False), protocol.pool
        self.norm = nn.BatchNorm1d(encoder.width, affine=False, eps=1e-6)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Output:
        """images (B, C, H, W) and, in training, class indices (B,). `named["logits"]` is (B, K)."""
        with torch.no_grad():
            feature_BD = pool(self.encoder(images), self.encoder, self.how).float()
        logits_BK = self.head(self.norm(feature_BD)).float()
        loss = logits_BK.new_zeros(()) if targets is None else F.cross_entropy(logits_BK, targets)
        return Output(loss, named={"logits": logits_BK})

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()
        return self
