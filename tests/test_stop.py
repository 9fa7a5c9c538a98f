"""Tests of StoP and I-JEPA: noise, inputs of the encoders, EMA of the target encoder, and collapse metrics."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.convert import ConversionError, load_encoder, load_method, read_checkpoint, rename
from common.optim import make_optimizer
from common.recipe import TrainConfig
from common.train import Stopped
from common.vit import ViT
from stop.method import OFFICIAL_NAMES, UNUSED, StoP, spread
from tests.tiny import STAGE, train

TO_OFFICIAL = {ours: official for official, ours in OFFICIAL_NAMES.items()}
CONTEXT = torch.tensor([[0, 1, 2, 7, 14, 20], [3, 9, 10, 22, 30, 35]])
BLOCKS = torch.tensor([[[24, 25, 30, 31], [0, 1, 6, 7]], [[25, 26, 31, 32], [12, 13, 18, 19]]])  # two overlapping blocks


def encoder(**options) -> ViT:
    return ViT(**{"image_size": 24, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "class_token": False} | options)


def stop(seed: int = 0, vit: dict | None = None, **options) -> StoP:
    torch.manual_seed(seed)
    return StoP(encoder(**vit or {}), **{"predictor_width": 16, "predictor_depth": 2} | options)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def predictor_input(model: StoP, seed: int = 0, **given) -> Tensor:
    """Return the input of the predictor: (2 blocks, 2 images, 6 context + 4 masked tokens, P)."""
    caught = []
    hook = model.predictor.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
    torch.manual_seed(seed)
    with torch.no_grad():
        model(images(), cells=(CONTEXT, BLOCKS), **given)
    hook.remove()
    return caught[0].unflatten(0, (2, 2))


# ---- equality of I-JEPA and StoP without noise


@pytest.mark.parametrize("noise", ["masked", "context", "both"])
def test_with_sigma_0_stop_equals_ijepa(noise):
    one, other = stop(sigma=0.0, noise=noise), stop(noise="none")
    assert torch.equal(predictor_input(one), predictor_input(other))


def test_released_stop_with_sigma_0_equals_ijepa_with_the_bias_as_mask_token():
    released, ijepa = stop(mode="released", sigma=0.0), stop(noise="none")
    nn.init.normal_(released.predictor.embed.bias)
    ijepa.load_state_dict(released.state_dict(), strict=False)
    with torch.no_grad():
        ijepa.predictor.mask_token.copy_(released.predictor.embed.bias)
    losses = [model(images(), cells=(CONTEXT, BLOCKS)).loss for model in (released, ijepa)]
    assert torch.equal(*losses)


def test_ijepa_uses_no_random_numbers():
    model, state = stop(noise="none"), torch.get_rng_state()
    model(images(), cells=(CONTEXT, BLOCKS))
    assert torch.equal(torch.get_rng_state(), state)


# ---- noise


@pytest.mark.parametrize(("noise", "context", "hidden"), [("masked", False, True), ("context", True, False), ("both", True, True)])
def test_noise_is_added_only_to_the_selected_tokens(noise, context, hidden):
    model = stop(noise=noise)
    first, second = (predictor_input(model, seed) for seed in (0, 1))
    changed = (first != second).any(-1)
    assert changed[..., :6].all().item() == context and changed[..., :6].any().item() == context
    assert changed[..., 6:].all().item() == hidden and changed[..., 6:].any().item() == hidden


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("covariance", ["tied", "fixed"])
def test_noise_is_independent_with_tied_or_identity_covariance(mode, covariance):
    model = stop(mode=mode, covariance=covariance, sigma=0.5)
    nn.init.normal_(model.predictor.embed.weight, std=0.3)
    nn.init.normal_(model.predictor.embed.bias)
    plain = stop(mode=mode, noise="none")
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    cells = CONTEXT[:1].expand(2000, -1), BLOCKS[:, :1].expand(-1, 2000, -1)
    caught = []
    for one in (model, plain):
        one.predictor.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
        with torch.no_grad():
            one(images(1).expand(2000, -1, -1, -1), cells=cells)
    noise_GBTP = (caught[0] - caught[1])[:, 6:].unflatten(0, (2, 2000))
    weight = model.predictor.embed.weight
    expected = 0.25 * (weight @ weight.T if covariance == "tied" else torch.eye(16))
    found = noise_GBTP.flatten(0, 2).T.cov()
    assert (found - expected).abs().max() < 0.04 * expected.abs().max()
    assert noise_GBTP.mean((0, 1, 2)).abs().max() < 0.05 * expected.diagonal().max().sqrt()
    a, b, c = noise_GBTP[0, :, 1], noise_GBTP[0, :, 2], noise_GBTP[1, :, 0]  # patches 25 and 30 of one block, and patch 25 of the other
    for one, other in ((a, b), (a, c), (a[:-1], a[1:])):  # tokens, blocks, images
        assert (one.T @ other / len(one)).abs().max() < 0.1 * expected.abs().max()


def test_the_input_of_a_masked_patch_is_position_plus_mask_token_plus_projected_noise():
    model, g = stop(sigma=0.5), torch.Generator().manual_seed(2)
    nn.init.normal_(model.predictor.embed.bias)
    n = torch.randn(2, 2, 4, 32, generator=g)
    hidden = predictor_input(model, noise=(None, n))[..., 6:, :]
    expected = model.predictor.pos_embed[0][BLOCKS] + model.predictor.mask_token + 0.5 * n @ model.predictor.embed.weight.T
    torch.testing.assert_close(hidden, expected)


def test_the_noise_contributes_to_the_gradient_of_the_projection():
    def gradient(**options) -> Tensor:
        model = stop(**options)
        torch.manual_seed(0)
        model(images(), cells=(CONTEXT, BLOCKS)).loss.backward()
        return model.predictor.embed.weight.grad

    assert gradient(sigma=2.0).norm() > 2 * gradient(sigma=0.0).norm()


def test_only_learned_positions_of_the_predictor_are_trained():
    learned, fixed = stop(position="learned"), stop()
    learned(images()).loss.backward()
    assert learned.predictor.pos_embed.grad.abs().sum() > 0
    assert "predictor.pos_embed" not in dict(fixed.named_parameters()) and "predictor.pos_embed" in fixed.state_dict()


# ---- inputs and targets


def test_the_context_encoder_gets_only_the_context_and_the_target_encoder_all_patches():
    model, given = stop(), (CONTEXT, BLOCKS)
    pixels = torch.zeros(2, 36).scatter_(1, CONTEXT, 1.0).view(2, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(pixels == 1, images(), images().flip(0))
    one, two = (model(x, cells=given).named for x in (images(), other))
    assert torch.equal(one["seen"], two["seen"]) and not torch.equal(one["target"], two["target"])


def test_each_target_block_is_predicted_independently():
    model, n = stop(), torch.randn(2, 2, 4, 32)
    moved = BLOCKS.clone()
    moved[1] = moved[1].flip(0)
    one, two = (model(images(), cells=(CONTEXT, blocks), noise=(None, n)).named["pred"] for blocks in (BLOCKS, moved))
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])


def test_targets_are_layer_normalised_features_of_the_target_encoder():
    model = stop()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        feature = F.layer_norm(model.encoder(images()), (32,))
    target = model(images(), cells=(CONTEXT, BLOCKS)).named["target"]
    for g, b, t in ((0, 0, 1), (1, 1, 3), (0, 1, 0)):
        torch.testing.assert_close(target[g, b, t], feature[b, BLOCKS[g, b, t]])
    assert target.mean(-1).abs().max() < 1e-5


def test_the_loss_is_the_mean_smooth_l1_of_all_blocks():
    output = stop()(images(), cells=(CONTEXT, BLOCKS))
    error = (output.named["pred"] - output.named["target"]).abs()
    expected = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


# ---- the target encoder


def test_the_target_encoder_starts_as_the_context_encoder_and_gets_no_gradient():
    model = stop()
    model(images()).loss.backward()
    both = dict(model.encoder.named_parameters()), dict(model.context_encoder.named_parameters())
    assert all(torch.equal(both[0][name], both[1][name]) and both[0][name].grad is None for name in both[0])
    groups = make_optimizer(model, TrainConfig(epochs=1, batch_size=256, base_lr=1e-3)).param_groups
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in both[0].values()}
    assert trained >= {id(parameter) for parameter in [*both[1].values(), *model.predictor.parameters()]}


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.996), (9373, 0.996099979), (187499, 0.997999989), (374999, 0.999999989)])
def test_the_ema_has_the_official_momentum(step, momentum):
    model = stop()
    with torch.no_grad():
        for parameter in model.context_encoder.parameters():
            parameter.add_(1.0)
    before = {name: parameter.double() for name, parameter in model.encoder.named_parameters()}
    model.double().after_step(step, 375000)
    for name, parameter in model.encoder.named_parameters():
        torch.testing.assert_close(parameter - before[name], torch.full_like(parameter, 1 - momentum), rtol=1e-2, atol=1e-9)


# ---- collapse metrics


def test_collapsed_features_have_std_zero_and_rank_one():
    collapsed = spread(torch.randn(1, 5, 16).expand(8, -1, -1))
    assert collapsed["feature_std"].item() == pytest.approx(0, abs=1e-6) and collapsed["rankme"].item() == pytest.approx(1, abs=1e-3)


def test_rankme_is_the_effective_rank_of_the_mean_features():
    orthogonal = torch.linalg.qr(torch.randn(16, 6)).Q.T[:, None]
    assert spread(orthogonal)["rankme"].item() == pytest.approx(6, rel=1e-4)
    s = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    p = s[:4] / 8
    assert spread(s[:, None, None] * orthogonal)["rankme"].item() == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-4)


def test_normalised_noise_has_std_one():
    assert spread(F.layer_norm(torch.randn(512, 4, 64), (64,)))["feature_std"].item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_spread_of_non_finite_features_is_nan_without_an_error(value):
    feature_BND = torch.randn(8, 5, 16)
    feature_BND[3, 2, 7] = value
    assert all(measured.isnan() for measured in spread(feature_BND).values())


def test_the_metrics_contain_the_context_length():
    for masks, images_ in (("uniform", 2), ("released", 4)):
        output = stop(masks=masks, min_keep=3)(images(images_))
        assert output.metrics["context"].item() == output.named["context"].shape[1]
        assert {"feature_std", "rankme"} < set(output.metrics)


def test_the_mask_sizes_change_with_the_step():
    model, drawn = stop(target_scale=(0.1, 0.3)), set()
    for step in range(12):
        model.at_step(step, 12)
        drawn.add(tuple(model(images()).named["cells"].shape))
    assert len(drawn) > 1


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    kept, recomputed = stop(), stop(vit={"grad_checkpointing": True})
    losses = [model(images(), cells=(CONTEXT, BLOCKS), noise=(None, torch.ones(2, 2, 4, 32))).loss for model in (kept, recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, one), other in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad), name
    assert all(block.grad_checkpointing for block in [*recomputed.context_encoder.blocks, *recomputed.predictor.blocks])


# ---- official checkpoints


def save_official(path, model: StoP, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Write a file as the official code does: three networks with DDP's prefix, and other entries."""
    official = rename(model.state_dict(), TO_OFFICIAL) | {"predictor.mask_token": torch.ones(1, 1, 16)}
    content = {"epoch": 600, "loss": 0.1, "batch_size": 64, "world_size": 32, "lr": 8e-4, "scaler": None}
    content["opt"] = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    for name, tensor in official.items():
        network, _, rest = name.partition(".")
        if network not in without:
            content.setdefault(network, {})[f"module.{rest}"] = tensor
    torch.save(content, path)
    return official


def different(model: StoP) -> StoP:
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(2)
    return model


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_an_official_file_loads_completely(tmp_path, mode):
    model, other = different(stop(mode=mode)), stop(seed=5, mode=mode)
    official = save_official(tmp_path / "f.pth.tar", model)
    assert {"encoder.blocks.0.attn.qkv.weight", "target_encoder.pos_embed", "predictor.predictor_pos_embed"} < set(official)
    coverage = load_method(other, read_checkpoint(tmp_path / "f.pth.tar"), OFFICIAL_NAMES, UNUSED if mode == "released" else ())
    assert not coverage.missing and not coverage.unexpected
    expected = model.state_dict() | ({"predictor.mask_token": torch.ones(1, 1, 16)} if mode == "paper" else {})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())


def test_the_encoder_of_an_official_file_is_its_target_encoder(tmp_path):
    model, loaded = different(stop()), encoder()
    save_official(tmp_path / "f.pth.tar", model)
    coverage = load_encoder(loaded, read_checkpoint(tmp_path / "f.pth.tar"))
    assert not coverage.missing and not coverage.unexpected and len(coverage.loaded) == len(loaded.state_dict())
    assert all(torch.equal(tensor, model.encoder.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_the_encoder_of_our_own_method_is_its_target_encoder():
    model, loaded = different(stop()), encoder()
    load_encoder(loaded, model.state_dict())
    assert all(torch.equal(tensor, model.encoder.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_an_official_file_without_target_encoder_is_refused(tmp_path):
    save_official(tmp_path / "f.pth.tar", stop(), without=("target_encoder",))
    with pytest.raises(ConversionError, match="has no target_encoder"):
        load_encoder(encoder(), read_checkpoint(tmp_path / "f.pth.tar"))


# ---- bad input


@pytest.mark.parametrize(
    ("vit", "options", "message"),
    [
        ({"class_token": True}, {}, "needs positions, and no class token"),
        ({"position": "none"}, {}, "needs positions, and no class token"),
        ({}, {"sigma": -0.25}, "sigma=-0.25 is not a number from 0 up"),
        ({}, {"sigma": math.nan}, "sigma=nan is not a number from 0 up"),
        ({}, {"sigma": "wide"}, "sigma='wide' is not a number from 0 up"),
        ({}, {"patch_std": -1.0}, "patch_std=-1.0 is not a number from 0 up"),
        ({}, {"momentum": 1.5}, "momentum=1.5 is not a number from 0 to 1"),
        ({}, {"mode": "official"}, "mode='official' is not known; choose one of paper, released"),
        ({}, {"noise": "targets"}, "noise='targets' is not known; choose one of masked, context, both, none"),
        ({}, {"covariance": "free"}, "covariance='free' is not known; choose one of tied, fixed"),
        ({}, {"position": "relative"}, "position='relative' is not known"),
        ({}, {"predictor_width": 18}, "predictor_width=18 is not a multiple of 4 and of the encoder's 2 heads"),
        ({"image_size": 8}, {}, "a grid of 2 x 2 cells has no block"),
        ({}, {"masks": "released"}, "min_keep=10.*use min_keep=3 or less"),
    ],
)
def test_an_invalid_setting_is_refused_with_its_value(vit, options, message):
    with pytest.raises(ValueError, match=message):
        stop(vit=vit, **options)


def test_one_image_per_device_is_refused_in_training_but_not_in_evaluation():
    model = stop()
    with pytest.raises(ValueError, match="a device batch of 1 image"):
        model(images(1))
    assert model.eval()(images(1)).loss.isfinite()


# ---- runs


def test_a_run_stopped_by_a_signal_resumes_bit_identically_including_the_ema(tmp_path):
    class Stopping(StoP):
        def at_step(self, step: int, total_steps: int) -> None:
            super().at_step(step, total_steps)
            if step == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    def model(stop_at: int | None = None) -> Stopping:
        torch.manual_seed(0)
        vit = ViT(image_size=8, patch_size=1, channels=1, width=16, depth=1, heads=2, class_token=False)
        made = Stopping(vit, predictor_width=8, predictor_depth=1)
        made.stop_at = stop_at
        return made

    stage = replace(STAGE, final_weight_decay=0.4, warmup_lr=1e-4)
    _, undisturbed = train(tmp_path / "undisturbed", model(), stage)
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", model(stop_at=3), stage)
    _, resumed = train(tmp_path / "stopped", model(), stage)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in undisturbed.state_dict().items())
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("undisturbed", "stopped")]
    assert logs[0] == logs[1] and "rankme" in logs[0]
    assert not torch.equal(undisturbed.encoder.norm.bias, undisturbed.context_encoder.norm.bias)
