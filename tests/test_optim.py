"""Tests of weight decay, learning rate schedules, and single optimizer steps."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from common.evaluate import Classifier, LinearProbe
from common.optim import Schedule, make_optimizer
from common.recipe import Protocol, TrainConfig
from common.vit import ViT, vit
from droppos.method import DropPos

STAGE = TrainConfig(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=10, betas=(0.9, 0.95))
FINETUNE = TrainConfig(epochs=100, batch_size=1024, base_lr=5e-4, warmup_epochs=5, layer_decay=0.65)
PER_EPOCH = 10


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Map each parameter's name to its group in the optimizer. A parameter may be in at most one group."""
    group_of = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in group_of
            group_of[id(parameter)] = group
    return {name: group_of[id(p)] for name, p in model.named_parameters() if id(p) in group_of}


def classifier(pool: str = "mean", **options) -> Classifier:
    encoder = ViT(image_size=8, patch_size=4, width=16, depth=2, heads=2, **options)
    return Classifier(encoder, 5, Protocol(name="finetune", kind="finetune", stage=FINETUNE, pool=pool))


def rates(stage: TrainConfig, epochs: list[float]) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=stage.lr)
    schedule = Schedule(optimizer, stage, PER_EPOCH)
    found = []
    for epoch in epochs:
        schedule.step_update(round(epoch * PER_EPOCH))
        found.append(optimizer.param_groups[0]["lr"])
    return found


# ---- weight decay


def test_weight_decay_of_droppos_vit_b_applies_to_61_of_180_tensors():
    with torch.device("meta"):
        model = DropPos(vit("base"))
    groups = names(model, make_optimizer(model, STAGE))
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.05}
    left = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert (len(decayed), len(left)) == (61, 119) and len(groups) == 180
    assert {"encoder.cls_token", "dropped_position"} <= decayed
    assert all(name.endswith("bias") or "norm" in name for name in left)


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_weight_decay_in_fine_tuning_skips_tokens_positions_biases_and_norms(layer_decay):
    model = classifier(position="learned")
    groups = names(model, make_optimizer(model, replace(FINETUNE, layer_decay=layer_decay)))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    left = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert left == {name for name, p in model.named_parameters() if p.ndim == 1} | {"encoder.cls_token", "encoder.pos_embed"}


def test_frozen_parameters_are_not_given_to_the_optimizer():
    probe = LinearProbe(ViT(image_size=8, patch_size=4, width=16, depth=1, heads=2), 5, Protocol(name="linear", kind="linear", stage=STAGE))
    assert set(names(probe, make_optimizer(probe, STAGE))) == {"heads.0.1.weight", "heads.0.1.bias"}


# ---- learning rates


def test_the_lr_is_base_lr_times_the_batch_size_over_lr_batch():
    assert STAGE.lr == pytest.approx(2.4e-3)
    assert replace(STAGE, batch_size=2048).lr == pytest.approx(1.2e-3)
    assert replace(STAGE, batch_size=512, base_lr=5e-4, lr_batch=512).lr == pytest.approx(5e-4)
    assert all(group["lr"] == STAGE.lr for group in make_optimizer(classifier(), STAGE).param_groups)


def test_the_schedule_of_droppos_has_the_official_learning_rates():
    assert rates(STAGE, [0, 5, 10, 800]) == pytest.approx([0, 1.2e-3, 2.4e-3, 0], abs=1e-12)


def test_the_schedule_of_mae_has_the_official_learning_rates():
    peak_one = replace(STAGE, batch_size=256, base_lr=1.0, warmup_epochs=40)
    assert rates(peak_one, [0, 20, 40, 420, 800]) == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-9)


@pytest.mark.parametrize("min_lr", [0.0, 1e-5])
def test_the_lr_follows_linear_warm_up_and_a_half_cosine_at_every_step(min_lr):
    stage = replace(STAGE, epochs=20, warmup_epochs=2.5, min_lr=min_lr)
    epochs = [step / PER_EPOCH for step in range(20 * PER_EPOCH + 1)]
    fall = [(t - 2.5) / (20 - 2.5) for t in epochs]
    expected = [
        stage.lr * t / 2.5 if t < 2.5 else min_lr + (stage.lr - min_lr) * (1 + math.cos(math.pi * f)) / 2
        for t, f in zip(epochs, fall, strict=True)
    ]
    assert rates(stage, epochs) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_lr_depends_only_on_the_step():
    steps = [799.0, 3.0, 10.0, 420.0]
    assert rates(STAGE, steps) == [rates(STAGE, [step])[0] for step in steps]


def test_with_linear_decay_the_lr_falls_in_a_line_after_the_warm_up():
    stage = replace(FINETUNE, linear_decay=True, min_lr=1e-5)
    found = rates(stage, [0, 2.5, 5, 52.5, 100])
    middle = (stage.lr + 1e-5) / 2
    assert found == pytest.approx([0, stage.lr / 2, stage.lr, middle, 1e-5], rel=1e-6)


def test_a_run_shorter_than_its_warm_up_still_decays_to_zero():
    short = replace(STAGE, epochs=6)
    assert rates(short, [0, 1.5, 3, 4.5, 6]) == pytest.approx([0, 1.2e-3, 2.4e-3, 1.2e-3, 0], abs=1e-12)


def test_layer_decay_scales_the_lr_of_each_depth_as_in_mae():
    model = classifier(position="learned")
    optimizer = make_optimizer(model, FINETUNE)
    Schedule(optimizer, FINETUNE, PER_EPOCH).step_update(5 * PER_EPOCH)  # the peak
    stem = dict.fromkeys(["encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed"], 0.274625)
    scale = {**stem, "encoder.blocks.0": 0.4225, "encoder.blocks.1": 0.65, "fc_norm": 1, "head": 1}
    seen = set()
    for name, group in names(model, optimizer).items():
        prefix = next(prefix for prefix in scale if name.startswith(prefix))
        seen.add(prefix)
        assert group["lr"] == pytest.approx(scale[prefix] * FINETUNE.lr), name
        assert group["lr_scale"] == pytest.approx(scale[prefix]), name
    assert seen == set(scale)


def test_with_class_token_pooling_the_final_norm_has_the_lr_of_the_head():
    model = classifier(pool="class")
    groups = names(model, make_optimizer(model, FINETUNE))
    assert groups["encoder.norm.weight"]["lr_scale"] == 1 and groups["encoder.blocks.1.norm2.weight"]["lr_scale"] == 0.65


# I-JEPA's and StoP's schedules at 625 steps per epoch. They count a step before running it: their step n follows our step n.
STOP = TrainConfig(
    epochs=600,
    batch_size=2048,
    base_lr=8e-4,
    lr_batch=2048,
    warmup_epochs=15,
    warmup_lr=2e-4,
    min_lr=1e-4,
    weight_decay=0.04,
    final_weight_decay=0.4,
)
STOP_HUGE = replace(STOP, epochs=300, base_lr=1e-3, warmup_epochs=40, min_lr=1e-6, freeze_epoch=250)
IJEPA_HUGE = replace(STOP_HUGE, freeze_epoch=None)


@pytest.mark.parametrize(
    ("stage", "step", "rate", "decay"),
    [
        (STOP, 1, 2.00064e-4, 0.04),
        (STOP, 9374, 7.99936e-4, 0.0405548),
        (STOP, 9375, 8e-4, 0.0405549),
        (STOP, 187500, 4.6409308e-4, 0.22),
        (STOP, 375000, 1e-4, 0.4),
        (STOP_HUGE, 25000, 1e-3, 0.0555618),
        (STOP_HUGE, 93750, 6.2003817e-4, 0.22),
        (STOP_HUGE, 156250, 8.9419559e-5, 0.37588457),
        (STOP_HUGE, 187500, 8.9419559e-5, 0.37588457),
        (IJEPA_HUGE, 156250, 8.9419559e-5, 0.3758846),
        (IJEPA_HUGE, 187500, 1e-6, 0.4),
    ],
)
def test_ijepa_and_stop_have_the_official_learning_rates_and_weight_decays(stage, step, rate, decay):
    layer = nn.Linear(2, 2)
    optimizer = make_optimizer(layer, stage)
    Schedule(optimizer, stage, 625).step_update(step)
    groups = names(layer, optimizer)
    assert groups["weight"]["lr"] == groups["bias"]["lr"] == pytest.approx(rate, rel=1e-6)
    assert groups["weight"]["weight_decay"] == pytest.approx(decay, rel=2e-6)
    assert groups["bias"]["weight_decay"] == 0


def test_each_milestone_divides_the_lr_by_ten():
    vissl = TrainConfig(epochs=28, batch_size=256, base_lr=0.01, milestones=(8, 16, 24), optimizer="sgd")
    epochs = [0, 7.9, 8, 15.9, 16, 23.9, 24, 27.9]
    assert rates(vissl, epochs) == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


# MaPeT's fine-tuning of ViT-B: learning rates from timm's scheduler with the official configuration, without layer decay.
MAPET = TrainConfig(
    epochs=100,
    batch_size=1024,
    base_lr=5e-4,
    lr_batch=1024,
    warmup_epochs=20,
    warmup_lr=1e-6,
    min_lr=1e-6,
    cooldown_epochs=10,
    cosine_from_start=True,
    final_weight_decay=0.4,
)


def test_fine_tuning_of_mapet_has_the_official_learning_rates():
    official = {0: 1e-6, 1: 2.595e-5, 10: 2.505e-4, 19: 4.7505e-4, 20: 4.5235e-4, 50: 2.505e-4, 99: 1.123e-6}
    assert rates(MAPET, list(official)) == pytest.approx(list(official.values()), rel=2e-4)  # as printed


def test_cosine_from_start_equals_a_schedule_without_warm_up_after_the_warm_up():
    cold = replace(MAPET, warmup_epochs=0)
    assert rates(MAPET, [20, 33.3, 99.9]) == rates(cold, [20, 33.3, 99.9])
    assert rates(replace(MAPET, cosine_from_start=False), [20]) == [5e-4]


@pytest.mark.parametrize("cosine_from_start", [True, False])
def test_lr_and_weight_decay_are_constant_in_the_cooldown(cosine_from_start):
    stage, layer = replace(MAPET, cosine_from_start=cosine_from_start), nn.Linear(2, 2)
    optimizer = make_optimizer(layer, stage)
    schedule = Schedule(optimizer, stage, PER_EPOCH)
    seen = []
    for step in (999, 1000, 1001, 1050, 1099):
        schedule.step_update(step)
        seen.append([names(layer, optimizer)["weight"][name] for name in ("lr", "weight_decay")])
    assert seen[0][0] > 1e-6 and seen[0][1] < 0.4
    assert seen[1:] == [pytest.approx([1e-6, 0.4], rel=1e-12)] * 4


@pytest.mark.parametrize("changes", [{}, {"cosine_from_start": False}, {"warmup_epochs": 0}, {"milestones": (30, 60)}])
def test_a_cooldown_changes_no_lr_before_it(changes):
    cooled = replace(MAPET, **changes)
    epochs = [epoch / 2 for epoch in range(201)]
    assert rates(cooled, epochs) == rates(replace(cooled, cooldown_epochs=0), epochs)


# ---- one step


def small_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def set_gradients(layer: nn.Linear, step: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(step)
    gradients = [torch.randn(p.shape, generator=g) for p in layer.parameters()]
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    return gradients


def test_adamw_steps_equal_the_closed_form_with_decay_on_matrices_only():
    stage = TrainConfig(epochs=1, batch_size=256, base_lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    layer = small_layer()
    optimizer = make_optimizer(layer, stage)
    expected = [p.detach().double() for p in layer.parameters()]
    moments = [[0.0, 0.0], [0.0, 0.0]]
    for step in (1, 2, 3):
        gradients = set_gradients(layer, step)
        optimizer.step()
        for i, (gradient, decay) in enumerate(zip(gradients, (0.1, 0.0), strict=True)):
            gradient = gradient.double()
            moments[i] = [0.9 * moments[i][0] + 0.1 * gradient, 0.95 * moments[i][1] + 0.05 * gradient**2]
            first, second = moments[i][0] / (1 - 0.9**step), moments[i][1] / (1 - 0.95**step)
            expected[i] = expected[i] * (1 - 1e-2 * decay) - 1e-2 * first / (second.sqrt() + 1e-8)
    torch.testing.assert_close([p.detach().double() for p in layer.parameters()], expected, atol=1e-6, rtol=0)


def test_sgd_steps_equal_nesterov_momentum_with_decay_on_matrices_only():
    layer = small_layer()
    optimizer = make_optimizer(layer, TrainConfig(epochs=1, batch_size=256, base_lr=0.1, optimizer="sgd", weight_decay=5e-4))
    expected, momenta = [p.detach().double() for p in layer.parameters()], [0.0, 0.0]
    for step in (1, 2, 3):
        gradients = set_gradients(layer, step)
        optimizer.step()
        for i, (gradient, decay) in enumerate(zip(gradients, (5e-4, 0.0), strict=True)):
            gradient = gradient.double() + decay * expected[i]
            momenta[i] = 0.9 * momenta[i] + gradient
            expected[i] = expected[i] - 0.1 * (gradient + 0.9 * momenta[i])
    torch.testing.assert_close([p.detach().double() for p in layer.parameters()], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lars_scales_only_matrices_by_the_trust_ratio(weight_decay):
    stage = TrainConfig(epochs=1, batch_size=256, base_lr=0.5, optimizer="lars", betas=(0.9, 0.0), weight_decay=weight_decay)
    layer = small_layer()
    optimizer = make_optimizer(layer, stage)
    weight, bias = (p.detach().double() for p in layer.parameters())
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in (1, 2, 3):
        weight_gradient, bias_gradient = (gradient.double() for gradient in set_gradients(layer, step))
        optimizer.step()
        trust = 0.001 * weight.norm() / (weight_gradient.norm() + weight_decay * weight.norm())
        weight_momentum = 0.9 * weight_momentum + trust * (weight_gradient + weight_decay * weight)
        bias_momentum = 0.9 * bias_momentum + bias_gradient
        weight, bias = weight - 0.5 * weight_momentum, bias - 0.5 * bias_momentum
        assert trust < 0.01
    torch.testing.assert_close(layer.weight.detach().double(), weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.bias.detach().double(), bias, atol=1e-6, rtol=0)
