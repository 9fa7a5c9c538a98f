"""I-JEPA and StoP compute the same values as the official code (values in tests/golden/stop.json).

The official code printed them, ijepa at 52c1ae9 and StoP at 72206b3, on a CPU in float32.
"""

import pytest
import torch
from torch import Tensor

from common.convert import load_method, rename
from common.masking import MultiBlock
from common.optim import make_optimizer
from common.recipe import TrainConfig
from common.vit import ViT
from stop.method import OFFICIAL_NAMES, UNUSED, StoP
from tests import parity

GOLDEN = parity.golden("stop")
TO_OFFICIAL = {ours: official for official, ours in OFFICIAL_NAMES.items()}
CASES = {
    "ijepa": {"noise": "none"},
    "stop_sigma0.25": {"mode": "released", "sigma": 0.25},
    "stop_sigma0": {"mode": "released", "sigma": 0.0},
}
CORNERS = [[(0, 0), (3, 6), (6, 1), (5, 5)], [(1, 2), (6, 6), (0, 6), (4, 0)]]


def stop(**options) -> StoP:
    """A small model with the official weights, loaded from the official names."""
    torch.manual_seed(0)
    encoder = ViT(image_size=96, patch_size=8, width=64, depth=2, heads=4, class_token=False)
    model = StoP(encoder, predictor_width=32, predictor_depth=2, **options)
    official = rename(model.state_dict(), TO_OFFICIAL)
    official["predictor.mask_token"] = torch.zeros(1, 1, 32)  # the official files always have one
    official = {name: fill(name, tensor) for name, tensor in official.items()}
    unused = UNUSED if model.mode == "released" else ()
    coverage = load_method(model, {f"module.{name}": tensor for name, tensor in official.items()}, OFFICIAL_NAMES, unused)
    assert not coverage.missing and not coverage.unexpected
    return model.train()


def fill(name: str, tensor: Tensor) -> Tensor:
    """Rule B, by the tensor's name within its own network."""
    name = name.partition(".")[2]
    if "pos_embed" in name:
        return tensor
    k = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    filled = 0.05 * torch.sin(1 + 0.7 * k + 0.13 * (sum(name.encode()) % 1009))
    return (filled + ("norm" in name and name.endswith(".weight"))).float()


def cells() -> tuple[Tensor, Tensor]:
    """Blocks of 5 x 5; the context is rows and columns 0 to 10 without the blocks, truncated to the shorter of the two."""
    blocks = torch.tensor([[[(t + i) * 12 + left + j for i in range(5) for j in range(5)] for t, left in image] for image in CORNERS])
    square = [row * 12 + column for row in range(11) for column in range(11)]
    contexts = [[cell for cell in square if cell not in set(block.flatten().tolist())] for block in blocks]
    assert [len(context) for context in contexts] == GOLDEN["masks"]["ctx_len_before"]
    return torch.tensor([context[: GOLDEN["masks"]["ctx_len"]] for context in contexts]), blocks.transpose(0, 1)


def noise() -> Tensor:
    k = torch.arange(2 * 25 * 64, dtype=torch.float64)
    return torch.stack([2**0.5 * torch.sin(0.37 * k + i) for i in range(4)]).view(4, 2, 25, 64).float()


def images() -> Tensor:
    return torch.sin(0.01 * torch.arange(2 * 3 * 96 * 96, dtype=torch.float64)).view(2, 3, 96, 96).float()


def close(ours: Tensor, official: list[float], rel: float = 1e-4) -> None:
    assert ours.flatten()[: len(official)].tolist() == pytest.approx(official, rel=rel, abs=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_features_predictions_and_loss_equal_the_official_ones(case):
    golden, output = GOLDEN[case], stop(**CASES[case])(images(), cells=cells(), noise=(None, noise()))
    seen, target, pred = (output.named[name] for name in ("seen", "target", "pred"))
    for ours, name in ((seen, "enc_ctx_out"), (target.flatten(0, 1), "target"), (pred.flatten(0, 1), "pred")):
        assert list(ours.shape) == golden[f"{name}_shape"]
        close(ours[0, 0], golden[f"{name}_[0,0,:4]"])
    close(pred.flatten(0, 1)[-1, -1], golden["pred_[-1,-1,:4]"])
    assert seen.sum().item() == pytest.approx(golden["enc_ctx_out_sum"], rel=1e-4)
    assert seen.abs().mean().item() == pytest.approx(golden["enc_ctx_out_abs"], rel=1e-5)
    assert target.abs().mean().item() == pytest.approx(golden["target_absmean"], rel=1e-5)
    assert pred.abs().mean().item() == pytest.approx(golden["pred_absmean"], rel=1e-5)
    assert output.loss.item() == pytest.approx(golden["loss"], abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_official_ones(case):
    model = stop(**CASES[case])
    model(images(), cells=cells(), noise=(None, noise())).loss.backward()
    official = {f"context_encoder.{name[4:]}" if name[:4] == "enc." else f"predictor.{name}": norm for name, norm in _norms(case).items()}
    official = {name.replace("predictor_embed", "embed"): norm for name, norm in official.items()}
    for name, parameter in model.named_parameters():
        if name in official:
            assert parameter.grad.norm().item() == pytest.approx(official.pop(name), rel=1e-3), name
    assert official in ({}, {"predictor.mask_token": None})  # the released mode has no mask token
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


def _norms(case: str) -> dict[str, float | None]:
    return GOLDEN[case]["grad_norm"]


@pytest.mark.parametrize("case", CASES)
def test_one_adamw_step_and_ema_update_equal_the_official_ones(case):
    model, golden = stop(**CASES[case]), GOLDEN[case]
    optimizer = make_optimizer(model, TrainConfig(epochs=1, batch_size=256, base_lr=1e-3, weight_decay=0.04))
    model(images(), cells=cells(), noise=(None, noise())).loss.backward()
    optimizer.step()
    model.after_step(0, 1000)
    close(model.predictor.embed.weight[0], golden["after_step"]["predictor_embed.weight[0,:4]"])
    close(model.encoder.patch_embed.proj.weight[0, 0, 0], golden["after_step"]["target.patch_embed.proj.weight[0,0,0,:4]"], rel=1e-5)
    assert model.encoder(images()).abs().mean().item() == pytest.approx(golden["target_fwd_absmean_after"], rel=1e-5)


@pytest.mark.parametrize(("batch", "case"), [(4, "collator_seed123_B4"), (64, "collator_seed123_B64")])
def test_released_masks_equal_the_official_ones_exactly(batch, case):
    masks = MultiBlock((14, 14), sampling="released")
    torch.manual_seed(123)
    for step, official in enumerate(GOLDEN[case]):
        context, blocks = masks(batch, step)
        found = {"enc": list(context.shape), "enc_sum": int(context.sum()), "enc_first": context[0, :5].tolist()}
        found |= {"pred": list(blocks.shape[1:]), "pred_sum": blocks.sum((1, 2)).tolist(), "pred_first": blocks[:, 0, 0].tolist()}
        assert found == official
