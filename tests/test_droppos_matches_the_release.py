"""DropPos equals the official code on weights, images and noise made by formulas (tests/parity.py)."""

import pytest
import torch

from common.convert import load_method, rename
from common.positions import smoothed_targets
from common.vit import ViT
from droppos.method import OFFICIAL_NAMES, DropPos
from tests import parity

CASES = {name: case for name, case in parity.golden("droppos").items() if name != "config"}
TO_OFFICIAL = {ours: official for official, ours in OFFICIAL_NAMES.items()}
BATCH = 3


def build(args: dict) -> DropPos:
    encoder = ViT(image_size=64, patch_size=16, width=64, depth=2, heads=4)
    model = DropPos(
        encoder,
        mask_ratio=args.get("gamma", 0.5),
        position_mask_ratio=args.get("gpos", 0.75),
        sigma=args["sigma"],
        attentive=args.get("attn", False),
        position_token={"zeros": "zeros"}.get(args.get("mtt"), "learned"),
        shuffle=args.get("shuffle", False),
        position_weight=0.05 if args.get("multi") else None,
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=4,
    )
    official = rename(model.state_dict(), TO_OFFICIAL)
    # The release keeps its unused mask_pos_token and counts it among the sorted keys.
    official.setdefault("mask_pos_token", torch.zeros(1, 1, 64))
    state = parity.weights(official, untouched=("pos_embed", "aux_decoder_pos_embed"))
    if model.position_token != "learned":
        del state["mask_pos_token"]
    load_method(model, state, OFFICIAL_NAMES)
    # These figures were taken with the release's column normalisation, on a grid with the side given by each case.
    side = int(args.get("K", 16) ** 0.5)
    model.target_LL.copy_(smoothed_targets((4, 4), args["sigma"], normalise="columns", assumed_side=side))
    return model


def run(model: DropPos):
    return model(
        parity.images(BATCH, 3, 64, 64),
        noise_patch=parity.noise(BATCH, 16, s=1),
        noise_position=parity.noise(BATCH, model.visible, s=2),
        noise_shuffle=parity.noise(BATCH, model.visible, s=3),
    )


@pytest.mark.parametrize("name", CASES)
def test_loss_selection_and_gradients_equal_the_official_figures(name):
    case = CASES[name]
    model = build(case["args"])
    output = run(model)
    loss = output.metrics["position_loss"] if "mae" in case else output.loss
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    if "mae" in case:
        assert output.metrics["pixel_loss"].item() == pytest.approx(case["mae"], abs=1e-5)
    assert output.metrics["position_top1"].item() == pytest.approx(100 * case["acc1"], abs=1e-4)
    assert output.named["cells"][0].tolist() == case["ids_keep0"]
    assert output.named["dropped"][0].long().tolist() == case["mask_pos0"]
    assert output.named["encoded"].double().sum().item() == pytest.approx(case["enc_sum"], abs=1e-3)
    assert output.named["encoded"].double().abs().sum().item() == pytest.approx(case["enc_abs"], rel=1e-4)
    if "attn0" in case:
        assert output.named["affinity"][0].tolist() == pytest.approx(case["attn0"], abs=1e-5)
    output.loss.backward()
    gradients = rename({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, TO_OFFICIAL)
    for key, norm in case.get("grad", {}).items():
        if norm is None:
            assert key not in gradients
        else:
            assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-4), key
