"""Whole networks of Positional Label give the values of the official code.

The cases of test_positional_label.py have one block per stage and nearly identical tokens. These have shifted windows and
patternless weights, so that a wrong shift, mask or label changes every value.

Shapes: B images, K classes, N tokens, W windows with T tokens each.
"""

import pytest
import torch
import torch.nn.functional as F
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor

from common.convert import ConversionError, load_method, rename
from positional_label.method import OFFICIAL_SWIN_NAMES, OFFICIAL_VIT_NAMES, PositionalLabel
from tests import parity
from tests.test_backbones import prepared

GOLDEN = parity.golden("positional_label_strong")
LOSSES, GRADIENTS = 1e-5, 1e-4  # tolerances relative to the largest official value of a list


def new_model(case: dict, label: str) -> PositionalLabel:
    """Build the network of a case with randomly initialised weights."""
    if "depth" in case:
        pooled = {"class_token": False, "global_pool": "avg", "fc_norm": False}
        encoder = VisionTransformer(img_size=224, patch_size=16, embed_dim=768, depth=case["depth"], num_heads=12, num_classes=0, **pooled)
        return PositionalLabel(prepared(encoder, (224, 224)), 1000, label=label).eval()
    encoder = SwinTransformer(img_size=224, depths=case["depths"], window_size=case.get("window", 7), num_classes=0)
    return PositionalLabel(prepared(encoder, (224, 224)), 1000, label=label, swin="released").eval()


def official_state(name: str, model: PositionalLabel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a case's state dict as the official code saves it, with masks, and the map from our names to the official ones."""
    case, official = GOLDEN[name], OFFICIAL_VIT_NAMES if name.startswith("vit") else OFFICIAL_SWIN_NAMES
    # With absolute labels, the layer that replaces the last merging has its own names; they occur only there.
    to_official = {ours: theirs for theirs, ours in official.items() if "FinalLayer" not in theirs or name.startswith("swin_apl")}
    state = rename(model.state_dict(), to_official)
    for key, (shape, zeros, values) in case.get("attn_mask", {}).items():
        mask = state[key] = parity.shift_mask(*shape[:2])
        assert (list(mask.shape), int((mask == 0).sum()), mask.unique().tolist()) == (shape, zeros, values)
    assert len(state) == case["keys"]
    return parity.patternless_weights(state, case["fill"], case["seed"]), to_official


def load_case(name: str) -> tuple[PositionalLabel, dict[str, str]]:
    model = new_model(GOLDEN[name], "relative" if "rpl" in name else "absolute")
    state, to_official = official_state(name, model)
    load_method(model, state, OFFICIAL_VIT_NAMES if name.startswith("vit") else OFFICIAL_SWIN_NAMES)
    return model, to_official


def test_generated_weights_and_images_have_the_expected_values():
    assert parity.numbers((3,), 1000).tolist() == pytest.approx([-1.706034820802537, -0.10640847615072804, -1.551955138840138], abs=1e-14)
    case = GOLDEN["vit_apl_depth2"]
    images = parity.patternless_images(2, 3, 224, 224, phase=case["image_phase"], seed=case["seed"])
    assert images[0, 0, 0, :3].tolist() == pytest.approx([0.2306289375, 2.0839121342, 1.3453705311], abs=1e-7)
    assert images.double().sum().item() == pytest.approx(-794.608972, abs=1e-5)
    state, _ = official_state("vit_apl_depth2", new_model(case, "absolute"))
    assert [sorted(state).index(key) for key in ("blocks.0.attn.qkv.weight", "norm.weight")] == [7, 33]
    qkv, norm = state["blocks.0.attn.qkv.weight"].flatten()[:3], state["norm.weight"][:3]
    assert qkv.tolist() == pytest.approx([0.0744343176, -0.0178909395, 0.0308850333], abs=1e-8)
    assert norm.tolist() == pytest.approx([1.1535072327, 1.0258982182, 0.5226014853], abs=1e-7)


@pytest.mark.parametrize("name", GOLDEN)
def test_all_values_of_a_whole_network_equal_the_official_ones(name):
    case, (model, to_official) = GOLDEN[name], load_case(name)
    images = parity.patternless_images(case["batch"], 3, 224, 224, phase=case["image_phase"], seed=case["seed"])
    targets = 3 * torch.arange(case["batch"]) + 1
    output = model(images, targets)
    output.loss.backward()
    logits_BK, position = output.named["logits"].detach(), model.head(output.named["tokens"]).detach()
    figures = {
        "class_loss": [F.cross_entropy(logits_BK, targets).item()],
        "position_loss": [output.metrics["position_loss"].item()],
        "total": [output.loss.item()],
        "class_first": logits_BK[0, :8].tolist(),
        "class_last": logits_BK[-1, -8:].tolist(),
        "class_abs_sum": [logits_BK.double().abs().sum().item()],
        "position_abs_sum": [position.double().abs().sum().item()],
    }
    for key in case["float64"]:
        if key.startswith("position_image"):  # position_image0_token14, position_image0_query3_key17
            place = [int("".join(filter(str.isdigit, part))) for part in key.split("_")[1:]]
            figures[key] = position[tuple(place)][:8].tolist()
    official = {key: [value] if isinstance(value, float) else value for key, value in case["float64"].items() if key != "grad_norm"}
    assert figures.keys() == official.keys()
    assert {key: found for key in official if (found := parity.relative_error(figures[key], official[key])) > LOSSES} == {}
    answers = position.flatten(0, -2)
    assert [list(logits_BK.shape), list(answers.shape)] == [case["class_logits"], case["position_logits"]]
    assert output.metrics["position_top1"].item() * len(answers) / 100 == pytest.approx(case["position_right"], abs=1e-3)
    gradient = rename({key: parameter.grad for key, parameter in model.named_parameters()}, to_official)
    norms = {key: gradient[key].double().norm().item() for key in case["float64"]["grad_norm"]}
    assert {key: norm for key, norm in norms.items() if norm != pytest.approx(case["float64"]["grad_norm"][key], rel=GRADIENTS)} == {}


# ---- masks in a released checkpoint


def test_a_checkpoint_with_shift_masks_of_another_window_size_is_refused():
    """Only the masks show the window size: the released Swin has no relative position bias table."""
    case = GOLDEN["swin_rpl_2221_window14"] | {"depths": [2, 1, 1, 1]}
    model, other = new_model(case, "relative"), new_model(case | {"window": 7}, "relative")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    key = "layers.0.blocks.1.attn_mask"
    state = rename(other.state_dict(), {ours: theirs for theirs, ours in OFFICIAL_SWIN_NAMES.items() if "FinalLayer" not in theirs})
    with pytest.raises(ConversionError, match=rf"{key}: not the shift masks of this window and image size"):
        load_method(model, state | {key: parity.shift_mask(64, 49)}, OFFICIAL_SWIN_NAMES)
    with pytest.raises(ConversionError, match=rf"{key}: not the shift masks"):
        load_method(model, state | {key: torch.zeros(16, 196, 196)}, OFFICIAL_SWIN_NAMES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    coverage = load_method(
        model, state | {key: parity.shift_mask(16, 196).half()}, OFFICIAL_SWIN_NAMES
    )  # a file in half precision also loads
    assert coverage.unexpected == ()
