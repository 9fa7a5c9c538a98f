"""What is put on an encoder to learn from: light Transformer decoders.

Shapes: B images, C channels, P patch side, M encoded patches, N patches, T tokens (the class token, if any, first), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masking import gather_tokens, permutation_ranks
from common.positions import sincos_2d
from common.vit import Block, ViT, initialise, patchify


class PositionDecoder(nn.Module):
    """A light Transformer that classifies the cell of each token it is given, from nothing but the tokens.

    It has no position embedding and no mask tokens (DropPos, section 3; official `decoder_*`).
    """

    def __init__(self, encoder_width: int, cells: int, width: int = 512, depth: int = 2, heads: int = 16):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, cells)
        initialise(self)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to logits (B, T, cells)."""
        return self.head(self.norm(self.blocks(self.embed(x_BTD))))


class PixelDecoder(nn.Module):
    """MAE's decoder: mask tokens fill the hidden cells, every cell has a sine-cosine position, pixels come out.

    Takes the tokens of an encoder with a class token.
    """

    def __init__(self, encoder: ViT, width: int = 512, depth: int = 8, heads: int = 16):
        super().__init__()
        self.patch_size = encoder.patch_size
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos_embed", torch.cat([torch.zeros(1, width), sincos_2d(encoder.grid, width)])[None])
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, encoder.patch_size**2 * encoder.channels)
        initialise(self)

    def forward(self, x_BTD: Tensor, order_BN: Tensor) -> Tensor:
        """Encoded tokens (B, 1 + M, D) of the first M patches of `order` to pixels (B, N, P*P*C) in row-major order."""
        x = self.embed(x_BTD)
        hidden = self.mask_token.to(x.dtype).expand(x.shape[0], order_BN.shape[1] - x.shape[1] + 1, -1)
        patches = gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), permutation_ranks(order_BN))
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)))[:, 1:]

    def loss(self, x_BTD: Tensor, order_BN: Tensor, images_BCHW: Tensor) -> Tensor:
        """Mean squared error on the hidden patches, each normalised by its own mean and (unbiased) variance (MAE, section 3)."""
        hidden_BM = order_BN[:, x_BTD.shape[1] - 1 :]
        target = gather_tokens(patchify(images_BCHW, self.patch_size), hidden_BM)
        target = target.unflatten(-1, (images_BCHW.shape[1], -1)).transpose(-1, -2).flatten(-2)  # channels last, as MAE's weights
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(gather_tokens(self(x_BTD, order_BN).float(), hidden_BM), target)
