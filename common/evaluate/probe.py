"""Linear probes: classifiers on the features of an encoder that stays as it is, a whole grid of them at once.

Shapes: B images, T tokens, L layers side by side, D width of one, G classifiers, K classes.
"""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from common.data import Augmentation, Loader
from common.evaluate.finetune import pool, tokens
from common.evaluate.frozen import layers_name
from common.method import Output
from common.recipe import Protocol
from common.vit import ViT


class LinearProbe(nn.Module):
    """A classifier for each of the protocol's layers x heads x rates x decays, as `grid` lists them; each learns as if it were alone.

    They share the forward pass of the encoder, and start from the same weights. The heads before the linear layer: "norm", a batch norm
    without parameters (MAE, appendix A.1); "norm_affine", one with (VISSL's eval_mlp); "linear", none; "attentive", a query that is
    learned and attends to all tokens. Raises ValueError for more layers than the encoder has.
    """

    def __init__(self, encoder: ViT, classes: int, protocol: Protocol):
        super().__init__()
        self.encoder, self.how, self.width = encoder.requires_grad_(False), protocol.pool, encoder.width
        self.layers, self.stage = max(protocol.layers), protocol.stage
        if self.layers > len(encoder.blocks):
            raise ValueError(f"layers={protocol.layers}: the encoder has {len(encoder.blocks)}, so ask for that many at most")
        decays = protocol.decays or (protocol.stage.weight_decay,)
        self.grid = list(product(protocol.layers, protocol.heads, protocol.rates, decays))
        self.heads = nn.ModuleList()
        for layers, head, *_ in self.grid:
            with torch.random.fork_rng(devices=[]):  # what one draws does not depend on the others
                self.heads.append(_head(head, layers * encoder.width, encoder.blocks[0].attn.heads, classes))

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Output:
        """images (B, C, H, W), or pooled features of them (B, L*D), and in training class indices (B,); "logits" are (G, B, K).

        The loss is the sum over the grid. Raises ValueError for an attentive head on pooled features.
        """
        with torch.no_grad():
            token_BTD = tokens(self.encoder, images, self.layers) if images.ndim == 4 else None
            feature_BD = images if token_BTD is None else pool(token_BTD, self.encoder, self.how).float()
        logits = []
        for (layers, head, *_), classifier in zip(self.grid, self.heads, strict=True):
            seen = token_BTD if head == "attentive" else feature_BD
            if seen is None:
                raise ValueError("an attentive head needs tokens, and these features are pooled: give it images")
            logits.append(classifier(seen[..., -layers * self.width :].float()).float())
        logits_GBK = torch.stack(logits)
        losses = [] if targets is None else [F.cross_entropy(logits_BK, targets) for logits_BK in logits]
        return Output(sum(losses, logits_GBK.new_zeros(())), named={"logits": logits_GBK})

    def parameter_groups(self) -> list[dict]:
        """For make_optimizer: each classifier's weights at its rate and decay, its biases and norms without decay."""
        return [
            {
                "params": [parameter for parameter in classifier.parameters() if (parameter.ndim > 1) == decayed],
                "weight_decay": decay if decayed else 0.0,
                "lr_scale": rate,
            }
            for (_, _, rate, decay), classifier in zip(self.grid, self.heads, strict=True)
            for decayed in (True, False)
        ]

    def names(self) -> list[str]:
        """What tells each classifier of the grid, as results have it: layers=last4 head=linear lr=0.05 decay=0.0005."""
        return [
            f"layers={layers_name(layers)} head={head} lr={self.stage.lr * rate:.6g} decay={decay:g}"
            for layers, head, rate, decay in self.grid
        ]

    def best(self, top1_G: list[float]) -> dict[str, int]:
        """The place in the grid of the best with each number of layers, and of all: "_last", "_last4", "_best"; of one number, ""."""
        every = range(len(self.grid))
        groups = {f"_{layers_name(n)}": [g for g in every if self.grid[g][0] == n] for n in dict.fromkeys(n for n, *_ in self.grid)}
        groups = groups | {"_best": every} if len(groups) > 1 else {"": every}
        return {part: max(places, key=top1_G.__getitem__) for part, places in groups.items()}

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()
        return self


def _head(kind: str, width: int, attention_heads: int, classes: int) -> nn.Sequential:
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    before: dict[str, list[nn.Module]] = {
        "norm": [nn.BatchNorm1d(width, affine=False, eps=1e-6)],
        "norm_affine": [nn.BatchNorm1d(width)],
        "linear": [],
        "attentive": [AttentionPoolLatent(width, num_heads=attention_heads, norm_layer=nn.LayerNorm)] if kind == "attentive" else [],
    }
    return nn.Sequential(*before[kind], linear)


class FeatureLoader:
    """Features (N, D) and classes (N,) in place of images, in the order in which `loader` would give the images."""

    def __init__(self, loader: Loader, found: tuple[Tensor, Tensor]):
        self.loader, (self.feature_ND, self.target_N) = loader, found

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (B, D) and classes (B,) from micro-batch `start` of the epoch on."""
        for row_B in self.loader.indices(epoch)[start:]:
            image_B = (row_B % len(self.feature_ND)).to(self.feature_ND.device)
            yield self.feature_ND[image_B], self.target_N[image_B]


def can_cache(protocol: Protocol) -> bool:
    """Whether a probe's training may read features once: every epoch shows the same images, and no head asks for tokens."""
    given = protocol.stage.augmentation
    idle = {name: getattr(given, name) for name in ("padding", "scale", "ratio", "interpolation", "repeats")}  # do nothing by themselves
    return given == Augmentation(crop="none", flip=0.0, **idle) and "attentive" not in protocol.heads
