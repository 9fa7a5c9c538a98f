"""torch.compile does not recompile a method in later steps."""

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.papers import choose_recipe, paper_module
from common.data import open_data
from common.evaluate import Classifier, LinearProbe
from common.randomness import reseed
from common.recipe import choose_arms, override
from common.vit import SIZES

METHODS = {
    "droppos": ("droppos", ()),
    "mp3": ("mp3", ()),
    "stop": ("stop", ()),
    "stop, released masks": ("stop", ("method.masks=released", "method.min_keep=3")),
    "mapet": ("mapet", ()),
    "mae": ("mae", ()),
    "ijepa": ("ijepa", ()),
    "deit": ("deit", ("method.mixup=0.8", "method.cutmix=1.0")),
    "jigsaw, vit+jigsaw": ("jigsaw", ()),
    "jigsaw, swin+jigsaw": ("jigsaw", ()),
    "drloc": ("drloc", ()),
    "positional_label": ("positional_label", ()),
    "positional_label, queries": ("positional_label", ("method.queries=6",)),
}


def graphs(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> list[int]:
    """Return the number of graphs compiled so far after each of ten training steps."""
    compiled = []

    def count(graph: torch.fx.GraphModule, _: list) -> object:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    trained, found = torch.compile(model.train(), backend=count), []
    for step in range(10):
        reseed(0, step)
        getattr(model, "at_step", lambda *_: None)(step, 10)
        trained(images, targets).loss.backward()
        model.zero_grad()
        getattr(model, "after_step", lambda *_: None)(step, 10)
        found.append(len(compiled))
    return found


@pytest.mark.parametrize("name", METHODS)
def test_no_method_is_recompiled_after_its_second_step(name):
    paper, changes = METHODS[name]
    module, data = paper_module(paper), open_data("digits")
    _, recipe = choose_recipe(module, "digits", None)
    arms = choose_arms(recipe)
    recipe = override(arms.get(name.rpartition(", ")[2], [*arms.values()][-1]), changes)
    reseed(0)
    model = module.build(recipe, recipe.build_encoder(data.channels, **({"depth": 2} if recipe.size in SIZES else {})), data.classes)
    images = torch.randn(8, data.channels, recipe.image_size, recipe.image_size)
    targets = module.example_targets(model, images) if hasattr(module, "example_targets") else torch.arange(8)
    found = graphs(model, images, targets)
    assert found[0] > 0 and found[-1] == found[1], found


@pytest.mark.parametrize("kind", ["finetune", "linear"])
def test_no_evaluation_is_recompiled_after_its_second_step(kind):
    _, recipe = choose_recipe(paper_module("droppos"), "digits", None)
    protocol = next(protocol for protocol in recipe.protocols if protocol.kind == kind)
    blended = {"mixup": 0.8, "cutmix": 1.0} if kind == "finetune" else {}
    reseed(0)
    encoder = recipe.build_encoder(1, depth=2, drop_path=0.2 if kind == "finetune" else 0.0)
    model = {"finetune": Classifier, "linear": LinearProbe}[kind](encoder, 10, dataclasses.replace(protocol, **blended))
    found = graphs(model, torch.randn(8, 1, 8, 8), torch.arange(8))
    assert found[0] > 0 and found[-1] == found[1], found
