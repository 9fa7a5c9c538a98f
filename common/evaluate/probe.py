"""Linear probes: classifiers on the features of a frozen encoder, a whole grid of them at once.

Shapes: B images, T tokens, L concatenated layers, D width of one, G classifiers, K classes; N labelled images, of which H are held out.
"""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from common.data import Augmentation, Loader
from common.evaluate.encoder import TokenEncoder
from common.evaluate.finetune import pool_tokens, tokens
from common.evaluate.frozen import layers_name
from common.method import Output
from common.randomness import generator
from common.recipe import Protocol, RecipeError
from common.vit import ViT

ON_TEST = "_on_test"  # suffix of the protocol name if the best classifier is chosen on the test images: linear_best_on_test
HELD_OUT = 2**32  # part of the random key in `hold_out`; when labels are drawn, the class number is in its place


class LinearProbe(nn.Module):
    """One classifier for each of layers x heads x lr_multipliers x decays, in the order of `grid`; each trains independently.

    They share the forward pass of the encoder and start from the same weights. Heads, before the linear layer: "norm", a batch norm
    without parameters (MAE, appendix A.1); "norm_affine", a batch norm with parameters (VISSL's eval_mlp); "linear", nothing;
    "attentive", a learned query that attends to all tokens. Raises ValueError for more layers than the encoder has.
    """

    def __init__(self, encoder: ViT | TokenEncoder, classes: int, protocol: Protocol):
        super().__init__()
        self.encoder, self.pool, self.width = encoder.requires_grad_(False), protocol.pool, encoder.width
        self.layers, self.stage, self.choose_on = max(protocol.layers), protocol.training, protocol.choose_on
        depth = max(1, len(encoder.blocks))
        if self.layers > depth:
            raise ValueError(f"layers={protocol.layers}: the encoder has {depth}; use at most this number")
        decays = protocol.decays or (protocol.training.weight_decay,)
        self.grid = list(product(protocol.layers, protocol.heads, protocol.lr_multipliers, decays))
        self.heads = nn.ModuleList()
        for layers, head, *_ in self.grid:
            with torch.random.fork_rng(devices=[]):  # the initial weights of a classifier do not depend on the others
                self.heads.append(_head(head, layers * encoder.width, _attention_heads(encoder), classes))

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Output:
        """images (B, C, H, W), or their pooled features (B, L*D), and in training class indices (B,); "logits" are (G, B, K).

        The loss is the sum over the grid. Raises ValueError for an attentive head on pooled features.
        """
        with torch.no_grad():
            token_BTD = tokens(self.encoder, images, self.layers) if images.ndim == 4 else None
            feature_BD = images if token_BTD is None else pool_tokens(token_BTD, self.encoder, self.pool).float()
        logits = []
        for (layers, head, *_), classifier in zip(self.grid, self.heads, strict=True):
            seen = token_BTD if head == "attentive" else feature_BD
            if seen is None:
                raise ValueError("an attentive head needs tokens, but these features are pooled: use images as input")
            logits.append(classifier(seen[..., -layers * self.width :].float()).float())
        logits_GBK = torch.stack(logits)
        losses = [] if targets is None else [F.cross_entropy(logits_BK, targets) for logits_BK in logits]
        return Output(sum(losses, logits_GBK.new_zeros(())), named={"logits": logits_GBK})

    def parameter_groups(self) -> list[dict]:
        """For make_optimizer: the weights of each classifier with its learning rate and decay; its biases and norms without decay."""
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
        """The settings of each classifier of the grid, as in results: layers=last4 head=linear lr=0.05 decay=0.0005."""
        return [
            f"layers={layers_name(layers)} head={head} lr={self.stage.lr * rate:.6g} decay={decay:g}"
            for layers, head, rate, decay in self.grid
        ]

    def best(self, top1_G: list[float]) -> dict[str, int]:
        """Index in the grid of the best for each number of layers, and of all: "_last", "_last4", "_best"; "" if there is one number.

        top1_G: accuracy by which the best is chosen; the first of equal ones is taken. If the choice is made on the test images, the name
        ends in ON_TEST. The best of all is the last entry.
        """
        every = range(len(self.grid))
        groups = {f"_{layers_name(n)}": [g for g in every if self.grid[g][0] == n] for n in dict.fromkeys(n for n, *_ in self.grid)}
        groups = groups | {"_best": [*every]} if len(groups) > 1 else {"": [*every]}
        if self.choose_on == "test":
            groups = {part + (ON_TEST if len(places) > 1 else ""): places for part, places in groups.items()}
        return {part: max(places, key=top1_G.__getitem__) for part, places in groups.items()}

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()
        return self


def _attention_heads(encoder: ViT | TokenEncoder) -> int:
    """Number of attention heads of the encoder's blocks (num_heads in timm); one per 64 features if there are none."""
    attention = getattr(encoder.blocks[0], "attn", None) if len(encoder.blocks) else None
    return getattr(attention, "heads", None) or getattr(attention, "num_heads", None) or max(1, encoder.width // 64)


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


def hold_out(protocol: Protocol, label_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split labelled images for training and for choosing the best classifier of the grid: sorted indices (N - H,) and (H,).

    A tenth of each class is held out, at least one image, and never the only image of a class. The draw depends only on the protocol's
    `label_seed`, or else on `seed`, so a resumed run and all processes use the same images. H is 0 for a single classifier, and if the
    protocol chooses on the test images.
    Raises RecipeError if no class has a second image.
    """
    every_N = torch.arange(len(label_N))
    if protocol.kind != "linear" or protocol.classifiers == 1 or protocol.choose_on == "test":
        return every_N, every_N[:0]
    drawn_N = torch.randperm(len(label_N), generator=generator(protocol.draw_seed(seed), HELD_OUT))
    drawn_N = drawn_N[label_N[drawn_N].argsort(stable=True)]  # class by class
    count_K = torch.bincount(label_N)
    held_K = ((count_K + 5) // 10).clamp(min=1).minimum(count_K - 1)
    label_of_drawn_N = label_N[drawn_N]
    place_N = every_N - (count_K.cumsum(0) - count_K)[label_of_drawn_N]  # within the class
    held_N = place_N < held_K[label_of_drawn_N]
    if not held_N.any():
        raise RecipeError(
            f"protocol {protocol.name}: the best of {protocol.classifiers} classifiers is chosen on held-out labelled images, and no class "
            f"has a second image: use more labels, one classifier, or --set {protocol.name}.choose_on=test"
        )
    return drawn_N[~held_N].sort().values, drawn_N[held_N].sort().values


class FeatureLoader:
    """Load features (N, D) and classes (N,) instead of images, in the order in which `loader` would load the images."""

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
    """Whether a probe can train on cached features: every epoch has the same images, and no head needs tokens."""
    given = protocol.training.augmentation
    idle = {name: getattr(given, name) for name in ("padding", "scale", "ratio", "interpolation", "repeats")}  # no effect by themselves
    return given == Augmentation(crop="none", flip=0.0, **idle) and "attentive" not in protocol.heads
