"""What a token may see, always as indices or ranks, never as a tokens x tokens mask.

Shapes: B images, N tokens, M kept tokens.
"""

import torch
from torch import Tensor


def kept_tokens(tokens: int, hidden_ratio: float, name: str) -> int:
    """How many of `tokens` remain when the share `hidden_ratio` is hidden: int(tokens * (1 - ratio)), as MAE and DropPos.

    Raises ValueError, with the argument's `name`, for a ratio outside [0, 1] and for one that leaves nothing.
    """
    if type(hidden_ratio) not in (int, float) or not 0 <= hidden_ratio <= 1:
        raise ValueError(f"{name}={hidden_ratio!r} is not a share between 0 and 1")
    kept = int(tokens * (1 - hidden_ratio))
    if kept == 0:
        raise ValueError(f"{name}={hidden_ratio} leaves none of the {tokens} tokens; use a ratio below {1 - 1 / tokens:.4g}")
    return kept


def random_order(noise_BN: Tensor) -> Tensor:
    """A random order of the tokens of each image: the indices (B, N) that sort the noise, lowest first."""
    return noise_BN.argsort(dim=1)


def permutation_ranks(order_BN: Tensor) -> Tensor:
    """The inverse of an order: ranks (B, N), where ranks[b, order[b, i]] = i."""
    rank_BN = torch.empty_like(order_BN)
    return rank_BN.scatter_(1, order_BN, torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN))


def gather_tokens(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """The tokens x[b, index[b, m]], (B, M, D). x may have one image (B = 1) for an index of many."""
    x_BND = x_BND.expand(index_BM.shape[0], -1, -1)
    return x_BND.gather(1, index_BM[:, :, None].expand(-1, -1, x_BND.shape[2]))
