"""Tests of Jigsaw-ViT: the values of the official code, each option, training, and refused input."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from benchmarks.baselines import jigsaw as module
from benchmarks.baselines.jigsaw import JigsawMAE, JigsawViT, build, digits, digits_mae
from benchmarks.baselines.mae import MAE
from common.convert import load_method, rename
from common.data import open_data
from common.randomness import reseed
from common.recipe import RecipeError, choose_arms, override
from common.vit import ViT
from tests import parity

GOLDEN = parity.golden("jigsaw")
LOSSES, GRADIENTS = 1e-5, 1e-4  # tolerances relative to the largest official value of a list
SWIN = {"mask_ratio": 0.0, "use_positions": True}


# ---- the official code


def new_model(name: str) -> JigsawViT:
    """The network of a case with random weights."""
    case = GOLDEN[name]
    options = {"weight": case["weight"]}
    if name.startswith("swin"):
        shape = {"embed_dim": case["dim"], "depths": case["depths"], "num_heads": case["heads"], "window_size": 7, "num_classes": 0}
        encoder = SwinTransformer(img_size=case["size"], **shape)
        encoder.channels, encoder.image_size = 3, (case["size"], case["size"])
        return JigsawViT(encoder, case["classes"], **options, **SWIN)
    shape = {"width": case["dim"], "depth": case["depth"], "heads": case["heads"], "patch_size": 16, "image_size": case["size"]}
    encoder = ViT(position="sincos" if name.startswith("noisy") else "learned", **shape)
    noisy = {"clean_jigsaw_images": True, "mixup": 1.0} if "class_image_phase" in case else {}
    return JigsawViT(encoder, case["classes"], mask_ratio=case["mask_ratio"], **options, **noisy)


def load_case(name: str) -> tuple[JigsawViT, dict[str, str]]:
    """The network with the weights of the rule, loaded under their official names, and the map from our names to those."""
    case, model = GOLDEN[name], new_model(name)
    official = module.OFFICIAL_SWIN_NAMES if name.startswith("swin") else module.OFFICIAL_VIT_NAMES
    to_official = {ours: theirs for theirs, ours in official.items()}
    state = rename(model.state_dict(), to_official)
    if name.startswith("swin"):
        state |= parity.swin_buffers(case["depths"], case["size"] // 4, 7)
    assert len(state) == case["exact"]["keys"]
    untouched = ("pos_embed",) if name.startswith("noisy") else ()
    load_method(model, parity.patternless_weights(state, case["fill"], case["seed"], untouched), official)
    return model, to_official


def images_of(case: dict, phase: str = "image_phase") -> Tensor:
    return parity.patternless_images(case["batch"], 3, case["size"], case["size"], phase=case[phase], seed=case["seed"])


def run_case(name: str, model: JigsawViT) -> tuple[dict[str, list[float]], dict, dict[str, Tensor]]:
    """The figures of a case, exact ones, and the gradients by our names."""
    case = GOLDEN[name]
    images, targets = images_of(case), 3 * torch.arange(case["batch"]) + 1
    if "class_image_phase" in case:  # as in training, where the class branch gets other images than the jigsaw branch
        model.train().supervision.blend = lambda *_: (images_of(case, "class_image_phase"), targets)
    else:
        model.eval()
    tokens = (case["size"] // 16) ** 2
    noise = None if name.startswith("swin") else parity.whole_numbers((case["batch"], tokens), 1000 * case["seed"] + 998)
    output = model(images, targets, noise=noise)
    output.loss.backward()
    logits, answers, cells = (output.named[key].detach() for key in ("logits", "jigsaw", "cells"))
    figures = {
        "class_loss": [F.cross_entropy(logits, targets).item()],
        "jigsaw_loss": [output.metrics["jigsaw_loss"].item()],
        "total": [output.loss.item()],
        "class_first": logits[0, :8].tolist(),
        "class_last": logits[-1, -8:].tolist(),
        "class_abs_sum": [logits.double().abs().sum().item()],
        "jigsaw_abs_sum": [answers.double().abs().sum().item()],
    }
    for key in case["float64"]:
        if found := re.fullmatch(r"jigsaw_image(\d+)_position(\d+)", key):
            image, cell = map(int, found.groups())
            figures[key] = answers[image][cells[image] == cell][0, :8].tolist()
    exact = {"class_logits": list(logits.shape), "jigsaw_logits": list(answers.flatten(0, 1).shape), "kept": cells.tolist()}
    exact["jigsaw_right"] = int((answers.argmax(-1) == cells).sum())
    return figures, exact, {key: parameter.grad for key, parameter in model.named_parameters()}


def test_generated_weights_and_images_have_the_expected_values():
    case = GOLDEN["deit_mask50"]
    pixels = images_of(case)
    assert pixels[0, 0, 0, :3].tolist() == pytest.approx([1.8388475180, -0.5446941853, -0.1623123139], abs=1e-7)
    assert pixels.double().sum().item() == pytest.approx(226.422217, abs=1e-5)
    model, _ = load_case("deit_mask50")
    assert model.encoder.cls_token.flatten()[:2].tolist() == pytest.approx([-0.8422668576, 0.7524083853], abs=1e-7)
    assert model.jigsaw[4].weight[0, 0].item() == pytest.approx(0.0898571759, abs=1e-8)
    assert load_case("noisy_mask10")[0].encoder.pos_embed.double().abs().sum().item() == pytest.approx(10572.327553, abs=1e-3)


@pytest.mark.parametrize("name", GOLDEN)
def test_all_values_of_a_whole_network_equal_the_official_ones(name):
    case, (model, to_official) = GOLDEN[name], load_case(name)
    figures, exact, gradients = run_case(name, model)
    official = {key: value if isinstance(value, list) else [value] for key, value in case["float64"].items() if key != "grad_norm"}
    assert figures.keys() == official.keys()
    assert {key: error for key in official if (error := parity.relative_error(figures[key], official[key])) > LOSSES} == {}
    assert {key: exact[key] for key in case["exact"] if key != "keys"} == {key: v for key, v in case["exact"].items() if key != "keys"}
    named = rename(gradients, to_official)
    norms = {key: named[key].double().norm().item() for key in case["float64"]["grad_norm"]}
    assert {key: norm for key, norm in norms.items() if norm != pytest.approx(case["float64"]["grad_norm"][key], rel=GRADIENTS)} == {}


def _shift_targets(model: JigsawViT) -> None:
    judge = model.jigsaw.register_forward_hook
    judge(lambda _, inputs, output: output.roll(1, -1))


def _positions(model: JigsawViT) -> None:
    model.use_positions = True


def _one_more(model: JigsawViT) -> None:
    model.kept += 1


def _gelu(model: JigsawViT) -> None:
    model.jigsaw[1] = nn.GELU()


def _detach(model: JigsawViT) -> None:
    model.jigsaw.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))


def _halve(model: JigsawViT) -> None:
    model.weight /= 2


FAULTS = {
    "targets + 1": _shift_targets,
    "positions": _positions,
    "a patch more": _one_more,
    "GELU": _gelu,
    "detached": _detach,
    "weight": _halve,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_the_official_values(fault):
    name = "deit_mask20_96px"
    case, (model, to_official) = GOLDEN[name], load_case(name)
    FAULTS[fault](model)
    figures, _, gradients = run_case(name, model)
    named, norms = rename(gradients, to_official), case["float64"]["grad_norm"]
    wrong = [key for key in ("jigsaw_loss", "total") if parity.relative_error(figures[key], [case["float64"][key]]) > LOSSES]
    wrong += [key for key in norms if named[key].norm().item() != pytest.approx(norms[key], rel=GRADIENTS)]
    assert wrong


# ---- the branch


def encoder(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "position": "learned", **options})


def swin() -> SwinTransformer:
    torch.manual_seed(0)
    shape = {"patch_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "num_classes": 0}
    model = SwinTransformer(img_size=32, **shape)
    model.channels, model.image_size = 3, (32, 32)
    return model


def jigsaw(**options) -> JigsawViT:
    torch.manual_seed(1)
    return JigsawViT(encoder(), 5, **options)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(5, (count,), generator=generator)


def test_the_branch_neither_sees_positions_nor_the_order_of_the_patches():
    model, (images, targets) = jigsaw().eval(), batch()
    noise = torch.rand(6, 16)
    before = model(images, targets, noise=noise)
    cells = before.named["cells"]
    reverse = torch.full_like(noise, 20.0).scatter(1, cells.flip(1), torch.arange(8.0).expand(6, -1))  # the same patches in another order
    after = model(images, targets, noise=reverse)
    assert torch.equal(after.named["cells"], cells.flip(1))
    torch.testing.assert_close(after.named["jigsaw"], before.named["jigsaw"].flip(1))
    with torch.no_grad():
        model.encoder.pos_embed.add_(torch.randn_like(model.encoder.pos_embed))
    moved = model(images, targets, noise=noise)
    assert torch.equal(moved.named["jigsaw"], before.named["jigsaw"])
    assert not torch.allclose(moved.named["logits"], before.named["logits"])


def test_each_option_of_the_branch_does_what_it_says():
    model, (images, targets) = jigsaw(use_positions=True, mask_ratio=0.0).eval(), batch()
    noise = torch.arange(16.0).expand(6, -1)
    output = model(images, targets, noise=noise)
    whole = model.jigsaw(model.encoder(images)[:, 1:])
    torch.testing.assert_close(output.named["jigsaw"], whole)  # all patches with positions: the same tokens as those of the class branch
    torch.testing.assert_close(output.loss, F.cross_entropy(output.named["logits"], targets) + 0.1 * output.metrics["jigsaw_loss"])
    assert output.metrics["jigsaw_loss"].item() == pytest.approx(F.cross_entropy(whole.flatten(0, 1), torch.arange(16).repeat(6)).item())
    assert jigsaw(mask_ratio=0.2)(images, targets).named["cells"].shape == (6, 12)  # 12.8 are rounded down
    assert [len(jigsaw(head_depth=depth).jigsaw) for depth in (1, 2, 4)] == [1, 3, 7]
    double = jigsaw(weight=0.2).eval()(images, targets, noise=noise)
    single = jigsaw().eval()(images, targets, noise=noise)
    class_loss = F.cross_entropy(single.named["logits"], targets)
    torch.testing.assert_close(double.loss - class_loss, 2 * (single.loss - class_loss))


def test_the_branch_gets_the_blended_images_by_default_and_clean_ones_on_request():
    images, targets = batch()
    seen = {}
    for clean in (False, True):
        model = jigsaw(clean_jigsaw_images=clean, mixup=0.8).train()
        inputs, embed = [], model.encoder.embed
        model.encoder.embed = lambda x, *keep, inputs=inputs, embed=embed: inputs.append(x) or embed(x, *keep)
        reseed(5)
        model(images, targets)
        seen[clean] = inputs
    assert len(seen[False]) == 1 and not torch.equal(seen[False][0], images)  # one patch embedding for both branches
    assert torch.equal(seen[True][0], seen[False][0]) and torch.equal(seen[True][1], images)


def test_without_weight_nothing_is_added_and_evaluation_without_targets_has_no_branch():
    images, targets = batch()
    alone, added = jigsaw(weight=0), jigsaw()
    assert not [name for name in alone.state_dict() if "jigsaw" in name]
    assert all(torch.equal(value, added.state_dict()[name]) for name, value in alone.state_dict().items())  # one start for both arms
    reseed(3)
    output = alone.train()(images, targets)
    assert torch.equal(output.loss, F.cross_entropy(output.named["logits"], targets)) and output.metrics == {}
    assert set(added.eval()(images).named) == {"logits"}
    assert set(added(images, targets).metrics) == {"top1", "top5", "jigsaw_loss", "jigsaw_top1"}
    assert set(added.train()(images, targets).metrics) == {"jigsaw_loss"}
    assert added.no_weight_decay() == {"encoder.cls_token", "encoder.pos_embed"}


def test_a_swin_tells_the_cells_of_its_last_tokens_in_one_pass():
    model, (images, targets) = JigsawViT(swin(), 5, **SWIN).eval(), batch()
    output = model(images, targets)
    torch.testing.assert_close(output.named["jigsaw"], model.jigsaw(model.encoder.forward_features(images).flatten(1, 2)))
    assert torch.equal(output.named["cells"], torch.arange(16).expand(6, -1))


def test_the_branch_on_mae_shares_the_visible_patches():
    images, _ = batch()
    options = {"mask_ratio": 0.5, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    torch.manual_seed(1)
    base = MAE(encoder(), **options)
    torch.manual_seed(1)
    alone, noise = JigsawMAE(encoder(), weight=0, **options), torch.rand(6, 16)
    torch.manual_seed(1)
    added = JigsawMAE(encoder(), weight=0.3, **options)
    expected = base(images, noise=noise).loss
    torch.testing.assert_close(alone(images, noise=noise).loss, expected)
    output = added(images, noise=noise)
    torch.testing.assert_close(output.loss, expected + 0.3 * output.metrics["jigsaw_loss"])
    cells = output.named["order"][:, :8]
    vit = copy.deepcopy(added.encoder)
    with torch.no_grad():
        vit.pos_embed.zero_()
    answers = added.jigsaw(vit(images, cells)[:, 1:])
    assert output.metrics["jigsaw_loss"].item() == pytest.approx(F.cross_entropy(answers.flatten(0, 1), cells.flatten()).item(), rel=1e-5)
    assert added.eval()(images, noise=noise).metrics.keys() == {"jigsaw_loss", "jigsaw_top1"}


# ---- recipes and training


def test_the_jigsaw_loss_falls_in_a_short_training_on_digits():
    torch.manual_seed(0)
    small = ViT(image_size=8, patch_size=2, channels=1, width=32, depth=1, heads=2, position="learned")
    model, data = JigsawViT(small, 10, weight=1.0).train(), open_data("digits").train
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(150):
        chosen = torch.arange(32 * step, 32 * step + 32) % len(data)
        output = model(data.images[chosen].float() / 255, data.labels[chosen])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.metrics["jigsaw_loss"].item())
    assert losses[0] > 2.6 and sum(losses[-10:]) / 10 < 2.1, losses  # guessing: log(16) = 2.77


# ---- refused input


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (encoder, {"weight": -0.1}, "weight=-0.1 is not a number from 0 up"),
        (encoder, {"weight": float("nan")}, "weight=nan is not a number"),
        (encoder, {"weight": "much"}, "weight='much' is not a number"),
        (encoder, {"mask_ratio": 1.0}, "mask_ratio=1.0 leaves none of the 16 tokens"),
        (encoder, {"mask_ratio": 0.9}, "mask_ratio=0.9 leaves 1 of 16 patches, which is no puzzle; use 0.875 or less"),
        (encoder, {"mask_ratio": 50}, "mask_ratio=50 is not a fraction between 0 and 1"),
        (encoder, {"head_depth": 0}, "head_depth=0 is not a whole number from 1 up"),
        (encoder, {"clean_jigsaw_images": True}, "clean_jigsaw_images=True has no effect without mixup and cutmix"),
        (lambda: encoder(position="none"), {"use_positions": True}, "use_positions=True has no effect"),
        (lambda: encoder(position="relative"), {}, "relative positions need all patches"),
        (lambda: encoder(class_token=False), {}, "use encoder.class_token=true"),
        (swin, {}, "mask_ratio=0.5, use_positions=False, clean_jigsaw_images=False: a Swin has one pass"),
        (lambda: VisionTransformer(depth=1), {}, "such as size=small, or timm's Swin, not a VisionTransformer"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        JigsawViT(make(), 5, **options)


def test_on_mae_a_mask_must_hide_something_and_leave_a_puzzle():
    for ratio, message in ((0, "hides none of the 16"), (0.9, "leaves 1 of 16")):
        with pytest.raises(ValueError, match=message):
            JigsawMAE(encoder(), mask_ratio=ratio)
    with pytest.raises(ValueError, match="relative positions need all patches"):
        JigsawMAE(encoder(position="relative"))


@pytest.mark.parametrize("recipe", [digits, digits_mae])
def test_an_unknown_option_is_refused_with_the_nearest_known_one(recipe):
    own = override(choose_arms(recipe())["vit" if recipe is digits else "mae"], ["method.mask_ration=0.5"])
    with pytest.raises(RecipeError, match="no option 'mask_ration'.*did you mean mask_ratio"):
        build(own, own.build_encoder(1), 10)
