"""MaPeT (Baraldi et al., arXiv 2306.07346): masked and permuted pre-training, in the order of the paper's method figure.

The patches of an image are put in a random order. The first ones are the context. For the others, tokens (ids of a tokenizer's vocabulary)
are predicted one after the other. Each prediction sees the context, the patches before it in this order and, instead of those after it,
placeholders with their positions. So every prediction knows all positions, and depends on the hidden patches before it.

Two streams share all weights. The content stream has the patches; the query stream has only the position of the patch that it predicts.

Shapes: B images, N patches, C content tokens (the class token, then patches), P placeholders, Q predicted patches, D width, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from common.attention import Window
from common.heads import TokenHead, initialise_layers
from common.masking import gather_tokens, random_order
from common.method import Output
from common.vit import ViT


def visibility(tokens: int, context: int, last: int, content: int) -> Window:
    """The attention mask. N + 1 = `tokens` have ranks 0 (the class token), 1, 2, ...; those of rank `context` to `last` are predicted.

    One row: the content tokens of rank 0 to `content` - 1, the placeholders of rank `context` to N, and the query tokens, never keys.
    With e = max(rank, context - 1), a content token is visible from time e on, a placeholder before time e. Content tokens attend at time
    e, placeholders at context - 1, query tokens at rank - 1. So each token sees every position once, as content or as placeholder.

    Permuted prediction has `last` content tokens, masked prediction `context`: its query tokens attend at context - 1.
    """
    rank = torch.arange(tokens)
    seen, hidden, asked = rank[:content].clamp(min=context - 1), rank[context:], rank[context : last + 1]
    time = torch.cat([seen, torch.full_like(hidden, context - 1), (asked - 1).clamp(max=content - 1)])
    visible_from = torch.cat([seen, torch.zeros_like(hidden)])
    visible_until = torch.cat([torch.full_like(seen, tokens), hidden])
    return Window(*(row.int()[None] for row in (time, visible_from, visible_until)))


class MaPeT(nn.Module):
    """Masked and permuted pre-training of a ViT with a class token and positions.

    context: number of tokens that are always visible, with the class token (official `least_number`: 50 of 197). target_limit: highest
    rank that is predicted (official `upper_limit`); default: the last patch. vocabulary: number of tokens of the tokenizer.
    prediction: "permuted", or "masked": each prediction sees the context and no hidden patch, as in BEiT (ours, for the comparison).
    initialise: "official" (matrices, positions and placeholder: truncated normal, std .02; class token: normal, std 1e-6; patch
    convolution: torch's default) or "mae" (the encoder keeps the initialisation of common.vit, as in the other methods).
    Raises ValueError for an encoder without class token or positions, and for numbers that leave nothing visible or nothing to predict.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        context: int = 50,
        target_limit: int | None = None,
        vocabulary: int = 8192,
        prediction: Literal["permuted", "masked"] = "permuted",
        initialise: Literal["official", "mae"] = "official",
    ):
        super().__init__()
        if encoder.cls_token is None or encoder.pos_embed is None:
            raise ValueError("MaPeT uses a class token, and placeholders with positions: the encoder needs class_token and positions")
        patches = encoder.grid[0] * encoder.grid[1]
        last = patches if target_limit is None else target_limit
        if not 0 < context <= patches:
            raise ValueError(
                f"context={context} counts the class token and the visible ones of {patches} patches: use 1 to {patches}, "
                "so that at least one patch is left to predict"
            )
        if not context <= last <= patches:
            raise ValueError(f"target_limit={last} is the highest rank that is predicted: use {context} (the context) to {patches}")
        if initialise not in ("official", "mae"):
            raise ValueError(f"initialise={initialise!r} is not known; choose 'official' or 'mae'")
        if prediction not in ("permuted", "masked"):
            raise ValueError(f"prediction={prediction!r} is not known; choose 'permuted' or 'masked'")
        if vocabulary < 2:
            raise ValueError(f"vocabulary={vocabulary} is too small: use at least 2 tokens")
        self.encoder, self.context, self.last, self.vocabulary = encoder, context, last, vocabulary
        self.placeholder = nn.Parameter(torch.empty(1, 1, encoder.width))
        self.head = TokenHead(encoder.width, vocabulary)
        self.content = last if prediction == "permuted" else context  # the class token and the patches that any token sees
        rows = (nn.Buffer(row, persistent=False) for row in visibility(patches + 1, context, last, self.content))
        self.time, self.visible_from, self.visible_until = rows
        nn.init.trunc_normal_(self.placeholder, std=0.02)
        initialise_layers([self.head])
        if initialise == "official":
            initialise_layers(layer for layer in encoder.modules() if isinstance(layer, nn.Linear))
            encoder.patch_embed.proj.reset_parameters()
            nn.init.normal_(encoder.cls_token, std=1e-6)
            if isinstance(encoder.pos_embed, nn.Parameter):  # positions may be fixed
                nn.init.trunc_normal_(encoder.pos_embed, std=0.02)

    def forward(self, images: Tensor, targets: Tensor | None = None, *, order: Tensor | None = None) -> Output:
        """Compute the loss of images (B, C, H, W) and the token id of each patch: targets (B, N), integer, in row-major order.

        order (B, N): the permutation of the patches; it replaces the random draw.
        Raises ValueError unless there is one token for each patch.
        """
        encoder, patches = self.encoder, self.encoder.grid[0] * self.encoder.grid[1]
        if targets is None or targets.shape != (len(images), patches):
            found = "none" if targets is None else f"targets {tuple(targets.shape)}"
            raise ValueError(f"MaPeT predicts a token for each of {patches} patches: give targets ({len(images)}, {patches}), got {found}")

        # Permutation: the class token comes first (rank 0), then the patches. Tokens are in rank order, so one window fits all images.
        order_BN = random_order(torch.rand(targets.shape, device=images.device)) if order is None else order
        first, last = self.context - 1, self.last
        seen_BC, hidden_BP, asked_BQ = order_BN[:, : self.content - 1], order_BN[:, first:], order_BN[:, first:last]

        # Content stream: the class token, the patches that any token sees (not the last predicted one), and a placeholder for each
        # hidden patch. Query stream: the same placeholders, for the predicted patches.
        position_1ND = encoder.patch_positions
        class_B1D = encoder.first_token.expand(len(images), -1, -1)
        patch_BCD = encoder.embed(images, seen_BC) + gather_tokens(position_1ND, seen_BC)
        hidden_BPD = self.placeholder + gather_tokens(position_1ND, hidden_BP)
        x_BTD = torch.cat([class_B1D, patch_BCD, hidden_BPD, hidden_BPD[:, : asked_BQ.shape[1]]], dim=1)

        # Blocks: queries from both streams, keys and values from the content stream; both share the weights and the drop path draw. The
        # last block computes only the query stream.
        window, asked = Window(self.time, self.visible_from, self.visible_until), asked_BQ.shape[1]
        *blocks, last_block = encoder.blocks
        for block in blocks:
            x_BTD = block(x_BTD, keys=x_BTD.shape[1] - asked, window=window)
        x_BQD = last_block(x_BTD, keys=x_BTD.shape[1] - asked, queries=asked, window=window)

        # Loss: cross-entropy with the token id of each predicted patch.
        feature_BQD = encoder.norm(x_BQD)
        loss, right = self.head.loss(feature_BQD.flatten(0, 1), targets.gather(1, asked_BQ).flatten().long())
        named = {"features": feature_BQD, "cells": asked_BQ, "context": order_BN[:, :first]}
        return Output(loss, {"token_top1": 100 * right}, named)

    def no_weight_decay(self) -> set[str]:
        """Positions and the class token; the placeholder is decayed, as in the official code."""
        return {"encoder.pos_embed", "encoder.cls_token"}


# Maps name prefixes of the official checkpoints, after fusing q and kv, to those here; the longest matching prefix counts.
OFFICIAL_NAMES = {"": "encoder.", "mask_positional_token": "placeholder", "decoder.": "head."}
