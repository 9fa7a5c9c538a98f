"""Tests of timm's backbones in Positional Label: the order of the tokens, the released Swin, the compatibility with timm.

Shapes: B images, H x W cells, N = H * W tokens, C channels.
"""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import Nest, SwinTransformer, SwinTransformerV2, SwinTransformerV2Cr, VisionTransformer, VisionTransformerDistilled
from torch import Tensor, nn

from common.backbones import check_windows, feature_map, patch_tokens
from common.positions import Grid
from common.recipe import choose_arms
from positional_label.backbones import ReleasedBlock, release_swin
from positional_label.method import PositionalLabel
from positional_label.recipe import build, cifar10, digits
from tests.test_vit import redraw

VIT = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
SWIN = {"patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 0, "drop_path_rate": 0.0}
NEST = {"img_size": 32, "patch_size": 4, "num_levels": 2, "embed_dims": (16, 32), "num_heads": (2, 2), "depths": (1, 1), "num_classes": 0}


def prepared(encoder: nn.Module, size: Grid = (32, 32)) -> nn.Module:
    """Return the backbone with the attributes that a recipe sets."""
    encoder.channels, encoder.image_size = 3, size
    return encoder


def swin(**options) -> SwinTransformer:
    """A Swin with 8 x 8 cells in four windows, then 4 x 4 cells in one window."""
    return prepared(SwinTransformer(**{**SWIN, "img_size": 32, "window_size": 4, **options}))


def pictures(size: Grid = (32, 32), count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


def tokens_first(features: Tensor, row: int, column: int, grid: Grid, prefix: int = 0) -> Tensor:
    return features[:, prefix + row * grid[1] + column]


def channels_last(features: Tensor, row: int, column: int, grid: Grid) -> Tensor:
    return features[:, row, column]


def channels_first(features: Tensor, row: int, column: int, grid: Grid) -> Tensor:
    return features[:, :, row, column]


# Constructor, image size, grid, and the function that finds the token of a cell in the output of forward_features.
BACKBONES = {
    "vit": (lambda: VisionTransformer(**VIT), (32, 48), (2, 3), lambda *a: tokens_first(*a, prefix=1)),
    "vit_without_class_token": (
        lambda: VisionTransformer(**VIT, class_token=False, global_pool="avg", fc_norm=False),
        (32, 48),
        (2, 3),
        tokens_first,
    ),
    "vit_with_registers": (lambda: VisionTransformer(**VIT, reg_tokens=4), (32, 48), (2, 3), lambda *a: tokens_first(*a, prefix=5)),
    "deit_distilled": (lambda: VisionTransformerDistilled(**VIT), (32, 48), (2, 3), lambda *a: tokens_first(*a, prefix=2)),
    "swin": (lambda: SwinTransformer(**SWIN, img_size=(32, 48), window_size=2), (32, 48), (4, 6), channels_last),
    "swin_v2": (lambda: SwinTransformerV2(**SWIN, img_size=(32, 48), window_size=2), (32, 48), (4, 6), channels_last),
    "swin_v2_cr": (lambda: SwinTransformerV2Cr(**SWIN, img_size=(32, 48), window_size=2), (32, 48), (4, 6), channels_first),
    "nest": (lambda: Nest(**NEST), (32, 32), (4, 4), channels_first),
    "resnet": (lambda: timm.create_model("test_resnet", num_classes=0), (64, 96), (2, 3), channels_first),
    "resnet_of_two": (lambda: timm.create_model("test_resnet", num_classes=0), (32, 64), (1, 2), channels_first),
}


# ---- tokens in row-major order


@pytest.mark.parametrize("name", BACKBONES)
def test_tokens_are_in_row_major_order_for_every_layout(name):
    make, size, grid, token_of = BACKBONES[name]
    encoder = redraw(make())
    features = encoder.forward_features(pictures(size))
    tokens, found = patch_tokens(features, encoder)
    assert found == grid and tokens.shape == (2, grid[0] * grid[1], encoder.num_features)
    for row in range(grid[0]):
        for column in range(grid[1]):
            assert torch.equal(tokens[:, row * grid[1] + column], token_of(features, row, column, grid)), (row, column)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("axis", "edge"), [("rows", 0), ("rows", -1), ("columns", 0), ("columns", -1)])
def test_changing_an_edge_of_the_image_changes_mostly_the_tokens_of_that_edge(name, axis, edge):
    """Change a whole edge: NesT's convolutions and pooling spread a single cell to its neighbours, one of which may change most."""
    torch.manual_seed(0)
    make, size, grid, _ = BACKBONES[name]
    encoder, images, axis = make().eval(), pictures(size, 4), ("rows", "columns").index(axis)
    band = torch.arange(size[axis]) // (size[axis] // grid[axis]) == edge % grid[axis]
    changed = torch.where(band[:, None] if axis == 0 else band, pictures(size, 8)[4:], images)
    before, after = (patch_tokens(encoder.forward_features(x), encoder)[0].unflatten(1, grid) for x in (images, changed))
    moved = (after - before).square().sum((0, 2 - axis, 3))  # along the axis
    assert moved.argmax() == edge % grid[axis] and (grid[axis] == 1 or moved[edge] > 5 * moved[-1 - edge])


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_width_and_grid_are_found_without_changing_the_backbone(name, training):
    make, size, grid, _ = BACKBONES[name]
    encoder = prepared(make(), size).train(training)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert feature_map(encoder) == (encoder.num_features, grid) and encoder.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pit_s_224", r"PoolingVisionTransformer .* in \(1, 1, 576\)"),
        ("coat_tiny", "CoaT .* in a list"),
        ("volo_d1_224", r"VOLO .* in \(1, 197, 384\)"),
    ],
)
def test_a_backbone_without_a_feature_map_is_refused_with_its_class_and_output(name, found):
    with torch.device("meta"):
        encoder = prepared(timm.create_model(name, num_classes=0), (224, 224))
        with pytest.raises(ValueError, match=f"{found}, so its tokens have no positions to label; choose another backbone"):
            PositionalLabel(encoder, 10)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet", "test_vit"])
def test_adding_a_classifier_changes_nothing_else_in_the_backbone(name):
    encoder = redraw(timm.create_model(name, num_classes=0))
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    PositionalLabel(prepared(encoder, (160, 160)), 10)
    assert all(torch.equal(parameter, before[name]) for name, parameter in encoder.named_parameters() if name in before)
    added = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters() if name not in before}
    assert sorted(added.values(), key=len) == [(10,), (10, encoder.num_features)]


# ---- windows


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "vit_tiny_patch16_224"])
def test_windows_that_fit_every_stage_are_accepted(name):
    with torch.device("meta"):
        check_windows(timm.create_model(name, num_classes=0))


@pytest.mark.parametrize(("size", "window", "grid"), [(192, 7, 48), (256, 7, 64), (224, 8, 28), (384, 7, 96)])
def test_windows_that_do_not_fit_are_refused_and_fitting_ones_suggested(size, window, grid):
    with torch.device("meta"):
        make = dict(model_name="swin_tiny_patch4_window7_224", img_size=size, num_classes=0)
        with pytest.raises(ValueError, match=f"{window} x {window} do not fit a stage of {grid} x {grid} cells") as refusal:
            PositionalLabel(prepared(timm.create_model(**make, window_size=window), (size, size)), 10)
        offered = re.search("encoder.window_size=(.*) fits", str(refusal.value))[1].split(" or ")
        for fix in offered:
            check_windows(timm.create_model(**make, window_size=int(fix)))


def test_the_suggested_windows_are_the_nearest_and_no_larger_than_the_grid():
    with pytest.raises(ValueError, match="encoder.window_size=2 or 4 or 8 fits"):
        check_windows(swin(window_size=3))


def test_if_no_window_fits_the_error_asks_for_another_size():
    with torch.device("meta"), pytest.raises(ValueError, match="a stage of 74 x 74 cells; choose another image or patch size"):
        check_windows(swin(img_size=296))


# ---- the released Swin


def by_hand(block: ReleasedBlock, x_BHWC: Tensor, window: int, shift: int, heads: int) -> Tensor:
    """The official block: convolution, norm, attention per window with -100 between cells that only the shift joined, MLP."""
    (_, H, W, C), attn, mlp = x_BHWC.shape, block.attn, block.mlp
    conv = F.conv2d(x_BHWC.permute(0, 3, 1, 2), block.cpe.weight, block.cpe.bias, padding=1, groups=C)
    x_BHWC = x_BHWC + conv.permute(0, 2, 3, 1)
    y_BHWC = F.layer_norm(x_BHWC, (C,), block.norm1.weight, block.norm1.bias).roll((-shift, -shift), (1, 2))
    region_HW = torch.zeros(H, W)
    if shift:
        parts = (slice(-window), slice(-window, -shift), slice(-shift, None))
        for number, (rows, columns) in enumerate((a, b) for a in parts for b in parts):
            region_HW[rows, columns] = number
    out_BHWC = torch.zeros_like(y_BHWC)
    for top in range(0, H, window):
        for left in range(0, W, window):
            rows, columns = slice(top, top + window), slice(left, left + window)
            region_T = region_HW[rows, columns].flatten()
            mask_TT = -100.0 * (region_T[:, None] != region_T[None])
            qkv = y_BHWC[:, rows, columns].flatten(1, 2) @ attn["qkv"].weight.T + attn["qkv"].bias
            outputs = []
            for head in range(heads):
                q, k, v = (part[..., head * C // heads : (head + 1) * C // heads] for part in qkv.split(C, -1))
                outputs.append((q * (C // heads) ** -0.5 @ k.mT + mask_TT).softmax(-1) @ v)
            attended = torch.cat(outputs, -1) @ attn["proj"].weight.T + attn["proj"].bias
            out_BHWC[:, rows, columns] = attended.unflatten(1, (window, window))
    x_BHWC = x_BHWC + out_BHWC.roll((shift, shift), (1, 2))
    hidden = F.gelu(F.layer_norm(x_BHWC, (C,), block.norm2.weight, block.norm2.bias) @ mlp.fc1.weight.T + mlp.fc1.bias)
    return x_BHWC + hidden @ mlp.fc2.weight.T + mlp.fc2.bias


@pytest.mark.parametrize("index", [0, 1])
def test_a_released_block_equals_the_official_one_with_and_without_shift(index):
    encoder = swin()
    release_swin(encoder, keep_grid=False)
    block, shift = redraw(encoder).layers[0].blocks[index], (0, 2)[index]
    assert block.shift == (shift, shift)
    x = torch.randn(3, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = by_hand(block, x, window=4, shift=shift, heads=2)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=0)
    assert (by_hand(block, x, window=4, shift=2 - shift, heads=2) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("keep_grid", [False, True])
def test_the_released_swin_has_no_relative_bias_and_a_depthwise_convolution_in_every_block(keep_grid):
    encoder = swin()
    blocks = {name: block.dim for name, block in encoder.named_modules() if name.endswith((".blocks.0", ".blocks.1"))}
    before = set(encoder.state_dict())
    release_swin(encoder, keep_grid)
    after = encoder.state_dict()
    assert len(blocks) == 4 and not [name for name in after if "relative_position" in name]
    assert before - set(after) == {f"{name}.attn.relative_position_bias_table" for name in blocks}
    assert set(after) - before == {f"{name}.cpe.{kind}" for name in blocks for kind in ("weight", "bias")}
    for name, channels in blocks.items():
        own = {key: tensor for key, tensor in after.items() if key.startswith(f"{name}.cpe.")}
        assert own[f"{name}.cpe.weight"].shape == (channels, 1, 3, 3)
        assert sum(tensor.numel() for tensor in own.values()) == 9 * channels + channels


def test_with_keep_grid_the_last_stage_is_one_window_with_full_attention():
    encoder = swin(depths=(1, 2))
    release_swin(encoder, keep_grid=True)
    last = redraw(encoder).layers[-1]
    assert last.downsample.reduction.weight.shape == (32, 16) and last.downsample.norm.weight.shape == (16,)
    x = torch.randn(1, 8, 8, 32, generator=torch.Generator().manual_seed(0))
    for block in last.blocks:
        assert (block.window, block.shift, block.visible_WTT) == ((8, 8), (0, 0), None)
        torch.testing.assert_close(block(x), by_hand(block, x, window=8, shift=0, heads=2), atol=1e-5, rtol=0)
        moved = x.clone()
        moved[0, 7, 7] += 1
        assert ((block(moved) - block(x)).abs().amax(-1) > 0).all()
    assert feature_map(encoder) == (32, (8, 8))


def test_the_released_swin_in_bf16_stays_close_to_float32():
    encoder = swin()
    release_swin(encoder, keep_grid=False)
    images = pictures()
    expected = redraw(encoder).forward_features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder.forward_features(images)
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("make", [lambda: VisionTransformer(**VIT), lambda: SwinTransformerV2(**SWIN, img_size=32, window_size=4)])
def test_the_released_swin_is_refused_for_another_backbone(make):
    encoder = prepared(make(), (32, 48))
    with pytest.raises(ValueError, match=f"this is a {type(encoder).__name__}; use swin='plain'"):
        PositionalLabel(prepared(encoder), 10, swin="released")


# ---- compatibility with timm


def test_a_plain_swin_equals_timms_bit_for_bit():
    model = redraw(PositionalLabel(swin(), 10))
    theirs = SwinTransformer(**{**SWIN, "num_classes": 10}, img_size=32, window_size=4).eval()
    theirs.load_state_dict(model.encoder.state_dict())
    images = pictures()
    assert torch.equal(model(images).named["logits"], theirs(images))
    assert torch.equal(model(images).named["tokens"], theirs.forward_features(images).flatten(1, 2))


@pytest.mark.parametrize("label", ["none", "absolute", "relative"])
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "nest_tiny"],
)
def test_an_encoder_has_exactly_the_parameters_of_timms_model(name, label):
    with torch.device("meta"):
        model = PositionalLabel(prepared(timm.create_model(name, num_classes=0), (224, 224)), 10, label=label)
        theirs = timm.create_model(name, num_classes=10)
        theirs.load_state_dict(model.encoder.state_dict())
    count = [sum(parameter.numel() for parameter in module.parameters()) for module in (model.encoder, theirs, model)]
    assert count[0] == count[1] and (count[2] == count[1]) == (label == "none")


PLAIN = {
    f"{recipe.__name__}-{arm}": own
    for recipe in (digits, cifar10)
    for arm, own in choose_arms(recipe()).items()
    if not arm.startswith("swin_released") and (recipe is digits or arm.endswith("+rpl"))
}


@pytest.mark.parametrize("name", PLAIN)
def test_timms_model_with_the_weights_of_an_arm_gives_the_same_logits(name):
    own = PLAIN[name]
    model = redraw(build(own, own.build_encoder(3), 10))
    options = own.encoder | {"img_size": own.image_size, "patch_size": own.patch_size, "num_classes": 10}
    theirs = getattr(timm.models, own.size)(**options).eval()
    theirs.load_state_dict(model.encoder.state_dict())
    images = pictures((own.image_size, own.image_size))
    assert torch.equal(theirs(images), model(images).named["logits"])
