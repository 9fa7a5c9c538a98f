"""Tests of `label_seed`: the choice of labelled images, independent of the training's seed."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.papers import choose_recipe, paper_module
from benchmarks.stages import Stages
from common.data import Augmentation, Split, open_data
from common.evaluate import evaluate, hold_out, labelled_images
from common.recipe import Protocol, RecipeError, TrainConfig, as_json, override
from common.run import Run, RunError
from common.train import make_fabric

STAGE = TrainConfig(epochs=1, batch_size=10, base_lr=0.01, augmentation=Augmentation(crop="none", flip=0.0))
FEW = Protocol(name="few", kind="finetune", stage=STAGE, labels_per_class=5)


@pytest.fixture(scope="module")
def train() -> Split:
    return open_data("digits").train


def rows(split: Split) -> set[bytes]:
    """The distinct images of a split."""
    return {image.numpy().tobytes() for image in split.images}


class Watcher(nn.Module):
    """An encoder that keeps the images on which it is trained, also in its copies."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(64, 4), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            SEEN.extend(images)
        return self.layer(images.flatten(1))


SEEN: list[Tensor] = []


def trained_on(protocol: Protocol, seed: int) -> list[bytes]:
    """The images on which fine-tuning trains, in their order."""
    SEEN.clear()
    evaluate(Watcher(), open_data("digits"), protocol, seed=seed, fabric=make_fabric("cpu", "32-true"))
    return [image.numpy().tobytes() for image in SEEN]


def test_with_one_label_seed_runs_of_different_seeds_train_on_the_same_images_in_another_order():
    protocol = replace(FEW, label_seed=3)
    first, other = trained_on(protocol, seed=0), trained_on(protocol, seed=1)
    assert len(first) == 50 and set(first) == set(other) and first != other
    assert set(trained_on(FEW, seed=0)) != set(trained_on(FEW, seed=1))


@pytest.mark.parametrize("choice", [{"labels_per_class": 5}, {"labels_per_class": None, "label_fraction": 0.1}])
def test_without_a_label_seed_the_runs_seed_draws_the_labels(choice, train):
    protocol = replace(FEW, **choice)
    assert rows(labelled_images(protocol, train, 4)) == rows(labelled_images(replace(protocol, label_seed=4), train, 7))
    assert rows(labelled_images(protocol, train, 4)) != rows(labelled_images(replace(protocol, label_seed=5), train, 4))


@pytest.mark.parametrize("seed", range(5))
def test_five_labels_per_class_are_among_twenty_of_the_same_label_seed_for_every_class(seed, train):
    few, more = (labelled_images(replace(FEW, labels_per_class=count, label_seed=seed), train, 9) for count in (5, 20))
    for label in range(10):
        mine, theirs = (rows(split.subset((split.labels == label).nonzero()[:, 0])) for split in (few, more))
        assert len(mine) == 5 and len(theirs) == 20 and mine < theirs


def test_the_held_out_images_of_a_grid_are_drawn_with_the_label_seed():
    grid, label_N = Protocol(name="linear", kind="linear", stage=STAGE, lr_multipliers=(1.0, 2.0)), torch.arange(300) % 10
    fixed = replace(grid, label_seed=4)
    assert all(map(torch.equal, hold_out(fixed, label_N, 0), hold_out(fixed, label_N, 1)))
    assert all(map(torch.equal, hold_out(fixed, label_N, 0), hold_out(grid, label_N, 4)))
    assert not torch.equal(hold_out(grid, label_N, 0)[1], hold_out(grid, label_N, 1)[1])


def test_a_result_says_its_label_seed():
    data, options = open_data("digits"), {"fabric": make_fabric("cpu", "32-true")}
    for label_seed, end in ((None, "labels=50"), (2, "labels=50 label_seed=2")):
        (found,) = evaluate(None, data, Protocol(name="knn", kind="knn", labels_per_class=5, label_seed=label_seed), **options)
        assert found.settings.endswith(end)


def test_a_negative_label_seed_is_refused():
    with pytest.raises(RecipeError, match="protocol few: label_seed=-1 .* from 0 up"):
        replace(FEW, label_seed=-1)


def run_of(out, *changes: str) -> Stages:
    module = paper_module("droppos")
    name, recipe = choose_recipe(module, "digits", None)
    return Stages(module, name, override(recipe, changes), open_data("digits"), make_fabric("cpu"), seed=0, out=out)


def test_a_run_finished_before_these_settings_existed_is_accepted_and_one_of_another_label_seed_is_not(tmp_path):
    """The recipe.json of such a run lacks them."""
    run, changed = run_of(tmp_path), run_of(tmp_path, "finetune_5_per_class.label_seed=1")
    (protocol,) = (protocol for protocol in run.recipe.protocols if protocol.name == "finetune_5_per_class")
    (other,) = (protocol for protocol in changed.recipe.protocols if protocol.name == "finetune_5_per_class")
    settings = run.settings(protocol, "scratch")
    added = as_json(protocol).keys() - settings["protocol"].keys()
    assert added and all(as_json(protocol)[name] == getattr(Protocol, name) for name in added)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "recipe.json").write_text(json.dumps(settings))
    (tmp_path / "old" / "result.json").write_text("{}")
    Run(tmp_path / "old", run.settings(protocol, "scratch"), torch.device("cpu")).check_settings()
    with pytest.raises(RunError, match="protocol.label_seed: None there, 1 requested"):
        Run(tmp_path / "old", changed.settings(other, "scratch"), torch.device("cpu")).check_settings()
