"""Claims about the checks at the start: all that cannot work is named at once, with what works, before anything is trained."""

import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import preflight
from benchmarks.papers import baselines, choose_recipe, paper_module, papers, recipes
from benchmarks.reproduce import Options, Reproduction, reproduce
from common.data import open_data
from common.evaluate import Supervision
from common.recipe import Protocol, RecipeError, override
from common.train import device_batch, make_fabric

OUT = {"device": "cpu", "precision": "32-true", "workers": 0, "epochs": 1}


def run_of(out: Path, *changes: str, paper: str = "droppos", processes: int = 1) -> Reproduction:
    """A run on digits, as one of several processes sees it."""
    module = paper_module(paper)
    name, recipe = choose_recipe(module, "digits", None)
    run = Reproduction(Options(paper, out=out, **OUT), module, name, override(recipe, changes), open_data("digits"), make_fabric("cpu"), 0)
    run.fabric = SimpleNamespace(world_size=processes, global_rank=0, device=torch.device("cpu"))
    return run


def refused(run: Reproduction) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(RecipeError) as error:
        preflight.check([run])
    return str(error.value).splitlines()


def settings(line: str) -> list[str]:
    """What a complaint says to --set."""
    return [shlex.split(part)[0] for part in line.split("--set ")[1:]]


def test_two_protocols_and_a_pretraining_that_are_wrong_are_named_at_once_and_what_is_to_be_set_works(tmp_path):
    changes = ["pretrain.batch_size=4096", "linear.stage.batch_size=16384", "finetune_5_per_class.stage.batch_size=64"]
    head, *lines = refused(run_of(tmp_path, *changes))
    assert head.startswith("3 things")
    assert sorted(line.split(":")[0] for line in lines) == ["pretrain", "protocol finetune_5_per_class", "protocol linear"]
    fixes = [change for line in lines for change in settings(line)]
    assert "linear.stage.batch_size=1024" in fixes
    preflight.check([run_of(tmp_path, *changes, *fixes)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        (["pretrain.batch_size=1042"], 1, "pretrain: a batch of 1042 on 1 devices is 521 micro-batches of 2 images"),
        (["linear.stage.batch_size=101"], 2, "protocol linear: a batch of 101 cannot be shared out among 2 devices"),
        (["linear.stage.batch_size=2"], 2, "protocol linear: a batch of 2 on 2 devices makes micro-batches of 1 image"),
        (["linear.stage.device_batch=1"], 1, "micro-batches of 1 image"),
        (["finetune.mixup=0.8", "finetune.stage.device_batch=1"], 1, "protocol finetune: a batch of"),
        (["finetune_5_per_class.labels_per_class=500"], 1, "protocol finetune_5_per_class:"),
        (["linear.label_share=0.005"], 1, "protocol linear: a share of 0.005"),
        (["linear.layers=[1,7]"], 1, "protocol linear: layers=(1, 7), and the encoder has 6"),
        (["knn.resize=16"], 1, "protocol knn: images are to be resized to 16 pixels"),
    ],
)
def test_what_cannot_work_is_refused_with_a_value_that_works(changes, processes, message, tmp_path):
    lines = refused(run_of(tmp_path, *changes, processes=processes))
    assert any(message in line for line in lines), lines
    fixes = [change for line in lines for change in settings(line)]
    assert fixes
    preflight.check([run_of(tmp_path, *changes, *fixes, processes=processes)])


def test_stop_is_refused_with_micro_batches_of_one_image_before_it_trains(tmp_path):
    (line,) = refused(run_of(tmp_path, "pretrain.device_batch=1", paper="stop"))
    assert "pretrain.device_batch=2" in settings(line)


def test_a_class_token_that_the_encoder_does_not_have_is_refused(tmp_path):
    lines = refused(run_of(tmp_path, "linear.pool=class", "encoder.class_token=false"))
    assert any("linear.pool=mean" in settings(line) for line in lines)


def test_logistic_regression_needs_a_label_of_every_class(tmp_path):
    run = run_of(tmp_path)
    run.recipe = replace(run.recipe, protocols=(Protocol("logistic", "logistic"),))
    run.data = replace(run.data, train=run.data.train.subset((run.data.train.labels != 3).nonzero()[:, 0]))
    assert any("1 of 10 classes have no label" in line for line in refused(run))


def test_an_arm_that_cannot_be_built_is_refused_before_the_first_arm_trains(tmp_path, monkeypatch):
    module = paper_module("droppos")
    recipe = replace(choose_recipe(module, "digits", None)[1], arms={"own": (), "odd": ("method.sgima=1",)})
    monkeypatch.setattr("benchmarks.reproduce.choose_recipe", lambda *_: ("digits", recipe))
    with pytest.raises(RecipeError, match="arm odd: pretrain: .*sgima.*did you mean sigma"):
        reproduce(Options("droppos", out=tmp_path / "runs", **OUT))
    assert not (tmp_path / "runs").exists()


def test_an_encoder_file_that_does_not_fit_is_refused_beside_all_else(tmp_path):
    save_file({"patch_embed.proj.weight": torch.zeros(3, 1, 2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError) as error:
        options = Options(
            "droppos", encoder=tmp_path / "other.safetensors", set=["linear.stage.batch_size=4096"], out=tmp_path / "runs", **OUT
        )
        reproduce(options)
    assert "--encoder: " in str(error.value) and "protocol linear: 1437" in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_ledger_that_cannot_be_read_is_refused_before_the_training_that_it_is_to_record(tmp_path):
    (tmp_path / "droppos").mkdir()
    (tmp_path / "droppos" / "results.csv").write_text("a,b\n1,2\n")
    run = run_of(tmp_path / "runs")
    run.options.record = True
    with pytest.raises(RecipeError, match="is not a run ledger"):
        preflight.check([run], tmp_path)


@pytest.mark.parametrize(
    ("change", "processes", "message"),
    [
        ("targets.featurse=pixels", 1, "featurse"),
        ("method.vocabulary=1", 1, "vocabulary"),
        ("pretrain.augmentation.flip=0.5", 1, "flip"),
        ("targets.store=absent", 1, "there is no token store"),
        ("targets.sample=10", 1, "make no 64 clusters"),
        ("pretrain.batch_size=128", 2, "several processes do not make them"),
    ],
)
def test_tokens_that_cannot_be_had_are_refused_and_none_are_made(change, processes, message, tmp_path):
    run = run_of(tmp_path / "runs", change, paper="mapet", processes=processes)
    run.options.data_root = tmp_path / "data"
    assert any(line.startswith("targets: ") and message in line for line in refused(run))
    assert not (tmp_path / "data").exists()


def test_the_checks_leave_the_global_generator_as_it_was(tmp_path):
    before = torch.get_rng_state()
    preflight.check([run_of(tmp_path)])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [2, 3, 5, 15])
def test_every_image_of_an_odd_batch_is_blended_with_another_one(count):
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 1, 4, 4)
    blended, targets = Supervision(count, mixup=0.8).blend(images, torch.arange(count))
    assert blended.shape == images.shape and targets.shape == (count, count)
    assert ((targets > 0).sum(1) == 2).all() and (targets.gather(1, torch.arange(count)[:, None]) > 0).all()
    torch.testing.assert_close((targets * torch.arange(count)).sum(1), blended[:, 0, 0, 0])


def test_a_module_whose_annotations_are_text_keeps_its_recipes():
    module = ModuleType("paper")
    source = "from __future__ import annotations\nfrom common.recipe import Recipe\ndef small() -> Recipe: ...\ndef other() -> int: ...\n"
    exec(compile(source, "paper", "exec", dont_inherit=True), module.__dict__)
    assert list(recipes(module)) == ["small"]


@pytest.mark.parametrize("paper", [*papers(), *baselines()])
def test_no_recipe_has_absurd_micro_batches_on_1_to_8_devices(paper):
    for make in recipes(paper_module(paper)).values():
        recipe = make()
        for stage in (recipe.pretrain, *(protocol.stage for protocol in recipe.protocols if protocol.stage)):
            for devices in (1, 2, 4, 8):
                if stage.batch_size % devices == 0:
                    assert device_batch(stage, devices) > 1
