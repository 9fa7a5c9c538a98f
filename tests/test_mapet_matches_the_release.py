"""MaPeT computes the same values as the official code (values in tests/golden/mapet.json).

The official code at 6d276c9 printed them, on a CPU in float32.
"""

import pytest
import torch
from torch import Tensor

from common.convert import fuse_qkv, load_encoder, load_method
from common.evaluate import Classifier
from common.recipe import Protocol
from common.vit import ViT
from mapet.method import OFFICIAL_NAMES, MaPeT
from tests import parity

GOLDEN = parity.golden("mapet")
CASES = list(GOLDEN)


def encoder(case: str) -> ViT:
    config = GOLDEN[case]["config"]
    sizes = {"image_size": config["img"], "patch_size": config["patch"], "width": config["dim"], "depth": config["depth"]}
    return ViT(**sizes, heads=config["heads"], position="learned", layer_scale=config["layerscale"])


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's names to the official ones: separate weights for queries and for keys and values."""
    split = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            width = len(tensor) // 3
            split[name.replace("qkv", "q")], split[name.replace("qkv", "kv")] = tensor[:width], tensor[width:]
        else:
            split[name] = tensor
    return split


def official_state(case: str) -> dict[str, Tensor]:
    config, bare = GOLDEN[case]["config"], encoder(case)
    names = split_qkv(bare.state_dict())
    names |= {"mask_positional_token": torch.empty(1, 1, config["dim"])}
    names |= {"decoder.weight": torch.empty(config["vocab"], config["dim"]), "decoder.bias": torch.empty(config["vocab"])}
    assert len(names) == GOLDEN[case]["keys"]
    return parity.weights(names, untouched=(), fill=tuple(config["fill"]))


def mapet(case: str) -> MaPeT:
    config = GOLDEN[case]["config"]
    model = MaPeT(encoder(case), context=config["context_with_cls"], vocabulary=config["vocab"])
    coverage = load_method(model, fuse_qkv(official_state(case)), OFFICIAL_NAMES)
    assert not coverage.missing and not coverage.unexpected
    return model


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens, orders."""
    config = GOLDEN[case]["config"]
    count, cells = config["batch"], (config["img"] // config["patch"]) ** 2
    images = parity.images(count, 3, config["img"], config["img"])
    tokens = (7 * torch.arange(count * cells) + 3).remainder(config["vocab"]).view(count, cells)
    return images, tokens, parity.noise(count, cells, s=config["noise_s"]).argsort(1)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss_equal_the_official_ones(case):
    golden, (images, tokens, order) = GOLDEN[case], inputs(case)
    assert order[0].tolist() == golden["order0"]
    model = mapet(case)
    output = model(images, tokens, order=order)
    cells, by_row = output.named["cells"].sort(1)  # the official ones are in row-major order
    assert cells[0].tolist() == golden["predicted_raster0"]
    logits = model.head(output.named["features"]).gather(1, by_row[..., None].expand(-1, -1, golden["config"]["vocab"]))
    assert [len(logits), *logits.mT.shape[1:]] == golden["logits_shape_official"]
    assert logits[0, 0, :4].tolist() == pytest.approx(golden["logits_first"], rel=1e-5, abs=1e-5)
    assert logits[-1, -1, -4:].tolist() == pytest.approx(golden["logits_last"], rel=1e-5, abs=1e-5)
    assert logits.abs().sum().item() == pytest.approx(golden["logits_abs_sum"], rel=1e-5)
    assert output.loss.item() == pytest.approx(golden["loss"], abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_tokens_in_another_order_than_the_predictions_give_another_loss(case):
    images, tokens, order = inputs(case)
    assert abs(mapet(case)(images, tokens.flip(1), order=order).loss.item() - GOLDEN[case]["loss"]) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_official_ones(case):
    model, (images, tokens, order) = mapet(case), inputs(case)
    model(images, tokens, order=order).loss.backward()
    named = {name.removeprefix("encoder."): parameter.grad for name, parameter in model.named_parameters()}
    gradients = split_qkv(
        {name.replace("placeholder", "mask_positional_token").replace("head.", "decoder."): g for name, g in named.items()}
    )
    assert len(GOLDEN[case]["grad_norm"]) == 9
    for name, norm in GOLDEN[case]["grad_norm"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name


@pytest.mark.parametrize("case", CASES)
def test_the_logits_of_the_fine_tuned_classifier_equal_the_official_ones(case):
    model = Classifier(encoder(case), 10, Protocol(name="knn", kind="knn"))
    names = {name.removeprefix("encoder."): tensor for name, tensor in split_qkv(model.state_dict()).items()}
    state = fuse_qkv(parity.weights(names, untouched=(), fill=tuple(GOLDEN[case]["config"]["fill"])))
    coverage = load_method(model, state, {"": "encoder.", "fc_norm.": "fc_norm.", "head.": "head."})
    assert not coverage.missing and not coverage.unexpected
    logits = model.eval()(inputs(case)[0]).named["logits"]
    assert logits[0].tolist() == pytest.approx(GOLDEN[case]["finetuned_classifier"]["logits0"], abs=1e-5)
    assert logits.abs().sum().item() == pytest.approx(GOLDEN[case]["finetuned_classifier"]["abs_sum"], rel=1e-5)


def test_an_encoder_loads_from_a_pre_training_checkpoint():
    case = CASES[0]
    loaded = encoder(case)
    coverage = load_encoder(loaded, official_state(case))
    assert set(coverage.unexpected) == {"mask_positional_token", "decoder.weight", "decoder.bias"}
    images = inputs(case)[0]
    assert torch.equal(loaded(images), mapet(case).encoder(images))
