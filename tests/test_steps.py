"""Tests of the overhead of a training step: no synchronisation with the device, no recompilation."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baselines.deit import DeiT
from benchmarks.baselines.mae import MAE
from common.evaluate import Classifier, LinearProbe
from common.masking import MultiBlock
from common.randomness import reseed
from common.recipe import Protocol, TrainConfig
from common.vit import ViT
from droppos.method import DropPos
from mapet.method import MaPeT
from mp3.method import MP3
from positional_label.method import PositionalLabel, PositionalMAE
from stop.method import StoP

DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
PREDICTOR = {"predictor_width": 16, "predictor_depth": 2}
LABELS = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
GRID = {"layers": (1, 2), "heads": ("norm", "linear", "norm_affine", "attentive"), "lr_multipliers": (1.0, 2.0)}
STEPS = 10


def encoder(**options) -> ViT:
    return ViT(**{"image_size": 32, "patch_size": 4, "width": 32, "depth": 2, "heads": 2} | options)


def backbone(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    made = timm.create_model(name, img_size=32, embed_dim=32, num_classes=0, drop_path_rate=0.1, **options)
    made.channels, made.image_size = 3, (32, 32)
    return made


def vit() -> nn.Module:
    return backbone(patch_size=8, depth=2, num_heads=2)


def swin() -> nn.Module:
    return backbone("swin_tiny_patch4_window7_224", patch_size=4, window_size=4, depths=(2, 2), num_heads=(2, 4))


def stop(**options) -> StoP:
    return StoP(encoder(class_token=False, drop_path=0.1), **PREDICTOR, target_scale=(0.1, 0.3), min_keep=2, **options)


def protocol(kind: str, **options) -> Protocol:
    return Protocol(name=kind, kind=kind, stage=TrainConfig(epochs=1, batch_size=8, base_lr=0.1), **options)


METHODS = {
    "droppos": lambda: DropPos(encoder(drop_path=0.1), sigma_epochs=5, **DECODER),
    "droppos wrong": lambda: DropPos(encoder(), position_token="wrong", ignore_confident=True, shuffle=True, **DECODER),
    "droppos pixels": lambda: DropPos(encoder(), position_token="zeros", attentive=False, position_weight=0.1, **DECODER),
    "mp3": lambda: MP3(encoder(position="none", drop_path=0.1)),
    "stop uniform": lambda: stop(noise="both"),
    "stop released": lambda: stop(masks="released", mode="released", covariance="fixed", position="learned"),
    "stop recomputed": lambda: StoP(encoder(class_token=False, grad_checkpointing=True), **PREDICTOR),
    "ijepa": lambda: stop(noise="none"),
    "mapet": lambda: MaPeT(encoder(drop_path=0.1), context=10, vocabulary=16),
    "positional label, absolute": lambda: PositionalLabel(vit(), 10, label="absolute"),
    "positional label, mixed": lambda: PositionalLabel(vit(), 10, label="relative", **LABELS),
    "positional label, queries": lambda: PositionalLabel(vit(), 10, label="relative", queries=3),
    "positional label, swin": lambda: PositionalLabel(swin(), 10, label="absolute", swin="released", **LABELS),
    "positional mae": lambda: PositionalMAE(encoder(), label="relative", queries=3, **DECODER),
    "mae": lambda: MAE(encoder(drop_path=0.1), **DECODER),
    "deit": lambda: DeiT(encoder(position="learned", drop_path=0.1), 10, **LABELS),
    "fine-tuning": lambda: Classifier(encoder(drop_path=0.1, layer_scale=0.1), 10, protocol("finetune", **LABELS)),
    "fine-tuning, mean": lambda: Classifier(encoder(drop_path=0.1, position="relative"), 10, protocol("finetune", pool="mean", **LABELS)),
    "linear probe": lambda: LinearProbe(encoder(), 10, protocol("linear", **GRID)),
}
SIZES_CHANGE = ("stop uniform", "stop released")
# test_compile.py tests the methods with the settings of their recipes.
VARIANTS = [*SIZES_CHANGE, "stop recomputed", "droppos wrong", "droppos pixels", "fine-tuning, mean"]
VARIANTS += [name for name in METHODS if name.startswith("positional")]


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 32, 32), torch.randint(16, (8, 64)) if isinstance(model, MaPeT) else torch.randint(10, (8,))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_recompilation_after_the_second_step(name):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model, graphs, sizes = METHODS[name]().train(), [], set()
    compiled = torch.compile(model, backend="eager")
    for step in range(STEPS):
        getattr(model, "at_step", lambda step, total: None)(step, STEPS)
        reseed(0, step, 0, 0)
        output = compiled(*batch(model))
        output.loss.backward()
        getattr(model, "after_step", lambda step, total: None)(step, STEPS)
        graphs.append(counters["stats"]["unique_graphs"])
        sizes.add(tuple(output.named["cells"].shape) if name in SIZES_CHANGE else ())
        assert all(torch.as_tensor(value() if callable(value) else value).isfinite() for value in output.metrics.values())
    assert graphs[0] > 0 and graphs[-1] == graphs[1]
    assert len(sizes) > 2 or name not in SIZES_CHANGE  # the sizes did change


@pytest.mark.parametrize("noise", ["none", "masked"])
def test_a_compiled_step_of_stop_has_the_masks_and_the_loss_of_an_eager_step(noise):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = stop(noise=noise, sigma=0.0).train()
    compiled = torch.compile(model, backend="eager")
    for step in range(3):
        model.at_step(step, 3)
        outputs = []
        for step_fn in (model, compiled):
            reseed(0, step)
            outputs.append(step_fn(*batch(model)))
        plain, other = outputs
        assert torch.equal(plain.named["cells"], other.named["cells"]) and torch.equal(plain.named["context"], other.named["context"])
        torch.testing.assert_close(plain.loss, other.loss)
        torch.testing.assert_close(plain.metrics["rankme"](), other.metrics["rankme"]())


class NoReads(TorchDispatchMode):
    """Raises if the host needs a value of a tensor: item(), bool(), nonzero(), a boolean index, and matrix
    factorisations, which read an error code."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        if masked or name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero") or name.startswith("_linalg"):
            raise AssertionError(f"{function} waits for the device")
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_does_not_synchronise_with_the_device(name):
    model = METHODS[name]().train()
    images, targets = batch(model)
    # StoP samples block sizes, and its released masks, on the host.
    given = {"cells": model.masks(len(images), 0)} if isinstance(model, StoP) else {}
    with NoReads():
        model(images, targets, **given).loss.backward()


def test_uniform_masks_are_sampled_without_reading_from_the_device():
    context_BM, target_GBT = MultiBlock((14, 14))(3, 0, "meta")  # the meta device has no values to read
    assert context_BM.shape == (3, 49) and target_GBT.shape[:2] == (4, 3)


@pytest.mark.parametrize(
    "read",
    [Tensor.item, bool, Tensor.nonzero, lambda x: x[x > 0], lambda x: torch.linalg.svdvals(x[None])],
    ids=["item", "bool", "nonzero", "index", "svdvals"],
)
def test_a_read_from_the_device_is_detected(read):
    with NoReads(), pytest.raises(AssertionError, match="waits for the device"):
        read(torch.ones(1))
