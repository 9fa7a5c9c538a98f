"""DropPos' recipes. Each docstring is a claim: where the settings come from, the command, the hardware, what to expect."""

from dataclasses import replace
from pathlib import Path

import torch

from common.data import Augmentation, Data
from common.picture import draw_positions
from common.recipe import Protocol, Recipe, Stage, check_options
from common.vit import ViT
from droppos.method import DropPos


def build(recipe: Recipe, encoder: ViT) -> DropPos:
    """The method as the recipe wants it. Raises RecipeError for an option that DropPos does not have."""
    check_options(DropPos, recipe.method)
    return DropPos(encoder, sigma_epochs=recipe.pretrain.epochs, **recipe.method)


@torch.no_grad()
def illustrate(method: DropPos, images: torch.Tensor, data: Data, path: Path) -> None:
    """positions.png: the dropped patches of a few images (B, C, H, W) where the model puts them, beside the truth."""
    named = method.eval()(images).named
    draw_positions(images, method.encoder.patch_size, named["cells"], named["predicted"], named["dropped"], data, path)


def digits() -> Recipe:
    """scikit-learn's handwritten digits on two CPU cores: `make reproduce PAPER=droppos`. Ours; no paper has it."""
    pretrain = Stage(
        epochs=200,
        batch_size=128,
        base_lr=3e-3,
        warmup_epochs=10,
        betas=(0.9, 0.95),
        augmentation=Augmentation(crop="padding", padding=1, flip=0.0),
    )
    finetune = replace(pretrain, epochs=60, base_lr=2e-3, betas=(0.9, 0.999), layer_decay=0.75, warmup_epochs=5)
    common = {"kind": "finetune", "drop_path": 0.1, "smoothing": 0.1}
    return Recipe(
        data=("digits",),
        size="micro",
        image_size=8,
        patch_size=2,
        pretrain=pretrain,
        method={"mask_ratio": 0.25, "decoder_width": 96, "decoder_heads": 3, "attentive": False},
        protocols=(
            Protocol("finetune", stage=finetune, **common),
            Protocol("finetune_20_per_class", stage=replace(finetune, batch_size=100, epochs=100), labels_per_class=20, **common),
            Protocol("finetune_5_per_class", stage=replace(finetune, batch_size=50, epochs=200), labels_per_class=5, **common),
            Protocol("linear", "linear", replace(finetune, epochs=50, optimizer="lars", base_lr=0.1, weight_decay=0.0, layer_decay=None)),
            Protocol("knn", "knn"),
        ),
    )
