"""The backbone of benchmarks/detection."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.detection.vitdet import LEVELS, RelativePositions, SimpleFeaturePyramid, WindowedViT, windowed_attention
from common.recipe import RecipeError
from common.vit import Attention, vit


def plain_attention(attention: Attention, x_ND: torch.Tensor, cells: list[tuple[int, int]], relative: RelativePositions | None):
    """Attention of a few tokens, one query and one head at a time."""
    q, k, v = attention.qkv(x_ND).view(len(x_ND), 3, attention.heads, -1).unbind(1)
    out = torch.zeros_like(q)
    for head in range(attention.heads):
        for i, (y, x) in enumerate(cells):
            scores = k[:, head] @ q[i, head] / q.shape[2] ** 0.5
            if relative is not None:
                side = (len(relative.rows) + 1) // 2
                for j, (row, column) in enumerate(cells):
                    scores[j] += q[i, head] @ relative.rows[y - row + side - 1] + q[i, head] @ relative.columns[x - column + side - 1]
            out[i, head] = scores.softmax(0) @ v[:, head]
    return attention.proj(out.flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("with_relative", [False, True])
def test_attention_in_windows_is_attention_of_each_window_with_zeros_around_the_map(with_relative):
    torch.manual_seed(0)
    attention, x_BhwD, side = Attention(12, 2), torch.randn(2, 5, 4, 12), 3
    relative = RelativePositions(attention, (side, side)) if with_relative else None
    for parameter in relative.parameters() if relative else []:
        nn.init.normal_(parameter)
    found = windowed_attention(attention, x_BhwD, side, relative)
    padded = torch.zeros(2, 6, 6, 12)
    padded[:, :5, :4] = x_BhwD
    cells = [(row, column) for row in range(side) for column in range(side)]
    for image in range(2):
        for top in (0, 3):
            for left in (0, 3):
                tokens = padded[image, top : top + side, left : left + side].reshape(-1, 12)
                padded[image, top : top + side, left : left + side] = plain_attention(attention, tokens, cells, relative).view(
                    side, side, 12
                )
    torch.testing.assert_close(found, padded[:, :5, :4])


@torch.no_grad()
def test_relative_positions_from_zero_change_nothing():
    torch.manual_seed(0)
    attention, x = Attention(12, 2), torch.randn(1, 4, 4, 12)
    relative = RelativePositions(attention, (4, 4))
    torch.testing.assert_close(windowed_attention(attention, x, None, relative), windowed_attention(attention, x, None))


@torch.no_grad()
def test_with_one_window_the_map_is_that_of_the_encoder_without_its_class_token_and_norm():
    torch.manual_seed(0)
    encoder = vit("micro", image_size=64, class_token=False)
    images = torch.randn(2, 3, 64, 64)
    encoder.norm = nn.Identity()
    expected = encoder(images).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(WindowedViT(encoder, window=4, relative_positions=False)(images), expected)


def test_global_blocks_are_the_last_of_each_quarter():
    for depth, expected in ((12, {2, 5, 8, 11}), (24, {5, 11, 17, 23}), (4, {0, 1, 2, 3})):
        assert WindowedViT(vit("micro", depth=depth, image_size=64)).global_blocks == expected


@torch.no_grad()
def test_the_pyramid_has_strides_4_to_64_also_for_an_image_of_another_size():
    pyramid = SimpleFeaturePyramid(WindowedViT(vit("micro", image_size=128), window=3), channels=8)
    for height, width in ((128, 128), (192, 64)):
        maps = pyramid(torch.randn(1, 3, height, width))
        strides = dict(zip(LEVELS, (4, 8, 16, 32, 64), strict=True))
        assert {name: tuple(own.shape) for name, own in maps.items()} == {
            name: (1, 8, height // stride, width // stride) for name, stride in strides.items()
        }


def test_every_parameter_gets_a_gradient_also_with_recomputed_blocks():
    gradients = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = vit("micro", image_size=128, position="learned", grad_checkpointing=grad_checkpointing)
        pyramid = SimpleFeaturePyramid(WindowedViT(encoder, window=3), channels=8)
        sum(own.square().sum() for own in pyramid(torch.randn(1, 3, 128, 128)).values()).backward()
        assert not [name for name, parameter in pyramid.named_parameters() if parameter.grad is None]
        gradients.append(pyramid.net.relative[0].rows.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"patch_size": 8}, {}, "patches of 8 pixels: detection needs 16"),
        ({"position": "relative"}, {}, "do not fit windows"),
        ({}, {"window": 0}, "window=0"),
        ({}, {"global_blocks": 9}, "has 6 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(options, settings, message):
    with pytest.raises(RecipeError, match=message):
        WindowedViT(vit("micro", **{"image_size": 64} | options), **settings)


def test_an_image_that_is_no_multiple_of_a_patch_is_refused():
    with pytest.raises(ValueError, match="100 x 64 pixels are no multiple of a patch"):
        WindowedViT(vit("micro", image_size=64))(torch.zeros(1, 3, 100, 64))


@torch.no_grad()
@pytest.mark.parametrize(("window", "with_relative"), [(4, False), (4, True), (7, True)])
def test_maps_match_those_of_detectron2_with_the_same_weights(window, with_relative):
    """16 x 16 patches: windows of 4 fit, windows of 7 are padded."""
    d2 = pytest.importorskip("detectron2.modeling.backbone.vit", reason="detectron2 is not installed: benchmarks/detection/README.md")
    fpn = pytest.importorskip("detectron2.modeling.backbone.fpn")
    torch.manual_seed(0)
    encoder = vit("tiny", image_size=256, position="learned")
    own = SimpleFeaturePyramid(WindowedViT(encoder, window, relative_positions=with_relative)).eval()
    for parameter in own.net.relative.parameters() if with_relative else []:
        nn.init.normal_(parameter, std=0.1)
    net = d2.ViT(
        img_size=256,
        embed_dim=192,
        depth=12,
        num_heads=3,
        window_size=window,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=[number for number in range(12) if number not in own.net.global_blocks],
        use_rel_pos=with_relative,
        pretrain_img_size=256,
        pretrain_use_cls_token=False,
        out_feature="last_feat",
    )
    scales, top = (4.0, 2.0, 1.0, 0.5), fpn.LastLevelMaxPool()
    other = d2.SimpleFeaturePyramid(net, "last_feat", 256, scales, top, norm="LN", square_pad=256).eval()
    weights = own.state_dict()
    renamed = {name: weight for name, weight in weights.items() if name.startswith("net.") and ".relative." not in name}
    for number in range(12 if with_relative else 0):
        for ours, theirs in (("rows", "h"), ("columns", "w")):
            renamed[f"net.blocks.{number}.attn.rel_pos_{theirs}"] = weights[f"net.relative.{number}.{ours}"]
    for level in range(4):  # a level's parameters are in the same order
        theirs = [name for name in other.state_dict() if name.startswith(f"simfp_{level + 2}.")]
        renamed |= zip(theirs, own.levels[level].state_dict().values(), strict=True)
    other.load_state_dict(renamed)
    images = torch.randn(2, 3, 256, 256)
    found, expected = own(images), other(images)
    for name in LEVELS:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5 * expected[name].abs().max().item())
