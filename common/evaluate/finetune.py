"""Fine-tuning of a whole network, from a pre-trained encoder or from scratch, and classification accuracy.

Shapes: B images, T tokens (the class token, if any, first), D width, K classes.
"""

import math

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from timm.data import Mixup
from torch import Tensor, nn

from common.data import Batches, Loader
from common.evaluate.encoder import TokenEncoder
from common.method import Output
from common.processes import once, sum_over_processes
from common.randomness import reseed
from common.recipe import Protocol
from common.run import RunError
from common.vit import ViT


def pool_tokens(tokens_BTD: Tensor, encoder: ViT | TokenEncoder, pool: str) -> Tensor:
    """The feature of an image (B, D): the mean of its patch tokens, or its class token.

    Raises ValueError for the class token of an encoder that has none.
    """
    if pool == "mean":
        return tokens_BTD[:, encoder.prefix_tokens :].mean(1)
    if not encoder.prefix_tokens:
        raise ValueError("pool='class' needs an encoder with a class token; use pool='mean'")
    return tokens_BTD[:, 0]


def tokens(encoder: ViT | TokenEncoder, images: Tensor, layers: int = 1) -> Tensor:
    """The tokens (B, T, layers x D) after the last blocks of an encoder, concatenated in the order of the blocks."""
    return encoder(images) if layers == 1 else torch.cat(encoder.last_blocks(images, layers), dim=-1)


def position_parameters(model: nn.Module) -> set[str]:
    """Names of class tokens and position embeddings, which have no weight decay in supervised training (DeiT, Swin)."""
    ends = ("_token", "pos_embed", "relative_position_bias_table")
    return {name for name, _ in model.named_parameters() if name.endswith(ends)}


class Supervision:
    """Supervised loss with Mixup and CutMix (of timm; on each micro-batch, with probability 1) and label smoothing.

    Raises ValueError for a mixup or cutmix that is not a number from 0 up, and for a smoothing outside [0, 1).
    """

    def __init__(self, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0):
        for name, value, most in (("mixup", mixup, math.inf), ("cutmix", cutmix, math.inf), ("smoothing", smoothing, 1)):
            if not isinstance(value, int | float) or not 0 <= value < most:
                raise ValueError(f"{name}={value!r} is not a number from 0 up{'' if most == math.inf else ', below 1'}")
        self.smoothing = smoothing
        self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes) if mixup or cutmix else None

    @torch.compiler.disable  # the mixing weights change in each step, and a compiled step would be valid for one of them only
    def blend(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and classes (B,) to mixed images and soft targets (B, K); unchanged without mixup and cutmix.

        Image i is mixed with image B - 1 - i. If B is odd, the first is mixed with the second, and any other image i with image B - i.
        Raises ValueError for a single image.
        """
        if self.mixup is None:
            return images, targets
        count = len(images)
        if count == 1:
            raise ValueError("mixup and cutmix mix two images, and a micro-batch has 1: use 2 or more")
        if count % 2 == 0:
            return self.mixup(images.clone(), targets)
        # timm needs an even number of images and pairs first with last. So append a copy of the second image and drop it afterwards.
        images, targets = self.mixup(torch.cat([images, images[1:2]]), torch.cat([targets, targets[1:2]]))
        return images[:count], targets[:count]

    def loss(self, logits_BK: Tensor, targets: Tensor | None) -> Tensor:
        """Cross-entropy with classes (with label smoothing) or with soft targets (already smoothed)."""
        assert targets is not None
        smoothing = 0.0 if targets.is_floating_point() else self.smoothing
        return F.cross_entropy(logits_BK.float(), targets, label_smoothing=smoothing)

    def judge(self, logits_BK: Tensor, targets: Tensor | None, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of a method that learns from labels: in training `loss` and no metrics; in evaluation cross-entropy without
        smoothing, and top1 and top5 in percent; without targets zero and no metrics."""
        if training:
            return self.loss(logits_BK, targets), {}
        if targets is None:
            return logits_BK.new_zeros(()), {}
        right_B5 = best_five(logits_BK, targets)
        metrics = {"top1": 100 * right_B5[:, 0].float().mean(), "top5": 100 * right_B5.any(1).float().mean()}
        return F.cross_entropy(logits_BK, targets), metrics


class Classifier(nn.Module):
    """An encoder with a classification head, for fine-tuning as in MAE and DeiT.

    With mean pooling, a new norm after pooling replaces the encoder's final norm. The head starts near zero (std 2e-5).
    """

    def __init__(self, encoder: ViT | TokenEncoder, classes: int, protocol: Protocol):
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
        """Parameter groups for timm's layer decay: layer 0 is the stem, layer i + 1 is block i, the rest is the head."""
        of = r"^encoder\.(?:module\.)?"
        return {"stem": of + r"(?:cls_token|reg_token|pos_embed|patch_embed)", "blocks": [(of + r"blocks\.(\d+)", None)]}


def best_five(logits_BK: Tensor, targets_B: Tensor) -> Tensor:
    """Whether each of the top 5 predictions (or all, if K < 5) is correct: (B, 5) bool, the best first. Also for a stack (..., B, K)."""
    return logits_BK.topk(min(5, logits_BK.shape[-1])).indices == targets_B[:, None]


@torch.no_grad()
def accuracy(fabric: Fabric, model: nn.Module, loader: Batches) -> dict[str, float]:
    """top1 and top5 in percent, over all processes, of a model whose output has named["logits"]."""
    return {name: value.item() for name, value in zip(("top1", "top5"), accuracies(fabric, model, loader), strict=True)}


@torch.no_grad()
def accuracies(fabric: Fabric, model: nn.Module, loader: Batches, classifiers: tuple[int, ...] = ()) -> Tensor:
    """top1 and top5 in percent, (2,) float64; or (2, G) if the logits are a stack (G, B, K), where `classifiers` is (G,).

    Raises RunError, after the last batch, if logits were not finite.
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
        raise RunError(f"the logits of {int(hits[3].max())} of {int(hits[2].max())} images are not finite, so no accuracy is reported")
    return 100 * hits[:2] / hits[2]


@torch.no_grad()
def own_metrics(fabric: Fabric, method: nn.Module, loader: Loader, seed: int) -> dict[str, float]:
    """The loss and the metrics of a method, averaged over the images of all processes. Its random draws depend only on the seed."""
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
    names = once(fabric, lambda: list(sums))  # a process without images has no names, and all processes must exchange tensors of one shape
    mine = torch.tensor([*(sums.get(name, 0.0) for name in names), count], dtype=torch.float64, device=fabric.device)
    totals = sum_over_processes(fabric, mine).tolist()
    return {name: total / totals[-1] for name, total in zip(names, totals, strict=False)}
