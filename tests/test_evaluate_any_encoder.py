"""`evaluate` accepts our encoders, timm's and a user's, on any data, without a recipe and without a run."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from common.data import open_data
from common.evaluate import PROTOCOLS, evaluate, knn_accuracy
from common.recipe import Protocol, RecipeError, TrainConfig
from common.train import make_fabric
from common.vit import vit

STAGE = TrainConfig(epochs=1, batch_size=64, base_lr=0.01)


@pytest.fixture(scope="module")
def data():
    whole = open_data("digits")
    return replace(whole, train=whole.train.subset(range(200)), val=whole.val.subset(range(100)))


@pytest.fixture(scope="module")
def fabric():
    return make_fabric("cpu", "32-true")


def timms(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, depth=3, **options)


class Pixels(nn.Module):
    """A user's encoder that returns features (B, D) and has no parameters."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_k_nn_on_timms_vit_uses_the_mean_of_its_patch_tokens(data, fabric):
    encoder = timms().eval()
    (found,) = evaluate(encoder, data, "knn", fabric=fabric)

    def features(split) -> tuple[Tensor, Tensor]:
        images = (split.images / 255 - data.mean[0]) / data.std[0]
        with torch.no_grad():
            return encoder.forward_features(images)[:, 1:].mean(1), split.labels

    assert found.top1 == knn_accuracy(*features(data.train), *features(data.val), classes=10)
    assert found.settings == "layers=last pool=mean neighbours=20 temperature=0.07"


def test_a_timm_vit_and_ours_with_the_same_weights_have_the_same_results(data, fabric):
    theirs = timms(num_classes=0)
    ours = vit("tiny", image_size=8, patch_size=2, channels=1, depth=3, position="learned")
    ours.load_state_dict(theirs.state_dict())
    probe = Protocol(name="linear", kind="linear", stage=STAGE, layers=(1, 2))
    tuned = Protocol(name="finetune", kind="finetune", stage=replace(STAGE, layer_decay=0.7))
    for protocol in (PROTOCOLS["knn"], PROTOCOLS["logistic"], probe, tuned):
        found = []
        for encoder in (theirs, ours):
            torch.manual_seed(0)
            found.append([(one.protocol, one.top1, one.settings) for one in evaluate(encoder, data, protocol, fabric=fabric)])
        names = [[name for name, *_ in one] for one in found]
        assert names[0] == names[1]
        assert [top1 for _, top1, _ in found[0]] == pytest.approx([top1 for _, top1, _ in found[1]], abs=2)  # one image is 1 %


def test_a_users_module_that_returns_pixels_scores_like_raw_pixels(data, fabric):
    (own,), (pixels,) = evaluate(Pixels(), data, "knn", fabric=fabric), evaluate(None, data, "knn", fabric=fabric)
    assert own.top1 == pixels.top1 > 85


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18"])
def test_a_feature_map_is_a_grid_of_tokens(name, fabric):
    whole = open_data("digits")
    data = replace(whole, train=whole.train.subset(range(40)), val=whole.val.subset(range(20)))
    options = {"img_size": 64, "depths": (1, 1)} if name.startswith("swin") else {}
    (found,) = evaluate(timm.create_model(name, in_chans=1, **options), data, "knn", image_size=(64, 64), fabric=fabric)
    assert 0 <= found.top1 <= 100


def test_every_protocol_leaves_the_encoder_unchanged(data, fabric):
    encoder = timms().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for protocol in ("knn", Protocol(name="linear", kind="linear", stage=STAGE), Protocol(name="tuned", kind="finetune", stage=STAGE)):
        evaluate(encoder, data, protocol, fabric=fabric)
    assert encoder.training and all(parameter.requires_grad for parameter in encoder.parameters())
    assert before.keys() == encoder.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_a_whole_classifier_is_evaluated_by_its_own_logits(data, fabric):
    classifier = timms(num_classes=10).eval()
    (found,) = evaluate(classifier, data, "classify", fabric=fabric)
    images = (data.val.images / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        assert found.top1 == pytest.approx(100 * (classifier(images).argmax(1) == data.val.labels).double().mean().item())
    with pytest.raises(ValueError, match="a classifier of 10 classes must return logits of shape"):
        evaluate(timms(num_classes=3), data, "classify", fabric=fabric)


def test_an_impossible_evaluation_is_refused_with_the_reason(data, fabric):
    with pytest.raises(RecipeError, match="'kn' is not known; did you mean knn"):
        evaluate(Pixels(), data, "kn", fabric=fabric)
    with pytest.raises(ValueError, match="does not take images of 1 channels and 8 x 8 pixels"):
        evaluate(timm.create_model("vit_tiny_patch16_224", depth=1), data, "knn", image_size=(8, 8), fabric=fabric)
    with pytest.raises(ValueError, match="finetune needs an encoder"):
        evaluate(None, data, "finetune", fabric=fabric)
    with pytest.raises(ValueError, match="returns a tuple"):
        evaluate(Tuple(), data, "knn", fabric=fabric)


class Tuple(nn.Module):
    def forward(self, images: Tensor) -> tuple:
        return (images,)
