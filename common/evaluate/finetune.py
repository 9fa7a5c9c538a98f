"""A whole network that learns to classify, from a pre-trained encoder or from nothing, and how answers are counted.

Shapes: B images, T tokens (the class token, if any, first), D width, K classes.
"""

import math

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from timm.data import Mixup
from torch import Tensor, nn

from common.data import Loader
from common.method import Output
from common.processes import once, sum_over_processes
from common.randomness import reseed
from common.recipe import Protocol
from common.run import RunError
from common.vit import ViT


def pool_tokens(tokens_BTD: Tensor, encoder: ViT, pool: str) -> Tensor:
    """The feature of an image (B, D): the mean of its patch tokens, or its class token.

    Raises ValueError for the class token of an encoder that has none.
    """
    if pool == "mean":
        return tokens_BTD[:, encoder.prefix_tokens :].mean(1)
    if not encoder.prefix_tokens:
        raise ValueError("pool='class' needs an encoder with a class token; use pool='mean'")
    return tokens_BTD[:, 0]


def tokens(encoder: ViT, images: Tensor, layers: int = 1) -> Tensor:
    """The tokens (B, T, layers x D) after the last blocks of an encoder, side by side, those of the last block last."""
    return encoder(images) if layers == 1 else torch.cat(encoder.last_blocks(images, layers), dim=-1)


def position_parameters(model: nn.Module) -> set[str]:
    """Names of class tokens and position embeddings, which supervised training does not decay (DeiT, Swin)."""
    ends = ("_token", "pos_embed", "relative_position_bias_table")
    return {name for name, _ in model.named_parameters() if name.endswith(ends)}


class Supervision:
    """How labels teach: Mixup and CutMix (timm's) of each micro-batch, with probability 1, and label smoothing. For training only.

    Raises ValueError for a mixup or cutmix that is not a number from 0 up, and a smoothing outside [0, 1).
    """

    def __init__(self, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0):
        for name, value, most in (("mixup", mixup, math.inf), ("cutmix", cutmix, math.inf), ("smoothing", smoothing, 1)):
            if not isinstance(value, int | float) or not 0 <= value < most:
                raise ValueError(f"{name}={value!r} is not a number from 0 up{'' if most == math.inf else ', below 1'}")
        self.smoothing = smoothing
        self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes) if mixup or cutmix else None

    @torch.compiler.disable  # weights of a blend are new numbers in each step, and a compiled step would hold for one of them
    def blend(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and classes (B,) to blended images and soft targets (B, K); as they are where nothing is to be blended.

        Image i is blended with image B - 1 - i. Of an odd number, the first is blended with the second, and image i with image B - i.
        Raises ValueError for a single image.
        """
        if self.mixup is None:
            return images, targets
        count = len(images)
        if count == 1:
            raise ValueError("mixup and cutmix blend two images, and a micro-batch has 1: use 2 or more")
        if count % 2 == 0:
            return self.mixup(images.clone(), targets)
        # timm takes an even number and pairs first with last. The last is a copy of the second image here, and is dropped afterwards.
        images, targets = self.mixup(torch.cat([images, images[1:2]]), torch.cat([targets, targets[1:2]]))
        return images[:count], targets[:count]

    def loss(self, logits_BK: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with classes, smoothed, or with soft targets, which are smoothed already."""
        smoothing = 0.0 if targets.is_floating_point() else self.smoothing
        return F.cross_entropy(logits_BK.float(), targets, label_smoothing=smoothing)


class Classifier(nn.Module):
    """A whole network that learns to classify: MAE's and DeiT's fine-tuning.

    With mean pooling the encoder's final norm gives way to a fresh one after pooling. The head starts near zero (std 2e-5).
    """

    def __init__(self, encoder: ViT, classes: int, protocol: Protocol):
        super().__init__()
        self.encoder, self.pool = encoder, protocol.pool
        if protocol.pool == "mean":
            getattr(encoder, "module", encoder).norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(encoder.width, eps=1e-6) if protocol.pool == "mean" else nn.Identity()
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.supervision = Supervision(classes, mixup=protocol.mixup, cutmix=protocol.cutmix, smoothing=protocol.smoothing)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Output:
        """images (B, C, H, W) and, in training, class indices (B,). `named["logits"]` is (B, K)."""
        if self.training:
            images, targets = self.supervision.blend(images, targets)
        logits_BK = self.head(self.fc_norm(pool_tokens(self.encoder(images), self.encoder, self.pool))).float()
        if self.training:
            return Output(self.supervision.loss(logits_BK, targets), named={"logits": logits_BK})
        loss = logits_BK.new_zeros(()) if targets is None else F.cross_entropy(logits_BK, targets)
        return Output(loss, named={"logits": logits_BK})

    def no_weight_decay(self) -> set[str]:
        return position_parameters(self)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer 0 is the stem, layer i + 1 is block i, what follows the blocks is the head (timm's layer decay asks for this)."""
        of = r"^encoder\.(?:module\.)?"
        return {"stem": of + r"(?:cls_token|reg_token|pos_embed|patch_embed)", "blocks": [(of + r"blocks\.(\d+)", None)]}


def best_five(logits_BK: Tensor, targets_B: Tensor) -> Tensor:
    """Which of the five best answers (of fewer classes, all) are right: (B, 5) bool, the best answer first. Also of a stack (..., B, K)."""
    return logits_BK.topk(min(5, logits_BK.shape[-1])).indices == targets_B[:, None]


@torch.no_grad()
def accuracy(fabric: Fabric, model: nn.Module, loader: Loader) -> dict[str, float]:
    """top1 and top5 in percent of a model whose output names "logits", over all processes."""
    return {name: value.item() for name, value in zip(("top1", "top5"), accuracies(fabric, model, loader), strict=True)}


@torch.no_grad()
def accuracies(fabric: Fabric, model: nn.Module, loader: Loader, classifiers: tuple[int, ...] = ()) -> Tensor:
    """top1 and top5 in percent, (2,) float64; where the logits are a stack (G, B, K) of `classifiers` = (G,), of each: (2, G).

    Raises RunError, after the last batch, where answers were not finite.
    """
    model.eval()
    hits = torch.zeros(4, *classifiers, dtype=torch.float64, device=fabric.device)
    for images, targets in loader.epoch(0):
        with fabric.autocast():
            logits = model(images).named["logits"]
        right = best_five(logits, targets)
        spoiled = (~logits.isfinite()).any(-1).sum(-1)
        count = torch.full(classifiers, len(targets), device=fabric.device)
        hits += torch.stack([right[..., 0].sum(-1), right.sum((-1, -2)), count, spoiled])
    hits = sum_over_processes(fabric, hits)
    if hits[3].any():
        raise RunError(f"answers to {int(hits[3].max())} of {int(hits[2].max())} images are not finite, so none would be a fair count")
    return 100 * hits[:2] / hits[2]


@torch.no_grad()
def own_metrics(fabric: Fabric, method: nn.Module, loader: Loader, seed: int) -> dict[str, float]:
    """The loss and the metrics of a method itself, means over the images of all processes; its draws depend on the seed alone."""
    method.eval()
    sums: dict[str, float] = {}
    count = 0
    for index, (images, targets) in enumerate(loader.epoch(0)):
        reseed(seed, index, fabric.global_rank, 1)
        with fabric.autocast():
            output = method(images, targets)
        for name, value in {"loss": output.loss, **output.metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value() if callable(value) else value) * len(images)
        count += len(images)
    names = once(fabric, lambda: list(sums))  # a process without images has none, and all must exchange tensors of one shape
    totals = torch.tensor([*(sums.get(name, 0.0) for name in names), count], dtype=torch.float64, device=fabric.device)
    totals = sum_over_processes(fabric, totals).tolist()
    return {name: total / totals[-1] for name, total in zip(names, totals, strict=False)}
