"""Tests of the location probe: what the tokens after each block tell about the cells of their patches."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from common.data import Data, Split, open_data
from common.evaluate import Result, TokenEncoder, evaluate
from common.evaluate.frozen import fit_logistic, standardise
from common.evaluate.location import LocationProbe, drawn, fit_cells
from common.evaluate.shuffle import move_patches
from common.recipe import LOCATION, Protocol, RecipeError
from common.run import RunError
from common.train import make_fabric
from common.vit import ViT

SIDE = 4  # the grid has SIDE x SIDE cells of 2 x 2 pixels


@pytest.fixture(scope="module")
def digits() -> Data:
    whole = open_data("digits")
    return replace(whole, train=whole.train.subset(range(60)), val=whole.val.subset(range(30)))


def encoder(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"image_size": 8, "patch_size": 2, "channels": 1, "width": 32, "depth": 2, "heads": 2} | options)


def probe(model: nn.Module, data: Data, protocol: Protocol = LOCATION, precision: str = "32-true", **options) -> list[Result]:
    return evaluate(model, data, protocol, fabric=make_fabric("cpu", precision), **options)


def top1(*found: object, **options) -> list[float]:
    return [one.top1 for one in probe(*found, **options)]


def with_images(data: Data, change) -> Data:
    """The data with other images, change(images)."""
    parts = [Split(split.labels, change(split.images), class_names=split.class_names) for split in (data.train, data.val)]
    return replace(data, train=parts[0], val=parts[1])


def flat(images: Tensor) -> Tensor:
    """Images of one grey level each, so that all patches of an image are equal."""
    return (torch.arange(len(images)) * 37 % 256).to(torch.uint8)[:, None, None, None].expand_as(images).contiguous()


def numbered(images: Tensor) -> Tensor:
    """Images in which the grey level of a patch tells its cell."""
    cells = torch.arange(SIDE * SIDE).view(SIDE, SIDE).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return (10 * cells).to(torch.uint8).expand_as(images).contiguous()


# ---- exact results


@pytest.mark.parametrize("position", ["sincos", "learned"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_tokens_that_are_only_position_embeddings_tell_every_cell(position, precision, digits):
    model = encoder(position=position)
    with torch.no_grad():
        for parameter in (model.patch_embed.proj.weight, model.patch_embed.proj.bias):
            parameter.zero_()
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
    assert top1(model, digits, precision=precision) == [100, 100]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("change", [flat, torch.zeros_like])
def test_without_positions_equal_patches_give_exactly_chance(change, precision, digits):
    model = encoder(position="none")
    for name, one in (("ours", model), ("user", Pixels())):
        assert top1(one, with_images(digits, change), precision=precision) == [100 / 16] * 2, name


class Pixels(nn.Module):
    """A user's encoder: two blocks that return the pixels of each patch, by the interface of timm."""

    num_prefix_tokens = 0

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, images: Tensor) -> Tensor:
        return images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3)[:, 0]

    def forward_intermediates(self, images: Tensor, indices: int, **_: object) -> list:
        return [(self(images), None)] * indices


def test_the_accuracy_on_permuted_test_patches_is_the_share_of_patches_that_stay(digits):
    """The classifiers know the cell of each patch from its grey level."""
    known = with_images(digits, numbered)
    model = encoder(position="none", depth=1, class_token=False)
    with torch.no_grad():
        for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
            layer.weight.zero_()  # each token shows only its own patch
    order = torch.arange(16)
    order[[0, 3, 5, 10]] = order[[3, 0, 10, 5]]
    moved = move_patches(known.val.images, order.expand(len(known.val), -1), (2, 2))
    for shown, expected in ((known.val.images, 100), (moved, 75)):
        data = replace(known, val=Split(known.val.labels, shown, class_names=known.val.class_names))
        assert top1(model, data) == [expected]


def test_the_class_token_is_not_probed_and_the_results_are_in_the_order_of_the_blocks(digits):
    """Positions are added after the first block, and the class token is unlike the others."""
    plain = torch.zeros(1, SIDE * SIDE + 1, 32)
    plain[0, 1:] = torch.eye(SIDE * SIDE, 32)
    plain[0, 0] = 1000

    class Add(nn.Module):
        def forward(self, x: Tensor, keys: int | None = None) -> Tensor:
            return x + plain

    model = encoder(position="none")
    model.blocks = nn.Sequential(Same(), Add())
    found = probe(model, with_images(digits, flat))
    assert [(one.protocol, one.top1) for one in found] == [("location_1", 6.25), ("location_2", 100)]


class Same(nn.Module):
    def forward(self, x: Tensor, keys: int | None = None) -> Tensor:
        return x


# ---- the fit


def test_the_weights_minimise_the_same_objective_as_logistic_regression():
    g = torch.Generator().manual_seed(0)
    cell_R = torch.arange(7).repeat(40)
    token_RD = (torch.randn(7, 10, generator=g)[cell_R] + torch.randn(280, 10, generator=g)) @ torch.randn(10, 10, generator=g)
    token_RD, _ = standardise(token_RD, token_RD)
    for l2 in (0.1, 1.0, 30.0):
        (found, converged), (expected, _) = fit_cells(token_RD, cell_R, 7, l2), fit_logistic(token_RD, cell_R, 7, l2)
        assert converged
        torch.testing.assert_close(found.double(), expected.T, atol=0.01 * expected.abs().max().item(), rtol=0)


def test_a_fit_without_convergence_is_reported(digits, monkeypatch):
    monkeypatch.setitem(fit_cells.__globals__, "ITERATIONS", 2)
    assert [one.converged for one in probe(encoder(), digits)] == [False, False]
    monkeypatch.undo()
    assert [one.converged for one in probe(encoder(), digits)] == [True, True]


def test_the_probe_leaves_the_encoder_and_torchs_generator_unchanged(digits):
    model = encoder().train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    first = top1(model, digits)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters()) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert top1(model.eval(), digits) == first


def test_the_result_does_not_depend_on_the_batch(digits):
    assert top1(encoder(), digits, batch_size=7) == pytest.approx(top1(encoder(), digits), abs=0.5)


# ---- images and settings


def test_a_result_says_its_images_tokens_penalty_and_chance(digits):
    (*_, found) = probe(encoder(), digits, replace(LOCATION, images=20))
    assert found.settings == "images=20 tokens=320 test_tokens=320 l2=1.0 chance=6.25"
    (*_, every) = probe(encoder(), digits, replace(LOCATION, images=None))
    assert every.settings == "images=60 tokens=960 test_tokens=480 l2=1.0 chance=6.25"
    assert found.top1 < found.top5 <= 100 and 0 < found.hours < 1


def test_the_images_are_drawn_with_the_label_seed_and_fewer_are_among_more(digits):
    few, more, other = (drawn(digits.train, count, seed, 0).images for count, seed in ((5, 3), (20, 3), (20, 4)))
    shown = [{image.numpy().tobytes() for image in images} for images in (few, more, other)]
    assert shown[0] < shown[1] != shown[2]
    fixed = replace(LOCATION, images=20, label_seed=3)
    assert top1(encoder(), digits, fixed, seed=0) == top1(encoder(), digits, fixed, seed=1)
    assert top1(encoder(), digits, replace(LOCATION, images=20), seed=3) == top1(encoder(), digits, fixed, seed=0)
    assert drawn(digits.train, 60, 3, 0) is drawn(digits.train, None, 3, 0) is digits.train


@pytest.mark.parametrize("images", [0, -1])
def test_an_impossible_number_of_images_is_refused(images):
    with pytest.raises(RecipeError, match=f"protocol location: images={images} .* from 1 up"):
        replace(LOCATION, images=images)


def test_tokens_that_are_not_finite_are_refused(digits):
    model = encoder()
    with torch.no_grad():
        model.norm.bias[3] = math.nan
    with pytest.raises(RunError, match="features of 60 of 60 images are not finite"):
        probe(model, digits)


# ---- encoders


def test_timms_vit_and_ours_with_the_same_weights_have_the_same_results(digits):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, depth=3, num_classes=0)
    ours = ViT(image_size=8, patch_size=2, channels=1, width=192, depth=3, heads=3, position="learned")
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        theirs.pos_embed.zero_(), ours.pos_embed.zero_()  # else every cell is told
    found = top1(theirs, digits)
    assert found == pytest.approx(top1(ours, digits), abs=1) and len(found) == 3 and max(found) < 80


@pytest.mark.parametrize("position", ["relative", "none"])
def test_encoders_without_position_embeddings_can_be_probed(position, digits):
    assert len(top1(encoder(position=position), digits)) == 2


class Pooled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Blocks(Pooled):
    """Blocks whose outputs cannot be read."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (Pooled, 8, "Pooled has no `blocks`, so only its last layer can be read"),
        (Blocks, 8, "the blocks of Blocks cannot be read .*forward_intermediates"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", in_chans=1, img_size=64, depths=(1, 1)),
            64,
            "SwinTransformer has no `blo",
        ),
        (lambda: timm.create_model("resnet18", in_chans=1), 64, "ResNet has no `blocks`"),
        (lambda: timm.create_model("efficientnet_b0", in_chans=1), 64, "the blocks of EfficientNet cannot be read"),
        (lambda: encoder(patch_size=8), 8, "ViT has a single patch, .*smaller patches"),
    ],
)
def test_an_encoder_without_a_grid_of_tokens_after_each_block_is_refused_with_what_is_missing(make, size, message, digits):
    with pytest.raises(ValueError, match=message):
        probe(make(), digits, image_size=(size, size))


def test_raw_pixels_have_no_blocks(digits):
    with pytest.raises(ValueError, match="protocol location: location needs an encoder"):
        probe(None, digits)


def test_a_probe_that_is_not_fitted_has_equal_logits():
    model = LocationProbe(TokenEncoder(Pixels(), 1, (8, 8)))
    assert (model.depth, model.cells) == (2, 16)
    assert (model(torch.randn(3, 1, 8, 8)).named["logits"] == torch.zeros(2, 48, 16)).all()
