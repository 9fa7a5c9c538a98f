"""Tests of DRLoc: the values of the official code, each option, the schedule, training, and refused input."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from benchmarks.baselines import drloc as module
from benchmarks.baselines.drloc import DRLoc, DRLocMAE, PairHead, build, digits, digits_mae, draw_pairs, imagenet_swin, loss_weight
from benchmarks.baselines.mae import MAE
from common.convert import load_method, rename
from common.data import open_data
from common.masking import gather_tokens
from common.recipe import RecipeError, choose_arms, override
from common.vit import ViT
from tests import parity

GOLDEN = parity.golden("drloc")
NETWORKS = [name for name in GOLDEN if name.startswith(("vit", "swin"))]
LOSSES, GRADIENTS = 1e-5, 1e-4  # tolerances relative to the largest official value of a list


# ---- the official code


def new_model(name: str) -> DRLoc:
    """The network of a case with random weights."""
    case = GOLDEN[name]
    weight, _, warmup, total = case["weight"]
    options = {"weight": weight, "warmup_epochs": warmup, "decay_epochs": total, "epochs": total}
    options |= {"mode": case["mode"], "signed": not case["use_abs"], "pairs": case["pairs"]}
    if name.startswith("swin"):
        shape = {"embed_dim": case["dim"], "depths": case["depths"], "num_heads": case["heads"], "window_size": 7, "num_classes": 0}
        encoder = SwinTransformer(img_size=case["size"], **shape)
    else:
        shape = {"embed_dim": case["dim"], "depth": case["depth"], "num_heads": case["heads"], "qkv_bias": False, "num_classes": 0}
        encoder = VisionTransformer(img_size=case["size"], patch_size=16, **shape)
        for layer in encoder.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.eps = 1e-5
    encoder.channels, encoder.image_size = 3, (case["size"], case["size"])
    return DRLoc(encoder, case["classes"], **options)


def load_case(name: str) -> tuple[DRLoc, dict[str, str]]:
    """The network with the weights of the rule, loaded under their official names, and the map from our names to those."""
    case, model = GOLDEN[name], new_model(name)
    official = module.OFFICIAL_SWIN_NAMES if name.startswith("swin") else module.OFFICIAL_VIT_NAMES
    to_official = {ours: theirs for theirs, ours in official.items()}
    state = rename(model.state_dict(), to_official)
    if name.startswith("swin"):
        state |= parity.swin_buffers(case["depths"], case["size"] // 4, 7)
    else:
        key = "to_patch_embedding.1.weight"
        state[key] = state[key].permute(0, 2, 3, 1).flatten(1)
    assert len(state) == case["exact"]["keys"]
    state = parity.patternless_weights(state, case["fill"], case["seed"])
    load_method(model, state if name.startswith("swin") else module.with_patch_convolution(state, 16), official)
    return model, to_official


def pairs_of(case: dict, grid: int) -> Tensor:
    """The cells of a case's pairs (B, M, 2, 2)."""
    shape, seed = (case["batch"], case["pairs"], 2), 1000 * case["seed"]
    return torch.stack([parity.whole_numbers(shape, seed + 900) % grid, parity.whole_numbers(shape, seed + 901) % grid], dim=2)


def figures_of(case: dict, head: PairHead, row: Tensor, column: Tensor, pairs: Tensor) -> tuple[dict[str, list[float]], dict]:
    """The predictions and targets of a head as official figures, and what is exact in them."""
    axes = [x.detach().flatten(0, 1) for x in (row, column)]
    figures = {"pred_abs_sum": [sum(x.double().abs().sum().item() for x in axes)]}
    if case["mode"] == "l1":
        both = torch.stack(axes, 1)
        figures |= {"pred_first": both[:4].flatten().tolist(), "pred_last": both[-4:].flatten().tolist()}
    else:
        for axis, x in zip(("row", "col"), axes, strict=True):
            figures |= {f"pred_first_{axis}": x[0].tolist(), f"pred_last_{axis}": x[-1].tolist()}
    targets = [x.flatten() for x in head.targets(pairs)]
    exact = {"first": pairs[:, :, 0].tolist(), "second": pairs[:, :, 1].tolist(), "grid": head.grid[0]}
    exact |= {"target_sum": [x.double().sum().item() for x in targets], "pred": list(torch.stack(axes, -1).shape)}
    exact["target_first"] = torch.stack(targets, 1)[:6].tolist()
    if case["mode"] != "l1":
        exact["right_row_col"] = [int((x.argmax(-1) == target).sum()) for x, target in zip(axes, targets, strict=True)]
    return figures, exact


def check(case: dict, figures: dict[str, list[float]], exact: dict, gradients: dict[str, Tensor]) -> list[str]:
    """The names of the official values that differ."""
    official = {key: value if isinstance(value, list) else [value] for key, value in case["float64"].items() if key != "grad_norm"}
    assert figures.keys() == official.keys()
    wrong = [key for key in official if parity.relative_error(figures[key], official[key]) > LOSSES]
    assert exact.keys() | {"keys"} == case["exact"].keys()
    wrong += [key for key in exact if exact[key] != case["exact"][key]]
    norms = case["float64"]["grad_norm"]
    return wrong + [key for key in norms if gradients[key].double().norm().item() != pytest.approx(norms[key], rel=GRADIENTS)]


def run_case(name: str, model: DRLoc, to_official: dict[str, str]) -> list[str]:
    """The names of the official values of a network that differ."""
    case, head = GOLDEN[name], model.drloc[0]
    images = parity.patternless_images(case["batch"], 3, case["size"], case["size"], phase=case["image_phase"], seed=case["seed"])
    targets, pairs = 3 * torch.arange(case["batch"]) + 1, pairs_of(case, head.grid[0])
    model.at_step(case["weight"][1], case["weight"][3])
    output = model.eval()(images, targets, pairs=[pairs])
    output.loss.backward()
    logits = output.named["logits"].detach()
    figures, exact = figures_of(case, head, output.named["row"], output.named["column"], pairs)
    figures |= {"class_loss": [F.cross_entropy(logits, targets).item()], "drloc_loss": [output.metrics["drloc_loss"].item()]}
    figures |= {"total": [output.loss.item()], "lambda": [model.strength.item()]}
    figures |= {"class_first": logits[0, :8].tolist(), "class_last": logits[-1, -8:].tolist()}
    return check(case, figures, exact, rename({key: p.grad for key, p in model.named_parameters()}, to_official))


def test_generated_weights_and_images_have_the_expected_values():
    case, (model, _) = GOLDEN["vit_l1_abs"], load_case("vit_l1_abs")
    pixels = parity.patternless_images(case["batch"], 3, 224, 224, phase=case["image_phase"], seed=case["seed"])
    assert pixels[0, 0, 0, :2].tolist() == pytest.approx([2.1037971973, 0.5119681954], abs=1e-7)
    assert pixels.double().sum().item() == pytest.approx(388.994354, abs=1e-5)
    assert model.encoder.cls_token.flatten()[0].item() == pytest.approx(0.7119541168, abs=1e-7)
    assert model.encoder.pos_embed.flatten()[0].item() == pytest.approx(-0.5361285806, abs=1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_values_of_a_whole_network_equal_the_official_ones(name):
    assert run_case(name, *load_case(name)) == []


def test_all_values_of_a_pooled_and_normalized_head_equal_the_official_ones():
    case = GOLDEN["head_l1_abs_normal_pool"]
    map_BCHW = parity.numbers((case["batch"], case["dim"], case["grid"], case["grid"]), 1000 * case["seed"] + 999).float().requires_grad_()
    encoder = tiny_vit()
    model = DRLoc(encoder, 5, epochs=300, pool="3x3", normalize="grid_minus_one", weight=case["weight"][0], pairs=4)
    encoder.forward_intermediates = lambda *_, **__: (None, [map_BCHW])
    pooled = model._encode(torch.empty(0))[1][0]
    head = PairHead(case["dim"], (7, 7), normalize="grid_minus_one")
    state = parity.patternless_weights({f"drloc.{key}": value for key, value in head.state_dict().items()}, case["fill"], case["seed"])
    assert len(state) == case["exact"]["keys"]
    load_method(head, state, {"drloc.": ""})
    pairs = pairs_of(case, 7)
    index = (7 * pairs[..., 0] + pairs[..., 1]).flatten(1)
    loss, row, column = head.loss(gather_tokens(pooled.flatten(2).transpose(1, 2), index), pairs)
    weight = loss_weight(case["weight"][1], case["weight"][0], *case["weight"][2:])
    (weight * loss).backward()
    figures, exact = figures_of(case, head, row, column, pairs)
    figures |= {"drloc_loss": [loss.item()], "lambda": [weight], "total": [weight * loss.item()]}
    gradients = {f"drloc.{key}": p.grad for key, p in head.named_parameters()} | {"map": map_BCHW.grad}
    assert check(case, figures, exact, gradients) == []


def test_lambda_follows_the_official_schedule():
    for key, values in GOLDEN["lambda_schedule"].items():
        weight, warmup, total = (float(part) for part in key.split("_"))
        for epoch, value in values.items():
            assert loss_weight(int(epoch), weight, int(warmup), int(total)) == pytest.approx(value, abs=1e-12), (key, epoch)


def _members(model: DRLoc) -> None:
    model.drloc[0].layers.register_forward_pre_hook(lambda _, inputs: (inputs[0].unflatten(-1, (2, -1)).flip(-2).flatten(-2),))


def _axes(model: DRLoc) -> None:
    head, targets = model.drloc[0], model.drloc[0].targets
    head.targets = lambda pairs: targets(pairs)[::-1]


def _sign(model: DRLoc) -> None:
    head, targets = model.drloc[0], model.drloc[0].targets
    head.targets = lambda pairs: targets(pairs.flip(2))


def _after_norm(model: DRLoc) -> None:
    model.after_norm = True


def _detached(model: DRLoc) -> None:
    model.drloc[0].layers.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))


def _shared_axes(model: DRLoc) -> None:
    head = model.drloc[0]
    head.unshared[1].register_forward_hook(lambda _, inputs, output: head.unshared[0](inputs[0]) + 0 * output)


def _late(model: DRLoc) -> None:
    at_step = model.at_step
    model.at_step = lambda step, total: at_step(step - 1, total)


def _added(model: DRLoc) -> None:
    head, loss = model.drloc[0], model.drloc[0].loss
    head.loss = lambda *inputs: (2 * loss(*inputs)[0], *loss(*inputs)[1:])


FAULTS = {
    "members exchanged": ("vit_l1_abs", _members),
    "rows and columns exchanged": ("vit_l1_abs", _axes),
    "axes added": ("vit_l1_abs", _added),
    "after the norm": ("vit_l1_abs", _after_norm),
    "detached": ("vit_l1_abs", _detached),
    "an epoch late": ("vit_l1_abs", _late),
    "sign": ("vit_l1_signed", _sign),
    "one output layer": ("vit_ce_signed", _shared_axes),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_the_official_values(fault):
    name, change = FAULTS[fault]
    model, to_official = load_case(name)
    change(model)
    assert run_case(name, model, {ours: theirs for ours, theirs in to_official.items()})


# ---- pairs, targets and losses


def tiny_vit(size: tuple[int, int] = (32, 32), **options) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=size, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, **options)
    model.channels, model.image_size = 3, size
    return model


def tiny_swin(**options) -> SwinTransformer:
    torch.manual_seed(0)
    shape = {"patch_size": 2, "embed_dim": 16, "depths": (1, 2, 1), "num_heads": (2, 2, 2), "window_size": 4, "num_classes": 0}
    model = SwinTransformer(img_size=32, **shape, **options)
    model.channels, model.image_size = 3, (32, 32)
    return model


def drloc(encoder: nn.Module | None = None, **options) -> DRLoc:
    encoder = tiny_vit() if encoder is None else encoder
    torch.manual_seed(1)
    return DRLoc(encoder, 5, **{"epochs": 100, "pairs": 8, **options})


def batch(count: int = 6, size: tuple[int, int] = (32, 32)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, *size, generator=generator), torch.randint(5, (count,), generator=generator)


def test_all_pairs_of_cells_are_drawn_equally_often_also_on_maps_that_are_not_square():
    torch.manual_seed(0)
    pairs = draw_pairs(500, 100, (2, 3), torch.device("cpu"))
    assert pairs.shape == (500, 100, 2, 2)
    cell = pairs[..., 0] * 3 + pairs[..., 1]
    counts = (cell[..., 0] * 6 + cell[..., 1]).flatten().bincount(minlength=36)
    assert counts.min() > 1389 - 5 * 37 and counts.max() < 1389 + 5 * 37  # five standard deviations


@pytest.mark.parametrize("after_norm", [False, True])
def test_the_head_reads_the_tokens_of_the_cells_also_on_maps_that_are_not_square(after_norm):
    model, (images, targets) = drloc(tiny_vit((32, 48)), after_norm=after_norm).eval(), batch(size=(32, 48))
    pairs = draw_pairs(6, 8, (4, 6), images.device)
    output = model(images, targets, pairs=[pairs])
    features, (maps,) = model.encoder.forward_intermediates(images, indices=1, norm=after_norm)
    for image, pair in ((0, 0), (3, 5), (5, 7)):
        (top, left), (bottom, right) = pairs[image, pair].tolist()
        row, column = model.drloc[0].layers(torch.cat([maps[image, :, top, left], maps[image, :, bottom, right]]))
        assert output.named["row"][image, pair].item() == pytest.approx(row.item(), abs=1e-5)
        assert output.named["column"][image, pair].item() == pytest.approx(column.item(), abs=1e-5)
    torch.testing.assert_close(output.named["logits"], model.encoder.forward_head(features))


def test_targets_are_offsets_in_the_units_that_are_asked_for():
    pairs = torch.tensor([[[[0, 1], [3, 0]], [[2, 5], [0, 0]]]])  # offsets (-3, 1) and (2, 5) on 4 x 6 cells

    def targets(**options) -> list[list[float]]:
        return torch.stack(PairHead(8, (4, 6), hidden_width=8, **options).targets(pairs), -1)[0].tolist()

    assert targets() == [[3, 1], [2, 5]]
    assert targets(signed=True) == targets(signed=True, mode="ce") == [[0, 6], [5, 10]]
    assert targets(normalize="grid") == [[0.75, pytest.approx(1 / 6)], [0.5, pytest.approx(5 / 6)]]
    assert targets(normalize="grid_minus_one") == [[1, pytest.approx(0.2)], [pytest.approx(2 / 3), 1]]
    assert targets(normalize="grid_minus_one", signed=True) == [[0, pytest.approx(0.6)], [pytest.approx(5 / 6), 1]]
    widths = {signed: [axis.out_features for axis in PairHead(8, (4, 6), mode="cbr", signed=signed).unshared] for signed in (False, True)}
    assert widths == {False: [4, 6], True: [7, 11]}


@pytest.mark.parametrize("mode", ["l1", "ce", "cbr"])
def test_losses_equal_the_formulas_pair_by_pair(mode):
    torch.manual_seed(0)
    head, pairs, x = PairHead(8, (4, 6), mode=mode, signed=True, hidden_width=16), draw_pairs(2, 5, (4, 6), torch.device("cpu")), None
    x = torch.randn(2, 10, 8)
    loss, row, column = head.loss(x, pairs)
    total = 0.0
    for axis, (predicted, side) in enumerate(zip((row, column), (4, 6), strict=True)):
        for image in range(2):
            for pair in range(5):
                target = int(pairs[image, pair, 0, axis] - pairs[image, pair, 1, axis]) + side - 1
                out = predicted[image, pair].double()
                p = out.softmax(-1) if mode != "l1" else out
                if mode == "l1":
                    total += abs(out.item() - target) / 2
                elif mode == "ce":
                    total -= math.log(p[target].item())
                else:
                    mean = sum(k * p[k].item() for k in range(len(p)))
                    variance = sum(p[k].item() * (k - mean) ** 2 for k in range(len(p))) + 1e-8
                    total += (mean - target) ** 2 / variance + 0.001 * math.log(variance)
    assert loss.item() == pytest.approx(total / 10, rel=1e-5)
    head.reduction = "sum"
    assert head.loss(x, pairs)[0].item() == pytest.approx(total / 5 * (2 if mode == "l1" else 1), rel=1e-5)  # 2 images; axes added


def test_the_number_of_layers_is_an_option():
    def layers(**options) -> list[tuple[int, int]]:
        head = PairHead(8, (4, 4), hidden_width=16, **options)
        return [(layer.in_features, layer.out_features) for layer in head.modules() if isinstance(layer, nn.Linear)]

    assert layers() == [(16, 16), (16, 16), (16, 2)]
    assert layers(hidden_layers=1) == [(16, 16), (16, 2)]
    assert layers(mode="ce") == [(16, 16), (16, 16), (16, 16), (16, 4), (16, 4)]


def test_pooled_maps_have_half_the_side_and_the_mean_of_their_cells():
    images, targets = batch()
    for pool, cell in (("2x2", slice(0, 2)), ("3x3", slice(0, 2))):  # at the corner both have the same four cells
        model = drloc(pool=pool).eval()
        assert model.drloc[0].grid == (2, 2)
        (pooled,), (whole,) = model._encode(images)[1], model.encoder.forward_intermediates(images, indices=1)[1]
        torch.testing.assert_close(pooled[:, :, 0, 0], whole[:, :, cell, cell].mean((2, 3)))
        last = slice(2, 4) if pool == "2x2" else slice(1, 4)
        torch.testing.assert_close(pooled[:, :, 1, 1], whole[:, :, last, last].mean((2, 3)))
        assert model(images, targets).loss.isfinite()


def test_all_stages_of_a_swin_have_a_head_each_and_their_losses_are_added():
    model, (images, targets) = drloc(tiny_swin(), multiscale=True).eval(), batch()
    assert [head.grid for head in model.drloc] == [(8, 8), (4, 4), (4, 4)]
    features, maps = model._encode(images)
    torch.testing.assert_close(features, model.encoder.forward_features(images))
    pairs = [draw_pairs(6, 8, head.grid, images.device) for head in model.drloc]
    losses = []
    for head, x, cells in zip(model.drloc, maps, pairs, strict=True):
        index = (cells[..., 0] * head.grid[1] + cells[..., 1]).flatten(1)
        losses.append(head.loss(gather_tokens(x.flatten(2).transpose(1, 2), index), cells)[0].item())
    assert model(images, targets, pairs=pairs).metrics["drloc_loss"].item() == pytest.approx(sum(losses), rel=1e-5)
    torch.testing.assert_close(maps[-1], drloc(tiny_swin()).eval()._encode(images)[1][0])


def test_without_weight_nothing_is_added_and_evaluation_without_targets_draws_no_pairs():
    images, targets = batch()
    alone, added = drloc(weight=0), drloc()
    assert not [name for name in alone.state_dict() if "drloc" in name]
    assert all(torch.equal(value, added.state_dict()[name]) for name, value in alone.state_dict().items())  # one start for both arms
    output = alone.train()(images, targets)
    assert torch.equal(output.loss, F.cross_entropy(output.named["logits"], targets)) and output.metrics == {}
    before = torch.get_rng_state()
    assert set(added.eval()(images).named) == {"logits"} and torch.equal(torch.get_rng_state(), before)
    assert set(added(images, targets).metrics) == {"top1", "top5", "drloc_loss"}
    assert set(added.train()(images, targets).metrics) == {"drloc_loss"}
    assert added.no_weight_decay() == {"encoder.cls_token", "encoder.pos_embed"}


def test_the_weight_follows_whole_epochs_or_is_constant():
    def weights(**options) -> list[float]:
        model, found = drloc(epochs=6, warmup_epochs=2, **options), []
        for step in range(12):
            model.at_step(step, 12)
            found.append(round(model.strength.item(), 4))
        return found

    assert weights(schedule="constant") == [0.5] * 12
    assert weights(decay_epochs=None) == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.375, 0.375, 0.25, 0.25, 0.125, 0.125]
    assert weights(decay_epochs=12)[-1] == 0.35 and weights(decay_epochs=4)[-4:] == [0, 0, 0, 0]
    assert loss_weight(0, 0.5, 0, 10) == 0.5  # the release divides by zero
    images, targets = batch()
    model, pairs = drloc().eval(), [draw_pairs(6, 8, (4, 4), images.device)]
    class_loss = drloc(weight=0).eval()(images, targets).loss
    for epoch in (0, 10, 100):
        model.at_step(epoch, 100)
        output = model(images, targets, pairs=pairs)
        torch.testing.assert_close(output.loss, class_loss + loss_weight(epoch, 0.5, 20, 300) * output.metrics["drloc_loss"])


def test_on_mae_pairs_of_visible_patches_are_located():
    images, _ = batch()
    vit = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
    options = {"mask_ratio": 0.5, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    torch.manual_seed(1)
    base = MAE(ViT(**vit), **options)
    torch.manual_seed(1)
    added, noise, pairs = DRLocMAE(ViT(**vit), pairs=4, weight=0.3, **options), torch.rand(6, 16), torch.randint(8, (6, 4, 2))
    output = added(images, noise=noise, pairs=pairs)
    torch.testing.assert_close(output.loss, base(images, noise=noise).loss + 0.3 * output.metrics["drloc_loss"])
    total = 0.0
    for image in range(6):
        for first, second in pairs[image].tolist():
            cells = [int(output.named["order"][image, token]) for token in (first, second)]
            tokens = [output.named["encoded"][image, 1 + token] for token in (first, second)]
            target = torch.tensor([abs(cells[0] // 4 - cells[1] // 4), abs(cells[0] % 4 - cells[1] % 4)])
            total += (added.drloc.layers(torch.cat(tokens)) - target).abs().mean().item() / 24
    assert output.metrics["drloc_loss"].item() == pytest.approx(total, rel=1e-5)
    assert added(images).loss.isfinite() and DRLocMAE(ViT(**vit), weight=0, **options)(images).metrics == {}


# ---- recipes and training


def test_the_drloc_loss_falls_in_a_short_training_on_digits():
    torch.manual_seed(0)
    small = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    small.channels, small.image_size = 1, (8, 8)
    nn.init.normal_(small.pos_embed, std=0.5)  # with timm's .02 it takes twice as many steps
    model, data = DRLoc(small, 10, epochs=1, weight=5.0, schedule="constant", hidden_width=64).train(), open_data("digits").train
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(100):
        chosen = torch.arange(32 * step, 32 * step + 32) % len(data)
        output = model(data.images[chosen].float() / 255, data.labels[chosen])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.metrics["drloc_loss"].item())
    assert losses[0] > 1 and sum(losses[-10:]) / 10 < 0.3, losses  # the best constant: 0.75


def test_the_recipe_of_the_paper_differs_from_the_released_one_only_in_the_task():
    released, paper = imagenet_swin(), module.imagenet_swin_paper()
    assert replace(paper, method=released.method) == released
    model = build(override(paper, paper.arms["swin+drloc"]), tiny_swin(), 5)
    (head,) = model.drloc
    assert (model.schedule, head.units, head.reduction, len(head.layers)) == ("constant", [4, 4], "sum", 3)


# ---- refused input


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_vit, {"weight": -1}, "weight=-1 is not a number from 0 up"),
        (tiny_vit, {"weight": float("inf")}, "weight=inf is not a number"),
        (tiny_vit, {"pairs": 0}, "pairs=0 is not a whole number from 1 to 256, the number of pairs of 16 tokens"),
        (tiny_vit, {"pairs": 257}, "pairs=257 is not a whole number from 1 to 256"),
        (tiny_vit, {"pairs": 17, "pool": "2x2"}, "pairs=17 is not a whole number from 1 to 16"),
        (tiny_vit, {"mode": "l2"}, "mode='l2' is not known; choose one of 'l1', 'ce', 'cbr'"),
        (tiny_vit, {"schedule": "cosine"}, "schedule='cosine' is not known; choose one of 'released', 'constant'"),
        (tiny_vit, {"pool": "4x4"}, "pool='4x4' is not known; choose one of 'none', '3x3', '2x2'"),
        (tiny_vit, {"normalize": "yes"}, "normalize='yes' is not known"),
        (tiny_vit, {"reduction": "max"}, "reduction='max' is not known"),
        (tiny_vit, {"normalize": "grid", "mode": "ce"}, "mode='ce' has classes: use normalize='none'"),
        (tiny_vit, {"hidden_layers": 0}, "hidden_layers=0 is not a whole number from 1 up"),
        (tiny_vit, {"hidden_width": 1.5}, "hidden_width=1.5 is not a whole number from 1 up"),
        (tiny_vit, {"warmup_epochs": -1}, "warmup_epochs=-1, decay_epochs=300: give 0 or more"),
        (tiny_vit, {"warmup_epochs": 20, "decay_epochs": 20}, "warmup_epochs=20, decay_epochs=20"),
        (tiny_vit, {"multiscale": True}, "multiscale=True reads all stages of timm's Swin"),
        (tiny_swin, {"multiscale": True, "pool": "2x2"}, "multiscale=True reads all stages of timm's Swin"),
        (lambda: ViT(image_size=32, patch_size=8, width=32, depth=1, heads=2), {}, "a ViT shows no tokens before its final norm"),
        (lambda: tiny_vit((8, 8)), {}, "has no grid of cells"),
        (lambda: tiny_vit((8, 16)), {"normalize": "grid_minus_one", "pairs": 1}, "a map of 1 x 2 cells has no offsets"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        drloc(make(), **options)


def test_images_of_another_size_are_refused():
    model = drloc(tiny_vit(dynamic_img_size=True))
    with pytest.raises(ValueError, match=re.escape("the map is (4, 6), but was (4, 4) at first")):
        model(*batch(size=(32, 48)))


def test_on_mae_a_mask_must_hide_something_and_leave_pairs():
    vit = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
    for options, message in (({"mask_ratio": 0}, "leaves 16 of 16"), ({"mask_ratio": 0.9}, "leaves 1 of 16"), ({}, "pairs=64 .* 1 to 16")):
        with pytest.raises(ValueError, match=message):
            DRLocMAE(ViT(**vit), **options)


@pytest.mark.parametrize("recipe", [digits, digits_mae])
def test_an_unknown_option_is_refused_with_the_nearest_known_one(recipe):
    own = override(choose_arms(recipe())["vit" if recipe is digits else "mae"], ["method.pair=8"])
    with pytest.raises(RecipeError, match="no option 'pair'.*did you mean pairs"):
        build(own, own.build_encoder(1), 10)
