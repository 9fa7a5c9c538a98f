"""Features of a frozen encoder, and what needs nothing else: weighted k-NN.

Shapes: N training images, M test images, B images, D width, K neighbours.
"""

import copy

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor

from common.data import Loader
from common.evaluate.finetune import pool
from common.vit import ViT


@torch.no_grad()
def features(fabric: Fabric, encoder: ViT | None, loader: Loader, how: str) -> tuple[Tensor, Tensor]:
    """Pooled features (N, D) of every image and their classes (N,); raw pixels where the encoder is None."""
    found = []
    if encoder is not None:
        encoder = copy.deepcopy(encoder).to(fabric.device).eval()
    for images, targets in loader.epoch(0):
        with fabric.autocast():
            feature = images.flatten(1) if encoder is None else pool(encoder(images), encoder, how)
        found.append((feature.float(), targets))
    feature_ND, target_N = (torch.cat(part) for part in zip(*found, strict=True))
    return feature_ND, target_N


def knn_accuracy(
    train_ND: Tensor, train_N: Tensor, test_MD: Tensor, test_M: Tensor, *, classes: int, neighbours: int = 20, temperature: float = 0.07
) -> float:
    """top1 in percent of the weighted nearest-neighbour classifier: a neighbour of cosine similarity s has exp(s / temperature) votes."""
    train_ND, test_MD = F.normalize(train_ND, dim=1), F.normalize(test_MD, dim=1)
    hits = 0
    for block_BD, block_B in zip(test_MD.split(1024), test_M.split(1024), strict=True):
        similarity_BK, index_BK = (block_BD @ train_ND.T).topk(min(neighbours, len(train_ND)), dim=1)
        votes = torch.zeros(len(block_BD), classes, device=train_ND.device)
        votes.scatter_add_(1, train_N[index_BK], ((similarity_BK - 1) / temperature).exp())  # up to a factor; without the 1 it overflows
        hits += int((votes.argmax(1) == block_B).sum())
    return 100 * hits / len(test_M)
