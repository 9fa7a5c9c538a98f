"""Tests of MaPeT's recipes: they have the official settings; the README lists the differences."""

from dataclasses import replace

import pytest
import torch

from common.data import Augmentation
from common.optim import Schedule
from common.recipe import RecipeError
from mapet import recipe as recipes
from mapet.recipe import build, imagenet_vitb16, imagenet_vits16, imagenet_vitt16, prepare

IMAGENET = {"tiny": imagenet_vitt16, "small": imagenet_vits16, "base": imagenet_vitb16}


@pytest.mark.parametrize(("size", "millions"), [("tiny", 7_110_272), ("small", 24_829_184), ("base", 92_117_504)])
def test_models_have_the_official_number_of_parameters(size, millions):
    recipe = IMAGENET[size]()
    with torch.device("meta"):
        model = build(recipe, recipe.build_encoder(3), 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == millions


@pytest.mark.parametrize("size", IMAGENET)
def test_pre_training_is_the_official_configuration(size):
    recipe = IMAGENET[size]()
    stage = recipe.pretrain
    assert (stage.epochs, stage.cooldown_epochs, stage.warmup_epochs) == (300, 10, 10)
    assert (stage.batch_size, stage.lr, stage.warmup_lr, stage.min_lr) == (2048, 1.5e-3, 1e-6, 1e-5)
    assert (stage.betas, stage.weight_decay, stage.clip_norm) == ((0.9, 0.999), 0.05, 3.0)
    assert stage.augmentation == Augmentation(crop="none", resize=224, flip=0.0, color_jitter=0.4)
    assert recipe.encoder == {"position": "learned", "layer_scale": 0.1, "drop_path": 0.1}
    assert recipe.method == {"context": 50, "vocabulary": 8192}


@pytest.mark.parametrize(
    ("size", "epochs", "rate", "decay"), [("tiny", 300, 2.5e-4, None), ("small", 200, 5e-4, 0.65), ("base", 100, 5e-4, 0.65)]
)
def test_fine_tuning_is_the_official_configuration_except_the_lr_of_vit_s(size, epochs, rate, decay):
    (protocol,) = IMAGENET[size]().protocols
    stage = protocol.stage
    assert (stage.epochs, stage.cooldown_epochs, stage.warmup_epochs, stage.lr, stage.layer_decay) == (epochs, 10, 20, rate, decay)
    assert (stage.batch_size, stage.warmup_lr, stage.min_lr, stage.weight_decay, stage.clip_norm) == (512, 1e-6, 1e-6, 0.05, None)
    assert (protocol.pool, protocol.resize, protocol.drop_path) == ("mean", 248, 0.1)
    assert (protocol.mixup, protocol.cutmix, protocol.smoothing) == (0.8, 1.0, 0.1)
    seen = stage.augmentation
    assert (seen.scale, seen.flip, seen.randaugment, seen.erase) == ((0.08, 1.0), 0.5, "rand-m9-mstd0.5", 0.25)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1e-6), (1, 2.595e-5), (19, 4.7505e-4), (20, 4.5235e-4), (99, 1.123e-6), (105, 1e-6)])
def test_fine_tuning_of_vit_b_has_the_official_learning_rates(epoch, rate):
    stage = replace(imagenet_vitb16().protocols[0].stage, layer_decay=None)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=stage.lr)
    Schedule(optimizer, stage, steps_per_epoch=7).step_update(7 * epoch)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenette"])
def test_our_own_recipes_use_no_augmentation_that_moves_the_tokens(name):
    seen = getattr(recipes, name)().pretrain.augmentation
    assert seen.crop == "none" and seen.flip == 0 and seen.randaugment is None


def test_an_unknown_targets_option_is_refused_with_the_nearest_name(tmp_path):
    recipe = replace(recipes.digits(), targets={"tokeniser": "kmeans"})
    with pytest.raises(RecipeError, match="tokenizer"):
        prepare(recipe, None, tmp_path, torch.device("cpu"), 0, make=True)
