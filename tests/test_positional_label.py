"""Tests of Positional Label: official values, loss, labels of each token, metrics, refused settings and the export.

The heads are tested in test_label_heads.py, the backbones in test_backbones.py.

Shapes: B images, K classes, N tokens, M visible patches, D width.
"""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import Nest, SwinTransformer, VisionTransformer, VisionTransformerDistilled
from torch import Tensor

from benchmarks.baselines.mae import MAE
from benchmarks.stages import Stages
from common.checkpoint import export_encoder
from common.convert import load_method, rename
from common.optim import make_optimizer
from common.randomness import reseed
from common.recipe import Recipe, choose_arms, override
from common.vit import ViT
from positional_label.method import OFFICIAL_SWIN_NAMES, OFFICIAL_VIT_NAMES, PositionalLabel, PositionalMAE
from positional_label.recipe import build, digits, digits_mae, imagenet_swin, imagenet_swin_tiny, imagenet_vit
from tests import parity
from tests.test_backbones import NEST, SWIN, VIT, pictures, prepared
from tests.test_label_heads import loop_loss
from tests.test_vit import redraw

B, K = 4, 7
MEAN_POOLED = {"class_token": False, "global_pool": "avg", "fc_norm": False}
FAMILIES = {  # all on images of 32 x 32
    "vit": lambda: VisionTransformer(**VIT | {"img_size": 32, "patch_size": 8}, **MEAN_POOLED),
    "deit": lambda: VisionTransformer(**VIT | {"img_size": 32, "patch_size": 8}),
    "distilled": lambda: VisionTransformerDistilled(**VIT | {"img_size": 32, "patch_size": 8}),
    "swin": lambda: SwinTransformer(**SWIN, img_size=32, window_size=4),
    "nest": lambda: Nest(**NEST),
}
LABELS = ("absolute", "relative")


def model_of(family: str = "vit", **options) -> PositionalLabel:
    torch.manual_seed(0)
    return redraw(PositionalLabel(prepared(FAMILIES[family]()), K, **options))


def batch(count: int = B) -> tuple[Tensor, Tensor]:
    return pictures((32, 32), count), torch.arange(count) * 3 % K


def raster(tokens_BND: Tensor) -> Tensor:
    """Return the label of each token if all are visible: its position in row-major order."""
    return torch.arange(tokens_BND.shape[1]).expand(len(tokens_BND), -1)


def position_loss(model: PositionalLabel, output) -> float:
    """Return the position loss of tokens with labels in row-major order."""
    tokens_BND = output.named["tokens"]
    return model.head.loss(tokens_BND, raster(tokens_BND)).item()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- the official values

GOLDEN = parity.golden("positional_label")


def build_golden(name: str) -> tuple[PositionalLabel, dict[str, str]]:
    """Return the model with the weights of the case, and the map from our names to the official ones."""
    label, official = ("relative", OFFICIAL_SWIN_NAMES) if "rpl" in name else ("absolute", OFFICIAL_SWIN_NAMES)
    if name.startswith("vit"):
        official = OFFICIAL_VIT_NAMES
        encoder = VisionTransformer(img_size=224, patch_size=16, embed_dim=768, depth=2, num_heads=12, num_classes=0, **MEAN_POOLED)
    else:
        encoder = SwinTransformer(img_size=224, depths=(1, 1, 1, 1), num_classes=0)
    swin = "released" if name.startswith("swin") else "plain"
    model = PositionalLabel(prepared(encoder, (224, 224)), 1000, label=label, swin=swin)
    # With absolute labels, the layer that replaces the last merging has its own names; they occur only there.
    to_official = {ours: theirs for theirs, ours in official.items() if "FinalLayer" not in theirs or name.startswith("swin_apl")}
    state = parity.weights(rename(model.state_dict(), to_official), untouched=(), fill=tuple(GOLDEN[name]["fill"]))
    assert len(state) == GOLDEN[name]["keys"] and not [key for key in state if key.startswith("encoder.")]
    load_method(model, state, official)
    return model.eval(), to_official


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_logits_accuracy_and_gradients_equal_the_official_values(name):
    case, (model, to_official) = GOLDEN[name], build_golden(name)
    images, targets = parity.images(case["batch"], 3, 224, 224, phase=case["image_phase"]), torch.tensor([1, 4])  # 3 i + 1
    output = model(images, targets)
    logits_BK, position = output.named["logits"], model.head(output.named["tokens"]).flatten(0, -2)
    assert [list(logits_BK.shape), list(position.shape)] == [case["class_logits"], case["pos_logits"]]
    assert output.metrics["position_loss"].item() == pytest.approx(case["position_loss"], abs=1e-5)
    assert F.cross_entropy(logits_BK, targets).item() == pytest.approx(case["class_loss_target_3i1"], abs=1e-5)
    assert output.loss.item() == pytest.approx(case["total_lambda_half"], abs=1e-5)
    assert logits_BK[0, :4].tolist() == pytest.approx(case["class_first"], abs=1e-5)
    assert position[0, :4].tolist() == pytest.approx(case["pos_first"], abs=1e-5)
    assert position[-1, -4:].tolist() == pytest.approx(case["pos_last"], abs=1e-5)
    assert logits_BK.double().abs().sum().item() == pytest.approx(case["class_abs_sum"], rel=1e-5)
    assert position.double().abs().sum().item() == pytest.approx(case["pos_abs_sum"], rel=1e-5)
    assert output.metrics["position_top1"].item() == pytest.approx(100 * case["position_accuracy"], rel=1e-6)
    output.loss.backward()
    official = rename(gradients(model), to_official)
    for key, norm in case["grad_norm"].items():
        assert official[key].norm().item() == pytest.approx(norm, rel=1e-3), key


# ---- the released configurations


def arm_of(recipe: Recipe, arm: str, *changes: str) -> PositionalLabel:
    own = override(choose_arms(recipe, [arm])[arm], changes)
    return build(own, own.build_encoder(3), 1000)


@pytest.mark.parametrize(
    ("recipe", "arm", "parameters"),
    [
        (imagenet_vit, "vit+apl", 86_825_708),
        (imagenet_swin_tiny, "swin_released+rpl", 28_817_393),
        (imagenet_swin_tiny, "swin_released+apl", 27_681_740),
    ],
)
def test_released_configurations_have_the_official_number_of_parameters(recipe, arm, parameters):
    with torch.device("cpu" if "released" in arm else "meta"):  # the released blocks disable autocast, which lacks a meta device
        model = arm_of(recipe(), arm)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if "released" in arm:
        windows = [[(block.window[0], block.shift[0]) for block in layer.blocks] for layer in model.encoder.layers]
        side = 14 if arm.endswith("apl") else 7
        assert windows == [[(7, 0), (7, 3)], [(7, 0), (7, 3)], [(7, 0), (7, 3)] * 3, [(side, 0)] * 2] and model.grid == (side, side)


@pytest.mark.parametrize(("arm", "answers"), [("swin_released+apl", (196, 196)), ("swin_released+rpl", (49, 49, 169))])
def test_swin_b_runs_although_the_released_code_fixes_the_widths_of_swin_t(arm, answers):
    model = arm_of(imagenet_swin(), arm, "encoder.depths=[1, 1, 1, 1]").eval()
    output = model(pictures((224, 224), 1))
    assert model.head(output.named["tokens"]).shape == (1, *answers) and output.loss.isfinite()
    assert output.named["tokens"].shape == (1, answers[0], 1024) and output.named["logits"].shape == (1, 1000)


# ---- the loss


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("label", LABELS)
def test_the_loss_is_the_class_loss_plus_half_the_position_loss(label, training):
    model, (images, targets) = model_of(label=label, smoothing=0.1).train(training), batch()
    output = model(images, targets)
    own = F.cross_entropy(output.named["logits"], targets, label_smoothing=0.1 if training else 0.0).item()
    assert output.metrics["position_loss"].item() == pytest.approx(position_loss(model, output), abs=1e-6)
    assert output.loss.item() == pytest.approx(own + 0.5 * position_loss(model, output), abs=1e-6)
    assert not output.metrics["position_loss"].requires_grad


def test_the_weight_scales_the_position_loss():
    (images, targets), loss = batch(), {}
    for weight in (0.0, 0.5, 2.0):
        output = model_of(label="absolute", weight=weight)(images, targets)
        loss[weight] = output.loss.item()
    assert output.metrics["position_loss"].item() == pytest.approx((loss[2.0] - loss[0.0]) / 2, abs=1e-5)
    assert loss[0.5] - loss[0.0] == pytest.approx((loss[2.0] - loss[0.0]) / 4, abs=1e-5)


def test_weight_0_gives_the_loss_and_backbone_gradients_of_training_without_labels():
    (images, targets), found = batch(), {}
    for label in ("none", *LABELS):
        model = model_of(label=label, weight=0.0)
        output = model(images, targets)
        output.loss.backward()
        found[label] = output, gradients(model.encoder)
        assert (model.head is None) == (label == "none") == ("position_top1" not in output.metrics)
    alone, expected = found["none"]
    assert set(alone.metrics) == {"top1", "top5"} and alone.loss == F.cross_entropy(alone.named["logits"], targets)
    for label in LABELS:
        assert found[label][0].loss == alone.loss and found[label][1].keys() == expected.keys()
        assert all(torch.equal(gradient, expected[name]) for name, gradient in found[label][1].items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", LABELS)
def test_the_position_loss_alone_trains_everything_except_the_classifier(label, family):
    model = model_of(family, label=label, swin="released" if family == "swin" else "plain")
    output = model(batch()[0])  # without class targets, only the position loss remains
    assert output.loss.item() == pytest.approx(0.5 * position_loss(model, output), abs=1e-6)
    output.loss.backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert untrained == {name for name, _ in model.named_parameters() if name.startswith("encoder.head")} != set()


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_absolute_labels_use_only_the_first_half_of_the_channels(family):
    for label in LABELS:
        model = model_of(family, label=label)
        model(batch()[0]).loss.backward()
        first, second = model.encoder.norm.weight.grad.chunk(2)
        assert first.all() and (second.all() if label == "relative" else not second.any())


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_one_sgd_step_equals_a_step_on_the_loss_written_out(family):
    model, (images, targets) = model_of(family, swin="released" if family == "swin" else "plain").train(), batch()
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    x_BND = other.encoder.forward_features(images).reshape(B, 16, -1)
    classes_BK = x_BND.mean(1) @ other.encoder.get_classifier().weight.T + other.encoder.get_classifier().bias
    written_out = F.cross_entropy(classes_BK, targets) + 0.5 * loop_loss(other.head, x_BND, raster(x_BND), (4, 4))
    for trained, loss in ((model, model(images, targets).loss), (other, written_out)):
        loss.backward()
        torch.optim.SGD(trained.parameters(), lr=1.0).step()
    for name, parameter in other.named_parameters():
        assert (parameter - before[name]).abs().max() > 1e-5, name
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=1e-6, rtol=1e-5, msg=name)


# ---- the labels of each token


@pytest.mark.parametrize("blend", [{"mixup": 0.8}, {"cutmix": 1.0}])
@pytest.mark.parametrize("label", LABELS)
def test_mixup_and_cutmix_mix_images_and_classes_but_not_positional_labels(label, blend, monkeypatch):
    model, (images, targets), seen = model_of(label=label, smoothing=0.1, **blend).train(), batch(), {}
    monkeypatch.setattr(model.encoder, "forward_features", lambda x, f=model.encoder.forward_features: f(seen.setdefault("images", x)))
    monkeypatch.setattr(model.supervision, "loss", lambda x, y, f=model.supervision.loss: f(x, seen.setdefault("targets", y)))
    reseed(0)
    output, original = model(images, targets), batch()[0]
    assert torch.equal(images, original) and not torch.equal(seen["images"], images)
    assert seen["targets"].shape == (B, K) and ((seen["targets"] > 0.1 / K + 1e-4).sum(1) == 2).all()
    assert output.metrics["position_loss"].item() == pytest.approx(position_loss(model, output), abs=1e-6)
    own = torch.sum(-seen["targets"] * output.named["logits"].log_softmax(-1), -1).mean().item()
    assert output.loss.item() == pytest.approx(own + 0.5 * position_loss(model, output), abs=1e-5)


@pytest.mark.parametrize("label", LABELS)
def test_flipping_the_images_does_not_flip_the_positional_labels(label):
    model, (images, targets) = model_of(label=label), batch()
    output = model(images.flip(-1), targets)
    tokens_BND, mirrored_BN = output.named["tokens"], raster(output.named["tokens"]).unflatten(1, (4, 4)).flip(-1).flatten(1)
    assert output.metrics["position_loss"].item() == pytest.approx(position_loss(model, output), abs=1e-6)
    assert abs(model.head.loss(tokens_BND, mirrored_BN).item() - output.metrics["position_loss"].item()) > 1e-3


@pytest.mark.parametrize("label", ["none", *LABELS])
def test_the_batch_size_may_change_and_may_be_one(label):
    """The released code hard-codes the labels for one batch size."""
    model, (images, targets) = model_of(label=label, mixup=0.8).train(), batch()
    assert all(model(images[:count], targets[:count]).loss.isfinite() for count in (4, 3))
    assert model_of(label=label).train()(images[:1], targets[:1]).loss.isfinite()  # mixup needs two
    whole, alone = model.eval()(images, targets), [model(images[[i]], targets[[i]]) for i in range(B)]
    assert whole.loss.item() == pytest.approx(sum(output.loss.item() for output in alone) / B, abs=1e-5)
    assert whole.metrics.keys() == alone[0].metrics.keys()


# ---- metrics


@pytest.mark.parametrize("label", LABELS)
def test_the_metrics_are_the_accuracies_of_classes_and_positions(label):
    model, (images, _) = model_of(label=label), batch()
    logits_BK = model(images).named["logits"]
    ranked = [sorted(range(K), key=lambda k, row=row: -row[k]) for row in logits_BK.tolist()]
    targets = torch.tensor([ranked[0][0], ranked[1][4], ranked[2][5], ranked[3][6]])  # rank 1, rank 5, and two beyond rank 5
    output = model(images, targets)
    assert (output.metrics["top1"], output.metrics["top5"]) == (25, 50)
    answers, right = model.head(output.named["tokens"]).argmax(-1).flatten(1).tolist(), []
    for answer in answers:
        for place, predicted in enumerate(answer):
            (r, c), (s, d) = (divmod(cell, 4) for cell in divmod(place, 16))
            right.append(predicted == (place if label == "absolute" else (r - s + 3) * 7 + c - d + 3))
    assert 0 < sum(right) < len(right)
    assert output.metrics["position_top1"].item() == pytest.approx(100 * sum(right) / len(right), rel=1e-5)
    assert set(model.train()(images, targets).metrics) == {"position_loss"}


def test_weight_decay_skips_positions_and_class_tokens_but_not_convolutions():
    for family, swin, undecayed in (
        ("deit", "plain", {"encoder.cls_token", "encoder.pos_embed"}),
        ("vit", "plain", {"encoder.pos_embed"}),
        ("swin", "plain", {f"encoder.layers.{i}.blocks.{j}.attn.relative_position_bias_table" for i in (0, 1) for j in (0, 1)}),
        ("swin", "released", set()),
    ):
        model = model_of(family, swin=swin)
        assert model.no_weight_decay() == undecayed
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = make_optimizer(model, digits().pretrain).param_groups
        decayed = {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
        assert decayed == {name for name, parameter in model.named_parameters() if parameter.ndim > 1} - undecayed
        assert any(".cpe." in name for name in decayed) == (swin == "released")


# ---- backbones


ARMS = choose_arms(digits()), choose_arms(digits_mae())


@pytest.mark.parametrize("alone", [name for arms in ARMS for name in arms if "+" not in name])
def test_all_arms_of_a_seed_start_from_the_same_backbone_and_classifier(alone):
    recipes, start = ARMS[0] | ARMS[1], {}
    for arm in (alone, f"{alone}+apl", f"{alone}+rpl"):
        new_encoder = Stages.new_encoder(SimpleNamespace(seed=3, recipe=recipes[arm], data=SimpleNamespace(channels=1)))
        start[arm] = build(recipes[arm], new_encoder, 10).encoder.state_dict()
    start.pop("swin_released+apl", None)  # a different network: its last stage keeps the grid
    for arm, state in start.items():
        assert state.keys() == start[alone].keys() and all(torch.equal(tensor, start[alone][name]) for name, tensor in state.items()), arm


def test_a_distilled_deit_trains_on_its_patch_tokens_with_both_classifiers():
    encoder = prepared(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=0, img_size=32, depth=2))
    model, (images, targets) = redraw(PositionalLabel(encoder, K)).train(), batch()
    output = model(images, targets)
    output.loss.backward()
    assert output.loss.isfinite() and output.named["tokens"].shape == (B, 4, 192)
    assert torch.equal(output.named["tokens"], encoder.forward_features(images)[:, 2:])
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert {"head.weight", "head_dist.weight"} <= set(encoder.state_dict())


# ---- on top of MAE

SIZES = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5}


def mae(kind: type = PositionalMAE, **options) -> PositionalMAE | MAE:
    return redraw(kind(ViT(image_size=16, patch_size=4, width=32, depth=2, heads=2), **SIZES | options))


def mae_inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.randn(B, 3, 16, 16, generator=generator), "noise": torch.rand(B, 16, generator=generator)}


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_without_labels_the_model_is_bit_identical_to_mae(ratio):
    ours, theirs = mae(label="none", mask_ratio=ratio).train(), mae(MAE, mask_ratio=ratio).train()
    theirs.load_state_dict(ours.state_dict())
    losses = [model(**mae_inputs()).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses) and gradients(ours).keys() == gradients(theirs).keys()
    assert all(torch.equal(gradient, gradients(theirs)[name]) for name, gradient in gradients(ours).items())
    torch.manual_seed(5)
    drawn = ours(mae_inputs()["images"]).loss
    torch.manual_seed(5)
    assert torch.equal(theirs(mae_inputs()["images"]).loss, drawn)  # it also draws the same patches as MAE
    assert ours(**mae_inputs()).metrics == {}


@pytest.mark.parametrize("label", LABELS)
def test_with_labels_half_the_position_loss_of_visible_tokens_is_added_to_maes_loss(label):
    model, inputs = mae(label=label), mae_inputs()
    theirs = mae(MAE)
    theirs.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")})
    output, pixels = model(**inputs), theirs(**inputs).loss.item()
    seen_BMD, cell_BM = output.named["encoded"][:, 1:], inputs["noise"].argsort(1)[:, :8]
    position = model.head.loss(seen_BMD, cell_BM).item()
    assert output.loss.item() == pytest.approx(pixels + 0.5 * position, abs=1e-6)
    assert output.metrics["position_loss"].item() == pytest.approx(position, abs=1e-6)
    assert output.metrics["position_top1"].item() == pytest.approx(100 * model.head.accuracy(seen_BMD, cell_BM).item())
    assert "position_top1" not in model.train()(**inputs).metrics


@pytest.mark.parametrize("label", LABELS)
def test_the_label_of_a_visible_token_is_its_position_in_any_order(label, monkeypatch):
    model, inputs, labels = mae(label=label), mae_inputs(), []
    monkeypatch.setattr(model.head, "loss", lambda x, y, f=model.head.loss: labels.append((x, y)) or f(x, y))
    first = model(**inputs)
    rank_BN = inputs["noise"].argsort(1).argsort(1)
    reversed_noise = torch.where(rank_BN < 8, -inputs["noise"], 2 + inputs["noise"])  # the same patches stay visible, in reverse order
    second = model(**inputs | {"noise": reversed_noise})
    (x, cells), (y, other) = labels
    assert torch.equal(other, cells.flip(1)) and not torch.equal(cells, torch.arange(8).expand(B, -1))
    assert torch.equal(cells, inputs["noise"].argsort(1)[:, :8])
    torch.testing.assert_close(y, x.flip(1), atol=1e-5, rtol=0)
    assert second.loss.item() == pytest.approx(first.loss.item(), abs=1e-5)
    # A token belongs to the pixels of its position: if one patch changes, its token changes most.
    place = 3
    images = inputs["images"].clone()
    for image, cell in zip(images, cells[:, place].tolist(), strict=True):
        image[:, 4 * (cell // 4) : 4 * (cell // 4) + 4, 4 * (cell % 4) : 4 * (cell % 4) + 4] += 5
    model(images, noise=inputs["noise"])
    assert ((labels[2][0] - x).norm(dim=-1).argmax(1) == place).all()


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.9, "mask_ratio=0.9 leaves 1 of 16 patches visible; use at least 2, but not all"),
        (0.0, "mask_ratio=0.0 leaves 16 of 16 patches"),
        (0.99, "mask_ratio=0.99 leaves none of the 16 tokens"),
        (1.5, "mask_ratio=1.5 is not a fraction between 0 and 1"),
    ],
)
def test_a_ratio_that_leaves_too_few_visible_or_no_masked_patches_is_refused(ratio, message):
    with pytest.raises(ValueError, match=message):
        mae(mask_ratio=ratio)


@pytest.mark.parametrize("options", [{"class_token": False}, {"position": "none"}])
def test_an_encoder_that_mae_refuses_is_also_refused_here(options):
    with pytest.raises(ValueError, match="needs an encoder with a position embedding and a class token"):
        PositionalMAE(ViT(image_size=16, patch_size=4, width=32, depth=2, heads=2, **options), **SIZES)


def test_the_exported_encoder_is_timms_vit_without_head_and_decoder(tmp_path):
    model = mae(label="relative")
    export_encoder(model.encoder, tmp_path / "encoder.safetensors")
    theirs = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    images, every = mae_inputs()["images"], torch.arange(16).expand(B, -1)
    torch.testing.assert_close(theirs.forward_features(images), model.encoder(images, every), atol=1e-5, rtol=0)


# ---- refused settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "sideways"}, "label='sideways' is not known; choose 'none', 'absolute' or 'relative'"),
        ({"label": "absolute", "queries": 3}, "queries=3 needs label='relative', but label is 'absolute'"),
        ({"label": "none", "queries": 3}, "queries=3 needs label='relative', but label is 'none'"),
        ({"queries": 0}, "queries=0 is less than 1"),
    ],
)
def test_an_impossible_label_or_number_of_queries_is_refused_with_its_value(options, message):
    for make in (model_of, mae):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_an_unknown_swin_option_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="swin='V2' is not known; choose 'plain' or 'released'"):
        model_of("swin", swin="V2")


def test_a_changed_image_size_is_refused_with_both_grids():
    model = PositionalLabel(prepared(timm.create_model("test_resnet", num_classes=0), (96, 96)), K).eval()
    assert model(pictures((96, 96))).named["tokens"].shape[1] == 9
    with pytest.raises(ValueError, match="the grid is 2 x 3, but was 3 x 3 at first; use images of one size"):
        model(pictures((64, 96)))
