"""Decoders and heads for pre-training: light Transformer decoders, and heads that predict positions.

Shapes: B images, C channels, P patch side, M encoded patches, N patches, T tokens (the class token, if any, first), D width.
In the heads on pairs: Q queries, H = D/2 hidden channels, R relative positions.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masking import gather_tokens, permutation_ranks, random_order
from common.positions import Grid, relative_targets, sincos_2d
from common.vit import Block, ViT, initialise, patchify


class PositionDecoder(nn.Module):
    """A light Transformer that classifies the cell of each input token, from the tokens alone.

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
    """MAE's decoder: adds mask tokens for the masked cells and sine-cosine positions for all cells, and predicts pixels.

    Raises ValueError for an encoder without a class token or without positions, and for a width that is not a multiple of the heads.
    """

    def __init__(self, encoder: ViT, width: int = 512, depth: int = 8, heads: int = 16):
        super().__init__()
        if encoder.pos_embed is None or encoder.cls_token is None:
            raise ValueError("MAE's decoder needs an encoder with a position embedding and a class token")
        if width % heads:
            raise ValueError(f"decoder_width={width} is not a multiple of decoder_heads={heads}")
        self.patch_size = encoder.patch_size
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Buffer(torch.cat([torch.zeros(1, width), sincos_2d(encoder.grid, width)])[None])
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, encoder.patch_size**2 * encoder.channels)
        initialise(self)

    def forward(self, x_BTD: Tensor, order_BN: Tensor) -> Tensor:
        """Encoded tokens (B, 1 + M, D) of the first M patches in `order` to pixels (B, N, P*P*C) in row-major order."""
        x = self.embed(x_BTD)
        hidden = self.mask_token.to(x.dtype).expand(x.shape[0], order_BN.shape[1] - x.shape[1] + 1, -1)
        patches = gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), permutation_ranks(order_BN))
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)))[:, 1:]

    def loss(self, x_BTD: Tensor, order_BN: Tensor, images_BCHW: Tensor) -> Tensor:
        """Mean squared error on the masked patches, each normalised by its own mean and (unbiased) variance (MAE, section 3)."""
        hidden_BM = order_BN[:, x_BTD.shape[1] - 1 :]
        target = gather_tokens(patchify(images_BCHW, self.patch_size), hidden_BM)
        target = target.unflatten(-1, (images_BCHW.shape[1], -1)).transpose(-1, -2).flatten(-2)  # channels last, as in MAE's weights
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(gather_tokens(self(x_BTD, order_BN).float(), hidden_BM), target)


class AbsoluteLabelHead(nn.Module):
    """Classifies the cell of a token from the first half of its channels: D/2 -> D/2 -> D/4 -> N (Positional Label, APL).

    Raises ValueError for a grid of one cell and for a width that is not a multiple of 4.
    """

    def __init__(self, width: int, grid: Grid):
        super().__init__()
        _check_label_head(width, grid)
        self.fc1 = nn.Linear(width // 2, width // 2)
        self.fc2 = nn.Linear(width // 2, width // 4)
        self.classify = nn.Linear(width // 4, grid[0] * grid[1])
        initialise_layers(self.children())

    def forward(self, x_BMD: Tensor) -> Tensor:
        """(B, M, D) to logits (B, M, N)."""
        half_BMH = x_BMD[..., : self.fc1.in_features]
        return self.classify(self.fc2(F.gelu(self.fc1(half_BMH))))

    def loss(self, x_BMD: Tensor, cell_BM: Tensor) -> Tensor:
        """Mean cross-entropy for tokens and their target cells."""
        return F.cross_entropy(self(x_BMD).float().flatten(0, 1), cell_BM.flatten())

    def accuracy(self, x_BMD: Tensor, cell_BM: Tensor) -> Tensor:
        """Accuracy over the tokens, from 0 to 1."""
        return (self(x_BMD).argmax(-1) == cell_BM).float().mean()


class RelativeLabelHead(nn.Module):
    """Classifies the relative offset of a pair of tokens: D -> D/2 -> D/2 -> R, from [first half of the query, second half of the key].

    All ordered pairs of tokens are used, including a token with itself (Positional Label, RPL). `queries`: in training, use only this
    number of randomly drawn query tokens per image, with all keys, for an unbiased estimate of the same loss; None: use all.

    The first layer acts on [query, key], so it is the sum of one product of the query and one of the key; there is no activation between
    the last two layers, so they are one product per pair. Both are exact. The loss is computed in chunks of at most `chunk` logits, or of
    one query per image, together with its gradients, so that memory does not grow with the square of the number of tokens.
    Raises ValueError for a grid of one cell, a width that is not a multiple of 4, and queries below 1.
    """

    def __init__(self, width: int, grid: Grid, *, queries: int | None = None, chunk: int = 2**24):
        super().__init__()
        _check_label_head(width, grid)
        if queries is not None and queries < 1:
            raise ValueError(f"queries={queries} is less than 1; give the number of query tokens per image, or None for all")
        self.queries, self.chunk = queries, chunk
        self.targets = nn.Buffer(relative_targets(grid), persistent=False)
        self.fc1 = nn.Linear(width, width // 2)
        self.fc2 = nn.Linear(width // 2, width // 2)
        self.classify = nn.Linear(width // 2, (2 * grid[0] - 1) * (2 * grid[1] - 1))
        initialise_layers(self.children())

    def forward(self, x_BMD: Tensor) -> Tensor:
        """(B, M, D) to logits (B, M, M, R) of all queries and keys, at once."""
        query_BMH, key_BMH, weight_RH, bias_R = self._factors(x_BMD)
        return _pair_logits(query_BMH, key_BMH, weight_RH, bias_R)

    def loss(self, x_BMD: Tensor, cell_BM: Tensor) -> Tensor:
        """Mean cross-entropy over pairs for tokens and their target cells."""
        query_BMH, key_BMH, weight_RH, bias_R = self._factors(x_BMD)
        query_cell_BQ = cell_BM
        if self.training and self.queries is not None and self.queries < cell_BM.shape[1]:
            drawn_BQ = random_order(torch.rand(cell_BM.shape, device=cell_BM.device))[:, : self.queries]
            query_BMH, query_cell_BQ = gather_tokens(query_BMH, drawn_BQ), cell_BM.gather(1, drawn_BQ)
        rows = max(1, self.chunk // (cell_BM.numel() * len(bias_R)))
        return _PairLoss.apply(query_BMH, key_BMH, weight_RH, bias_R, query_cell_BQ, cell_BM, self.targets, rows)

    def accuracy(self, x_BMD: Tensor, cell_BM: Tensor) -> Tensor:
        """Accuracy over the pairs, from 0 to 1."""
        query_BMH, *others = self._factors(x_BMD)
        right = [
            (_pair_logits(query_BMH[:, [row]], *others).argmax(-1) == self.targets[cell_BM[:, row, None, None], cell_BM[:, None]]).sum()
            for row in range(cell_BM.shape[1])
        ]
        return torch.stack(right).sum() / (cell_BM.numel() * cell_BM.shape[1])

    def _factors(self, x_BMD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first layer's output part for each token as query (with the bias) and as key, and the last two layers merged into one."""
        half = x_BMD.shape[-1] // 2
        weights = self.fc1.weight.split(half, dim=1)
        query_BMH = F.linear(x_BMD[..., :half], weights[0], self.fc1.bias)
        key_BMH = F.linear(x_BMD[..., half:], weights[1])
        with torch.autocast(x_BMD.device.type, enabled=False):  # round the product of the two weights only once
            weight_RH = self.classify.weight @ self.fc2.weight
            bias_R = F.linear(self.fc2.bias, self.classify.weight, self.classify.bias)
        return query_BMH, key_BMH, weight_RH.to(query_BMH.dtype), bias_R.to(query_BMH.dtype)


def _pair_logits(query_BQH: Tensor, key_BMH: Tensor, weight_RH: Tensor, bias_R: Tensor) -> Tensor:
    return F.linear(F.gelu(query_BQH[:, :, None] + key_BMH[:, None]), weight_RH, bias_R)


class _PairLoss(torch.autograd.Function):
    """The mean cross-entropy over all pairs of queries and keys. The forward pass also computes the gradients, chunk by chunk, because
    the logits are not kept for the backward pass."""

    @staticmethod
    def forward(ctx, query_BQH, key_BMH, weight_RH, bias_R, asked_BQ, cell_BM, targets, rows):
        factors = query_BQH, key_BMH, weight_RH, bias_R
        d_query, d_key, d_weight, d_bias = gradients = [torch.zeros_like(x, dtype=torch.float32) for x in factors]
        loss = torch.zeros((), device=key_BMH.device)
        with torch.autocast(key_BMH.device.type, enabled=False):
            for start in range(0, query_BQH.shape[1], rows):
                part = slice(start, start + rows)
                target_BQM1 = targets[asked_BQ[:, part, None], cell_BM[:, None]][..., None]
                sum_BQMH = query_BQH[:, part, None] + key_BMH[:, None]
                hidden_BQMH = F.gelu(sum_BQMH)
                logp_BQMR = F.linear(hidden_BQMH, weight_RH, bias_R).log_softmax(-1, dtype=torch.float32)
                loss -= logp_BQMR.gather(-1, target_BQM1).sum()
                if any(ctx.needs_input_grad):
                    d_logit_BQMR = _logit_gradient(logp_BQMR, target_BQM1)
                    d_bias += d_logit_BQMR.sum((0, 1, 2))
                    d_logit_BQMR = d_logit_BQMR.to(weight_RH.dtype)
                    d_weight += d_logit_BQMR.flatten(0, 2).T @ hidden_BQMH.flatten(0, 2)
                    d_sum_BQMH = torch.ops.aten.gelu_backward(d_logit_BQMR @ weight_RH, sum_BQMH)
                    d_query[:, part] = d_sum_BQMH.sum(2)
                    d_key += d_sum_BQMH.sum(1)
        pairs = asked_BQ.numel() * cell_BM.shape[1]
        ctx.save_for_backward(*((gradient / pairs).to(x.dtype) for gradient, x in zip(gradients, factors, strict=True)))
        return loss / pairs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer):
        return *(outer.to(gradient.dtype) * gradient for gradient in ctx.saved_tensors), None, None, None, None


def _logit_gradient(logp: Tensor, target: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy for the logits: probabilities minus the one-hot target. Overwrites the log-probabilities.

    logp: log-probabilities (..., K) float32. target: classes (..., 1).
    """
    return logp.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=torch.float32))


class TokenHead(nn.Linear):
    """A linear classifier for many classes, when the logits of a batch would need more memory than the rest of a training step."""

    def loss(self, x_MD: Tensor, token_M: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy for the features of M tokens, and their accuracy from 0 to 1 (among equal logits the first is the
        prediction). Logits are computed in chunks."""
        device, factors = x_MD.device.type, [x_MD, self.weight, self.bias]
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            factors = [x.to(torch.get_autocast_dtype(device)) for x in factors]
        return _TokenLoss.apply(*factors, token_M, max(1, LOGITS // self.out_features))


LOGITS = 2**22  # number of logits per chunk of TokenHead: 16 MB in float32


class _TokenLoss(torch.autograd.Function):
    """As _PairLoss, for a single linear layer."""

    @staticmethod
    def forward(ctx, x_MD, weight_VD, bias_V, token_M, rows):
        gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (x_MD, weight_VD, bias_V)]
        loss, right = torch.zeros((), device=x_MD.device), torch.zeros((), device=x_MD.device)
        for start in range(0, len(x_MD), rows):
            part = slice(start, start + rows)
            token_M1 = token_M[part, None]
            logit_MV = F.linear(x_MD[part], weight_VD, bias_V).float()
            right += (logit_MV.argmax(1, keepdim=True) == token_M1).sum()
            logp_MV = logit_MV.log_softmax(1)
            loss -= logp_MV.gather(1, token_M1).sum()
            if any(ctx.needs_input_grad):
                d_logit_MV = _logit_gradient(logp_MV, token_M1)
                gradients[2] += d_logit_MV.sum(0)
                d_logit_MV = d_logit_MV.to(weight_VD.dtype)
                gradients[1] += d_logit_MV.T @ x_MD[part]
                gradients[0][part] = d_logit_MV @ weight_VD
        ctx.save_for_backward(*((gradient / len(x_MD)).to(x_MD.dtype) for gradient in gradients))
        right /= len(x_MD)
        ctx.mark_non_differentiable(right)
        return loss / len(x_MD), right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer, _):
        return *(outer.to(gradient.dtype) * gradient for gradient in ctx.saved_tensors), None, None


def _check_label_head(width: int, grid: Grid) -> None:
    if grid[0] * grid[1] < 2:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} cells has no positions to classify; use larger images or smaller patches")
    if width % 4:
        raise ValueError(f"a position head halves its channels twice, so the width must be a multiple of 4, got {width}")


def initialise_layers(layers: Iterable[nn.Module], std: float = 0.02) -> None:
    """Initialise with truncated normal weights and zero biases, as in Positional Label's Swin and heads, I-JEPA and StoP."""
    for layer in layers:
        nn.init.trunc_normal_(layer.get_parameter("weight"), std=std)
        nn.init.zeros_(layer.get_parameter("bias"))
