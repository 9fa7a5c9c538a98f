"""StoP's and I-JEPA's recipes."""

from dataclasses import replace

from common.data import Augmentation
from common.recipe import Protocol, Recipe, Stage, check_options
from common.vit import ViT
from stop.method import StoP

VARIANTS = {
    "I-JEPA": ("method.noise=none", "method.masks=released"),
    "released": ("method.mode=released", "method.masks=released"),
    "paper": ("method.masks=released",),
}

ARMS = {"ijepa": ("method.noise=none",), "ijepa+stop": ()}


def build(recipe: Recipe, encoder: ViT, classes: int) -> StoP:
    """The method as the recipe wants it, without the labels. Raises RecipeError for an option that StoP does not have."""
    check_options(StoP, recipe.method, taken=("encoder",))
    return StoP(encoder, **recipe.method)


def digits() -> Recipe:
    """digits"""
    pretrain = Stage(
        epochs=200,
        batch_size=128,
        base_lr=1e-3,
        lr_batch=128,
        warmup_epochs=10,
        weight_decay=0.04,
        final_weight_decay=0.4,
        augmentation=Augmentation(crop="padding", padding=1, flip=0.0),
    )
    linear = replace(pretrain, epochs=50, optimizer="lars", base_lr=5.0, weight_decay=0.0, final_weight_decay=None)
    return Recipe(
        ("digits",),
        "micro",
        8,
        1,
        pretrain,
        (Protocol("linear", "linear", linear), Protocol("knn", "knn")),
        method={"predictor_width": 48, "predictor_depth": 3},
        encoder={"class_token": False},
        arms=ARMS,
    )


def imagenet_vitb16() -> Recipe:
    """b16"""
    pretrain = Stage(600, 2048, 8e-4, 2048, 15, 2e-4, 1e-4, weight_decay=0.04, final_weight_decay=0.4)
    return Recipe(("folder",), "base", 224, 16, pretrain, (), encoder={"class_token": False}, arms=ARMS)
