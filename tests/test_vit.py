"""Tests of the Vision Transformer: equal to timm's, on all tokens or on a kept subset."""

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.vit import SIZES, Block, ViT, patchify, vit
from droppos.method import DropPos

SMALL = {"image_size": (32, 48), "patch_size": 16, "width": 24, "depth": 2, "heads": 2}
TIMM_SMALL = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


def redraw(model: nn.Module) -> nn.Module:
    """Return the model with random parameters (no zeros, no gains of one), in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = 100 if parameter.ndim == 1 or name in ("cls_token", "pos_embed") else 2 * parameter[0].numel()
        parameter.data = noise / math.sqrt(fan_in) + ("norm" in name and name.endswith("weight"))
    return model.eval()


def noise_images(count: int = 2, size: tuple[int, int] = (32, 48), seed: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def choice(count: int, of: int, images: int = 2) -> Tensor:
    """`count` distinct indices per image, in random order."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(images, of, generator=generator).argsort(1)[:, :count]


def like(theirs: VisionTransformer, **options) -> ViT:
    """Our small ViT with the weights of timm's; all names and shapes must match."""
    ours = ViT(**SMALL, **{"position": "learned", **options})
    ours.load_state_dict(theirs.state_dict())
    return ours.eval()


# ---- timm's network


@pytest.mark.parametrize("size", ["tiny", "small", pytest.param("base", marks=pytest.mark.slow)])
def test_weights_load_into_timm_and_back_and_the_tokens_are_equal(size):
    theirs = redraw(timm.create_model(f"vit_{size}_patch16_224", num_classes=0, weight_init="skip"))
    ours, images = vit(size, position="learned").eval(), noise_images(1, (224, 224))
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-5, rtol=0)
    theirs.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())


def test_a_non_square_image_gives_the_same_tokens_as_timm():
    theirs = redraw(VisionTransformer(**TIMM_SMALL))
    ours = like(theirs)
    assert ours.grid == (2, 3)
    torch.testing.assert_close(ours(noise_images()), theirs.forward_features(noise_images()), atol=1e-5, rtol=0)


def test_without_a_class_token_the_tokens_equal_timms_patch_tokens():
    theirs = redraw(VisionTransformer(**TIMM_SMALL, class_token=False, global_pool="avg", fc_norm=False))
    ours = like(theirs, class_token=False)
    tokens = ours(noise_images())
    assert tokens.shape == (2, 6, 24) and "cls_token" not in ours.state_dict()
    torch.testing.assert_close(tokens, theirs.forward_features(noise_images()), atol=1e-5, rtol=0)


def test_layer_scale_has_timms_names_and_effect():
    theirs = redraw(VisionTransformer(**TIMM_SMALL, init_values=0.1))
    ours = like(theirs, layer_scale=0.1)
    assert {"blocks.0.ls1.gamma", "blocks.1.ls2.gamma"} <= ours.state_dict().keys()
    torch.testing.assert_close(ours(noise_images()), theirs.forward_features(noise_images()), atol=1e-5, rtol=0)
    fresh = ViT(**SMALL, layer_scale=0.1)
    assert all((gamma == 0.1).all() for name, gamma in fresh.named_parameters() if name.endswith("gamma"))


# ---- a kept subset


def test_encoding_kept_patches_equals_timm_on_the_gathered_embeddings():
    theirs = redraw(VisionTransformer(**TIMM_SMALL))
    keep = choice(4, of=6)
    embedded = theirs.patch_embed(noise_images()) + theirs.pos_embed[:, 1:]
    x = embedded.gather(1, keep[..., None].expand(-1, -1, 24))
    x = torch.cat([(theirs.cls_token + theirs.pos_embed[:, :1]).expand(2, -1, -1), x], 1)
    expected = theirs.norm(theirs.blocks(x))
    torch.testing.assert_close(like(theirs)(noise_images(), keep), expected, atol=1e-5, rtol=0)


def test_the_embedding_of_a_kept_patch_does_not_depend_on_the_other_patches():
    model, keep = redraw(ViT(**SMALL)), choice(4, of=6)
    of_all = model.embed(noise_images()).gather(1, keep[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(model.embed(noise_images(), keep), of_all, atol=1e-6, rtol=0)


def test_the_order_of_kept_patches_only_permutes_the_tokens():
    model, order = redraw(ViT(**SMALL, position="learned")), choice(6, of=6)
    plain, permuted = model(noise_images()), model(noise_images(), order)
    assert (order != torch.arange(6)).any(1).all()
    torch.testing.assert_close(permuted[:, 0], plain[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(permuted[:, 1:], plain[:, 1:].gather(1, order[..., None].expand(-1, -1, 24)), atol=1e-5, rtol=0)


def test_pixels_of_removed_patches_do_not_change_the_output():
    model, images = redraw(ViT(**SMALL)), noise_images()
    keep, hidden = choice(6, of=6)[:, :4], choice(6, of=6)[:, 4:]
    changed = images.clone()
    for image, cells in zip(changed, hidden.tolist(), strict=True):
        for cell in cells:
            row, column = divmod(cell, 3)
            image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 7.0
    assert not torch.equal(model(changed), model(images))
    assert torch.equal(model(changed, keep), model(images, keep))


def test_patches_are_in_row_major_order_with_pixels_in_the_order_of_a_convolution():
    patches = patchify(noise_images(), 16)
    assert patches.shape == (2, 6, 3 * 16 * 16)
    assert torch.equal(patches[1, 5], noise_images()[1, :, 16:, 32:].flatten())


# ---- positions, drop path


def test_the_sine_cosine_table_is_saved_but_not_trained():
    model = ViT(**SMALL)
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())
    assert (model.pos_embed[:, 0] == 0).all() and (model.patch_positions != 0).any(-1).all()
    assert "pos_embed" in dict(ViT(**SMALL, position="learned").named_parameters())


def test_without_positions_permuted_patches_give_the_same_class_token():
    model, order = redraw(ViT(**SMALL, position="none")), choice(6, of=6)
    assert "pos_embed" not in model.state_dict()
    moved = patchify(noise_images(), 16).gather(1, order[..., None].expand(-1, -1, 768))
    images = moved.view(2, 2, 3, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 48)
    torch.testing.assert_close(model(images)[:, 0], model(noise_images())[:, 0], atol=1e-5, rtol=0)
    placed = redraw(ViT(**SMALL))
    assert (placed(images)[:, 0] - placed(noise_images())[:, 0]).abs().max() > 1e-3


def test_drop_path_is_active_only_in_training_and_increases_with_depth():
    options = {**SMALL, "depth": 4}
    plain, dropping = redraw(ViT(**options)), redraw(ViT(**options, drop_path=0.6))
    dropping.load_state_dict(plain.state_dict())
    images = noise_images(16)
    assert torch.equal(dropping(images), plain(images))
    assert torch.equal(plain.train()(images), plain.eval()(images))
    dropping.train()
    assert not torch.equal(dropping(images), dropping(images))
    assert [block.drop_path.drop_prob for block in dropping.blocks] == pytest.approx([0, 0.2, 0.4, 0.6])


def test_a_new_encoder_is_initialised_as_in_mae():
    torch.manual_seed(0)
    model = vit("micro", position="learned")
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2} | {"patch": model.patch_embed.proj.weight.flatten(1)}
    for name, matrix in matrices.items():
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < matrix.abs().max() <= bound, name
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert (parameter == 0).all(), name
    assert (model.patch_embed.proj.bias != 0).all()
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2) and model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


# ---- sizes


@pytest.mark.parametrize(
    ("size", "patch", "decoder_depth", "millions"),
    [
        ("small", 16, 2, 28.27),
        ("base", 16, 2, 92.60),
        ("base", 16, 8, 111.51),
        ("base", 32, 2, 94.18),
        ("large", 16, 2, 310.23),
        ("huge", 14, 8, 656.77),
    ],
)
def test_droppos_has_the_official_number_of_parameters(size, patch, decoder_depth, millions):
    with torch.device("meta"):
        model = DropPos(vit(size, patch_size=patch), decoder_depth=decoder_depth)
    trainable = sum(p.numel() for p in model.parameters())
    assert round((trainable + model.encoder.pos_embed.numel()) / 1e6, 2) == millions
    if (size, patch, decoder_depth) == ("base", 16, 2):
        assert round(trainable / 1e6, 2) == 92.45


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_named_sizes_equal_those_of_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(f"vit_{name}_patch16_224", num_classes=0)
    assert SIZES[name] == (theirs.embed_dim, len(theirs.blocks), theirs.blocks[0].attn.num_heads)


def test_an_image_size_that_is_not_a_multiple_of_the_patch_size_is_refused():
    with pytest.raises(ValueError, match="224 x 220 .* 16"):
        vit("micro", image_size=(224, 220))
    with pytest.raises(ValueError, match="8 x 8 .* 16"):
        vit("micro", image_size=8)


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'giant'.*micro, tiny, small, base, large, huge"):
        vit("giant")


def test_an_unknown_position_embedding_is_refused():
    with pytest.raises(ValueError, match="position='rotary'.*sincos.*learned.*none"):
        ViT(**SMALL, position="rotary")


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 24 .* heads 5"):
        ViT(**{**SMALL, "heads": 5})


@pytest.mark.parametrize("shape", [(2, 3, 48, 32), (2, 1, 32, 48)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(3, 32, 48\)"):
        ViT(**SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("keys", [None, 3])
def test_a_block_with_only_the_last_queries_has_the_same_outputs_and_gradients(keys):
    torch.manual_seed(0)
    block, x = Block(16, 2, layer_scale=0.5), torch.randn(2, 7, 16)
    results = []
    for part in (lambda x: block(x, keys)[:, -4:], lambda x: block(x, keys, queries=4)):
        block.zero_grad()
        given = x.clone().requires_grad_()
        y = part(given)
        y.square().sum().backward()
        results.append([y, given.grad, *(parameter.grad for parameter in block.parameters())])
    assert results[1][0].shape == (2, 4, 16)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
