"""Every family of Positional Label runs a training step on real photographs at 224 px with its ImageNet recipe."""

from pathlib import Path

import pytest
import torch

from common.data import Loader, open_data
from common.recipe import choose_arms, override
from common.train import has_fast_bf16
from positional_label import recipe as recipes

IMAGENETTE = Path(__file__).parents[2] / "shared" / "data" / "imagenette"
FAMILIES = {
    "ViT-B": (recipes.imagenet_vit, ()),
    "DeiT-B": (recipes.imagenet_deit, ()),
    "DeiT-B, distilled": (recipes.imagenet_deit, ("size=deit_base_distilled_patch16_224",)),
    "Swin-T": (recipes.imagenet_swin_tiny, ()),
    "Swin-B": (recipes.imagenet_swin, ()),
    "NesT-T": (recipes.imagenet_nest, ("size=nest_tiny",)),
    "NesT-B": (recipes.imagenet_nest, ()),
}


@pytest.mark.slow
@pytest.mark.skipif(not IMAGENETTE.is_dir(), reason="needs imagenette beside the repository, under shared/data")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_arm_runs_a_training_step_on_photographs(family):
    function, changes = FAMILIES[family]
    data, device = open_data(str(IMAGENETTE)), torch.device("cpu")
    for arm, recipe in choose_arms(function()).items():
        recipe = override(recipe, changes)
        loader = Loader(
            data.train,
            data=data,
            image_size=(224, 224),
            batch_size=2,
            augmentation=recipe.pretrain.augmentation,
            seed=0,
            device=device,
            workers=0,
        )
        images, targets = next(loader.epoch(0))
        torch.manual_seed(0)
        method = recipes.build(recipe, recipe.build_encoder(data.channels), data.classes)
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16(device)):
            output = method(images, targets)
        output.loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in method.parameters())
        before = method.encoder.state_dict()["patch_embed.proj.weight"].clone()
        optimizer.step()
        assert not torch.equal(before, method.encoder.state_dict()["patch_embed.proj.weight"])
        if method.head is not None:  # a new head is at chance: the loss is the log of its number of classes
            labels = {"apl": method.grid[0] * method.grid[1], "rpl": (2 * method.grid[0] - 1) * (2 * method.grid[1] - 1)}
            assert output.metrics["position_loss"].exp().item() == pytest.approx(labels[arm[-3:]], rel=0.05), arm
