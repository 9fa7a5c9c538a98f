"""Tests of MP3's fine-tuning, which adds position embeddings, and of its figure.

Shapes as in tests/test_mp3.py.
"""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.ledger.published import claims, matches
from benchmarks.ledger.rows import frame, summary
from benchmarks.ledger.tables import comparison
from benchmarks.papers import choose_recipe, paper_module
from common.convert import ConversionError, load_encoder
from common.data import open_data
from common.environment import ROOT
from common.evaluate import Classifier
from common.positions import relative_targets
from common.vit import ViT
from mp3.method import MP3
from mp3.recipe import illustrate
from tests.test_mp3 import SHAPE, B, build, draw
from tests.test_results import ROW

BIAS = "blocks.{}.attn.rel_pos.relative_position_bias_table"
ADDED = {"none": set(), "learned": {"pos_embed"}, "relative": {BIAS.format(block) for block in range(3)}}


def finetuned(position: str, source: MP3) -> ViT:
    """An encoder with this kind of position; all other tensors come from pre-training."""
    torch.manual_seed(0)
    encoder = ViT(**SHAPE, position=position)
    coverage = load_encoder(encoder, source.encoder.state_dict(), allow_missing=sorted(ADDED[position]))
    assert set(coverage.loaded) == set(source.encoder.state_dict()) and set(coverage.missing) == ADDED[position]
    assert coverage.unexpected == coverage.reshaped == ()
    return encoder.eval()


@pytest.mark.parametrize("position", ADDED)
def test_a_pretrained_encoder_provides_all_tensors_except_the_positions(position):
    source = build()
    encoder = finetuned(position, source)
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in source.encoder.state_dict().items())
    assert encoder.state_dict().keys() - source.encoder.state_dict().keys() == ADDED[position]
    for name in ADDED[position]:
        with pytest.raises(ConversionError, match=re.escape(name)):
            load_encoder(ViT(**SHAPE, position=position), source.encoder.state_dict(), allow_missing=ADDED[position] - {name})


def test_relative_positions_start_without_effect_and_learned_ones_do_not():
    source, images = build(), draw()["images"]
    expected = source.encoder(images)
    for position, same in (("none", True), ("relative", True), ("learned", False)):
        found = finetuned(position, source)(images)
        assert ((found - expected).abs().max() < 1e-5) == same, position


@pytest.mark.parametrize("position", ["learned", "relative"])
def test_positions_get_gradients_in_fine_tuning(position):
    encoder = finetuned(position, build())
    protocol = next(p for p in choose_recipe(paper_module("mp3"), "digits", None)[1].protocols if p.position == position)
    classifier = Classifier(encoder, 10, protocol).train()
    nn.init.normal_(classifier.head.weight)
    classifier(draw()["images"], torch.arange(B)).loss.backward()
    parameters = dict(encoder.named_parameters())
    assert ADDED[position] and all((parameters[name].grad != 0).any() for name in ADDED[position])
    assert {f"encoder.{name}" for name in ADDED[position]} <= classifier.no_weight_decay()


def test_the_bias_of_two_patches_depends_only_on_their_offset():
    grid = (3, 4)
    encoder = ViT(**SHAPE | {"image_size": (12, 16)}, position="relative")
    table = encoder.blocks[1].attn.rel_pos
    nn.init.normal_(table.relative_position_bias_table)
    bias = table.get_bias()[0].detach()
    assert bias.shape == (2, 13, 13)
    cells, offset = bias[:, 1:, 1:].flatten(1), relative_targets(grid).flatten()
    # Two pairs with the same offset: (0, 0) from (1, 2) and (1, 1) from (2, 3).
    assert torch.equal(bias[:, 1 + 6, 1 + 0], bias[:, 1 + 11, 1 + 5])
    lowest, highest = (
        torch.zeros(2, 35).scatter_reduce(1, offset.expand(2, -1), cells, how, include_self=False) for how in ("amin", "amax")
    )
    assert torch.equal(lowest, highest) and lowest.unique().numel() == 2 * 35
    # The class token has no position: one bias as query, one as key.
    assert all((part == part[:, :1]).all() for part in (bias[:, 0, 1:], bias[:, 1:, 0])) and (bias[:, 0, 1] != bias[:, 1, 0]).all()


def test_relative_biases_of_every_block_change_the_output():
    source, images = build(), draw()["images"]
    expected = source.encoder(images)
    for block in range(3):
        encoder = finetuned("relative", source)
        nn.init.normal_(encoder.blocks[block].attn.rel_pos.relative_position_bias_table)
        assert (encoder(images) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("data", "values"), [("cifar100", {"none": "82.6", "absolute": "84.0", "2d_relative": "84.2"})]
    + [("tiny-imagenet", {"none": "68.2", "absolute": "72.8", "2d_relative": "73.2"})]
)  # fmt: skip
def test_each_position_of_table_3_is_fine_tuned_and_compared_to_its_published_number(data, values):
    recipe = choose_recipe(paper_module("mp3"), data, None)[1]
    protocols = {p.name: p for p in recipe.protocols if p.kind == "finetune"}
    assert protocols.keys() == {f"finetune_{name}" for name in values}
    positions = {"none": "none", "absolute": "learned", "2d_relative": "relative"}
    assert {name: protocols[f"finetune_{name}"].position for name in values} == positions
    shared = {"paper": "mp3", "data": data, "backbone": recipe.backbone, "pretrain_epochs": recipe.pretrain.epochs}
    lines = [replace(ROW, **shared, protocol=name) for name in protocols]
    pairs = matches(claims("mp3", ROOT), summary(frame(lines))).query("same_data and same_backbone and same_epochs")
    assert pairs.set_index("protocol")["value"].to_dict() == {f"finetune_{name}": value for name, value in values.items()}
    assert len(pairs) == len(lines)
    said = comparison("mp3", frame(lines)).set_index("Protocol")["Published"].to_dict()
    title = {"cifar100": "CIFAR-100"}.get(data, data)
    assert said == {f"finetune {name}".replace("_", " "): f"{value} ({title}, ViT-S, 2000 ep)" for name, value in values.items()}


def test_a_figure_of_the_positions_is_saved(tmp_path):
    data = open_data("digits")
    recipe = choose_recipe(paper_module("mp3"), "digits", None)[1]
    method = paper_module("mp3").build(recipe, recipe.build_encoder(1), 10)
    illustrate(method, torch.randn(2, 1, 8, 8), torch.zeros(2), data, tmp_path)
    assert (tmp_path / "positions.png").stat().st_size > 1000
