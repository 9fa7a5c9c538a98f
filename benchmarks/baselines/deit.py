"""DeiT (Touvron et al., ICML 2021, arXiv 2012.12877): a ViT trained with labels, and optionally with a teacher and a distillation token.

Shapes: B images, N patches, T tokens (class token first, then the distillation token, if any), D width, K classes.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.distillation import load_teacher
from common.data import Augmentation
from common.evaluate import Supervision, position_parameters
from common.method import Output, Source
from common.recipe import DEIT, DEIT_DROP_PATH, DEIT_LABELS, Protocol, Recipe, TrainConfig, check_options
from common.vit import ViT

SOURCE = Source(
    name="DeiT",
    citation="Touvron et al., *Training data-efficient image transformers & distillation through attention*, ICML 2021",
    arxiv="2012.12877",
    code="facebookresearch/deit",
    licence="Apache-2.0",
)
_KNN = (Protocol(name="knn", kind="knn", pool="class"),)
VARIANTS: dict[str, tuple[str, ...]] = {}  # none: benchmarks.speed already times timm's supervised step


class DeiT(nn.Module):
    """A classifier on the class token of an encoder.

    mixup, cutmix, smoothing: as in common.evaluate.Supervision. distillation: "none", "hard" (the teacher's decision is a second
    label, equation 3) or "soft" (its probabilities at `temperature`, equation 2), with a distillation token that has its own head.
    teacher, teacher_weights: see load_teacher. alpha: the teacher's weight in the loss; None is the paper's: .5 if hard, .1 if soft.
    Raises ValueError for options that are out of range or have no effect, and whatever load_teacher raises.
    """

    def __init__(
        self,
        encoder: ViT,
        classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        distillation: Literal["none", "hard", "soft"] = "none",
        teacher: str = "regnety_160.deit_in1k",
        teacher_weights: str | None = None,
        alpha: float | None = None,
        temperature: float = 3.0,
    ):
        super().__init__()
        if distillation not in ("none", "hard", "soft"):
            raise ValueError(f"distillation={distillation!r} is not known; choose 'none', 'hard' or 'soft'")
        if distillation == "none" and (teacher_weights is not None or alpha is not None):
            raise ValueError("teacher_weights and alpha have no effect without a teacher: add distillation=hard or distillation=soft")
        if encoder.cls_token is None or (encoder.relative and distillation != "none"):
            raise ValueError("DeiT reads a class token, and its distillation token does not support relative positions")
        self.distillation, self.temperature = distillation, temperature
        self.alpha = {"none": 0.0, "hard": 0.5, "soft": 0.1}[distillation] if alpha is None else alpha
        ranges = {"mixup": (mixup, 0, 100), "cutmix": (cutmix, 0, 100), "smoothing": (smoothing, 0, 0.99)}
        for name, (value, low, high) in (ranges | {"alpha": (self.alpha, 0, 1), "temperature": (temperature, 0.01, 100)}).items():
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} is not a number from {low} to {high}")
        self.supervision = Supervision(classes, mixup=mixup, cutmix=cutmix, smoothing=smoothing)
        self.head = nn.Linear(encoder.width, classes)
        if distillation != "none":
            # The official code adds a learned position to this token; the sum of two learned vectors is one learned vector.
            self.distillation_token = nn.Parameter(torch.empty(1, 1, encoder.width))
            self.distillation_head = nn.Linear(encoder.width, classes)
            self.teacher = load_teacher(teacher, teacher_weights, classes, (encoder.channels, *encoder.image_size))
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.trunc_normal_(parameter, std=0.02)
        self.encoder = encoder  # after the loop: it keeps the initialisation of common.vit

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Output:
        """Compute the loss of images (B, C, H, W) and, in training, classes (B,). `named["logits"]` (B, K) are those of the class token;
        in evaluation with two heads, the mean of both, as in DeiT's code. `top1` in percent, unless images are blended."""
        if self.training:
            images, targets = self.supervision.blend(images, targets)
        tokens_BTD = self._encode(images)
        logits_BK = self.head(tokens_BTD[:, 0]).float()
        student_BK = None if self.distillation == "none" else self.distillation_head(tokens_BTD[:, 1]).float()
        if not self.training:
            logits_BK = logits_BK if student_BK is None else (logits_BK + student_BK) / 2
            loss = logits_BK.new_zeros(()) if targets is None else F.cross_entropy(logits_BK, targets)
        else:
            loss = self.supervision.loss(logits_BK, targets)
            if student_BK is not None:
                loss = (1 - self.alpha) * loss + self.alpha * self._teaching(student_BK, self.teacher(images).float())
        blends = self.training and self.supervision.mixup is not None
        metrics = {} if targets is None or blends else {"top1": 100 * (logits_BK.argmax(1) == targets).float().mean()}
        return Output(loss, metrics, {"logits": logits_BK})

    def no_weight_decay(self) -> set[str]:
        return position_parameters(self)

    def _encode(self, images: Tensor) -> Tensor:
        """Encode images to normed tokens (B, T, D). The encoder prepends the class token."""
        if self.distillation == "none":
            return self.encoder(images)
        x_BND = self.encoder.embed(images) + (0 if self.encoder.pos_embed is None else self.encoder.patch_positions)
        return self.encoder.encode(torch.cat([self.distillation_token.to(x_BND.dtype).expand(len(images), -1, -1), x_BND], dim=1))

    def _teaching(self, student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
        """Cross-entropy with the teacher's decision (equation 3), or tau^2 KL(teacher || student) at temperature tau (equation 2)."""
        if self.distillation == "hard":
            return F.cross_entropy(student_BK, teacher_BK.argmax(1))
        pred, target = ((logits_BK / self.temperature).log_softmax(1) for logits_BK in (student_BK, teacher_BK))
        return self.temperature**2 * F.kl_div(pred, target, reduction="batchmean", log_target=True)


def build(recipe: Recipe, encoder: ViT, classes: int) -> DeiT:
    """The method as the recipe wants it. Raises RecipeError for an option that DeiT does not have, and what DeiT raises."""
    check_options(DeiT, recipe.method, taken=("encoder", "classes"))
    return DeiT(encoder, classes, **recipe.method)


def imagenet_vitb16() -> Recipe:
    """DeiT-B, Table 9: `make reproduce PAPER=deit DATA=/datasets/imagenet`. Expected top-1 81.8 ± .2; the paper's 8 GPUs took 53 h."""
    own: dict = {"method": dict(DEIT_LABELS), "encoder": {"position": "learned", "drop_path": DEIT_DROP_PATH}, "supervised": True}
    return Recipe(size="base", image_size=224, patch_size=16, pretrain=DEIT, protocols=(), **own)


def imagenet_vits16() -> Recipe:
    """DeiT-S, likewise: `make reproduce PAPER=deit DATA=/datasets/imagenet RECIPE=imagenet_vits16`. Expected top-1 79.8 (Table 5)."""
    return replace(imagenet_vitb16(), size="small")


def imagenet_vitb16_distilled() -> Recipe:
    """DeiT-B distilled from a RegNetY-16GF, `make reproduce PAPER=deit DATA=/datasets/imagenet RECIPE=imagenet_vitb16_distilled`.

    Expected top-1 83.4 (Table 5). timm downloads DeiT's own teacher (82.9) unless method.teacher_weights names a file.
    """
    return replace(imagenet_vitb16(), method={**DEIT_LABELS, "distillation": "hard", "teacher": "regnety_160.deit_in1k"})


def cifar10() -> Recipe:
    """CIFAR-10 (or 100) with a ViT-S/4: `make reproduce PAPER=deit DATA=cifar10`, one GPU. Ours. Expected: not measured yet."""
    # At 32 px the official code uses RandomCrop with padding instead of RandomResizedCrop.
    stage = replace(DEIT, device_batch=512, augmentation=replace(DEIT.augmentation, crop="padding", padding=4))
    return replace(imagenet_vits16(), image_size=32, patch_size=4, pretrain=stage, protocols=_KNN)


def digits() -> Recipe:
    """scikit-learn's handwritten digits, 8 x 8: `make reproduce PAPER=deit`. Ours; the paper does not have it.

    Encoder, batches and augmentation of DropPos' digits recipe. Hardware: two CPU cores, three minutes a seed. Expected top-1: 97.4.
    """
    shifts, method = Augmentation(crop="padding", padding=1, flip=0.0), {"smoothing": 0.1}
    stage = TrainConfig(epochs=200, batch_size=128, base_lr=2e-3, warmup_epochs=10, augmentation=shifts)
    return replace(imagenet_vitb16(), size="micro", image_size=8, patch_size=2, pretrain=stage, method=method, protocols=_KNN)


DEFAULTS = {"digits": digits, "cifar10": cifar10, "cifar100": cifar10, "folder": imagenet_vitb16}
