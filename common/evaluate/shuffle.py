"""Shuffle test: images whose patches have changed places, to measure how much a classifier relies on their arrangement.

Shapes: B images, C channels, H x W pixels, N patches.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from common.data import Loader
from common.masking import gather_tokens
from common.randomness import generator

SEED = 0  # of the permutations: the same for all runs, so that their results can be compared


class ShuffledPatches:
    """Load the images of an evaluation loader with their patches in another order.

    patch: (height, width) in pixels. The permutation of an image depends only on its index in the split.
    """

    def __init__(self, loader: Loader, patch: tuple[int, int]):
        self.loader, self.patch = loader, patch

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield shuffled images (B, C, H, W) and labels (B,) from micro-batch `start` of the epoch on."""
        for index_B, (images, labels) in zip(self.loader.indices(epoch)[start:], self.loader.epoch(epoch, start), strict=True):
            patches = images.shape[2] // self.patch[0] * (images.shape[3] // self.patch[1])
            order_BN = torch.stack([torch.randperm(patches, generator=generator(SEED, index)) for index in index_B.tolist()])
            yield move_patches(images, order_BN.to(images.device), self.patch), labels


def move_patches(images_BCHW: Tensor, order_BN: Tensor, patch: tuple[int, int]) -> Tensor:
    """The images with patch order[b, n] of image b in cell n. Cells are numbered row by row; `patch` is (height, width) in pixels."""
    B, C, H, W = images_BCHW.shape
    height, width = patch
    grid = images_BCHW.reshape(B, C, H // height, height, W // width, width).permute(0, 2, 4, 1, 3, 5)  # rows, columns, then a patch
    moved = gather_tokens(grid.flatten(3).flatten(1, 2), order_BN).view(grid.shape)
    return moved.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
