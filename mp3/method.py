"""MP3 (Zhai et al., ICML 2022, arXiv 2207.07611), from the images to the loss, in the paper's order.

A ViT without position embeddings encodes all patches, but only a random subset of them, the context, serves as keys and values. From
content alone, the ViT predicts for every patch which of the N grid cells it comes from.

Shapes: B images, N patches (and cells), M context patches, T tokens (class token first), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masking import kept_tokens, random_order
from common.method import Output
from common.vit import ViT, initialise


class MP3(nn.Module):
    """MP3 around an encoder without positions.

    eta: masking ratio, the fraction of patches outside the context; the paper reports timings for 0.3, 0.5, 0.75 and 0.9 (Table 2).
    Raises ValueError for an encoder with positions, and for an eta that is outside [0, 1) or leaves no context.
    """

    def __init__(self, encoder: ViT, *, eta: float = 0.75):
        super().__init__()
        if encoder.pos_embed is not None or encoder.relative:
            raise ValueError("MP3 predicts positions, so its encoder must not receive them: build it with position='none'")
        self.encoder, self.cells = encoder, encoder.grid[0] * encoder.grid[1]
        self.context = kept_tokens(self.cells, eta, "eta")
        self.head = nn.Linear(encoder.width, self.cells)
        initialise(self.head)

    def forward(self, images: Tensor, targets: Tensor | None = None, *, noise: Tensor | None = None) -> Output:
        """Compute the loss of images (B, C, H, W). `targets` is not used. noise (B, N) replaces the random draw; lowest first.

        named: cells (B, N), the true cell of each token, in the encoder's token order (the first M are the context);
        predicted (B, N); logits (B, N, N); encoded (B, T, D).
        """
        # Context: M random patches of each image, the same in every layer (Figure 1).
        noise = torch.rand(len(images), self.cells, device=images.device) if noise is None else noise
        cell_BN = random_order(noise)

        # Masked attention. Without positions, a ViT is permutation-equivariant. So the context is moved to the front once, and keys and
        # values are a slice in every layer. Queries: all tokens; keys and values: the class token and the context.
        x_BND = self.encoder.embed(images, cell_BN)
        encoded_BTD = self.encoder.encode(x_BND, context=self.context)

        # A linear head on every patch, in the context or not, and the cross-entropy with the true cell.
        logit_BNN = self.head(encoded_BTD[:, self.encoder.prefix_tokens :]).float()
        loss = F.cross_entropy(logit_BNN.flatten(0, 1), cell_BN.flatten())

        predicted_BN = logit_BNN.argmax(-1)
        metrics = {"position_top1": 100 * (predicted_BN == cell_BN).float().mean()}
        return Output(loss, metrics, {"cells": cell_BN, "predicted": predicted_BN, "logits": logit_BNN, "encoded": encoded_BTD})


# There are no official weights. The unofficial fork uses timm's names, and has a position embedding that it never uses.
OFFICIAL_NAMES = {"": "encoder.", "head.": "head."}
UNUSED_NAMES = ("pos_embed",)
