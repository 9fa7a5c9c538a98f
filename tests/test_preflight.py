"""Tests of the checks before training: they report all problems at once, each with a value that works."""

import random
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import preflight
from benchmarks.papers import ROOT, baselines, choose_recipe, paper_module, papers, recipes
from benchmarks.reproduce import Options, reproduce
from benchmarks.speed import steps
from benchmarks.speed.measure import check_kept
from benchmarks.stages import Stages
from common.data import open_data
from common.evaluate import Supervision
from common.recipe import LOCATION, Protocol, RecipeError, choose_arms, override
from common.run import Run
from common.train import device_batch, make_fabric

OUT = {"device": "cpu", "precision": "32-true", "workers": 0, "epochs": 1}


def run_of(out: Path, *changes: str, paper: str = "droppos", processes: int = 1) -> Stages:
    """A run on digits, seen from one of several processes."""
    module = paper_module(paper)
    name, recipe = choose_recipe(module, "digits", None)
    run = Stages(module, name, override(recipe, changes), open_data("digits"), make_fabric("cpu"), seed=0, out=out, workers=0)
    run.fabric = SimpleNamespace(world_size=processes, global_rank=0, device=torch.device("cpu"), _precision=run.fabric._precision)
    return run


def refused(run: Stages, root: Path = ROOT, record: bool = False) -> list[str]:
    """Return the lines of the error message."""
    with pytest.raises(RecipeError) as error:
        preflight.check([run], record=record, root=root)
    return str(error.value).splitlines()


def settings(line: str) -> list[str]:
    """Return the settings that an error message suggests with --set."""
    return [shlex.split(part)[0] for part in line.split("--set ")[1:]]


def test_all_wrong_stages_are_reported_at_once_and_the_suggested_settings_work(tmp_path):
    changes = ["pretrain.batch_size=4096", "linear.stage.batch_size=16384", "finetune_5_per_class.stage.batch_size=64"]
    head, *lines = refused(run_of(tmp_path, *changes))
    assert head.startswith("3 problems")
    assert sorted(line.split(":")[0] for line in lines) == ["pretrain", "protocol finetune_5_per_class", "protocol linear"]
    fixes = [change for line in lines for change in settings(line)]
    assert "linear.stage.batch_size=1024" in fixes
    preflight.check([run_of(tmp_path, *changes, *fixes)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        (["pretrain.batch_size=1042"], 1, "pretrain: a batch of 1042 on 1 devices is 521 micro-batches of 2 images"),
        (["linear.stage.batch_size=101"], 2, "protocol linear: a batch of 101 cannot be divided among 2 devices"),
        (["linear.stage.batch_size=2"], 2, "protocol linear: a batch of 2 on 2 devices makes micro-batches of 1 image"),
        (["linear.stage.device_batch=1"], 1, "micro-batches of 1 image"),
        (["finetune.mixup=0.8", "finetune.stage.device_batch=1"], 1, "protocol finetune: a batch of"),
        (["finetune_5_per_class.labels_per_class=500"], 1, "protocol finetune_5_per_class:"),
        (["linear.label_fraction=0.005"], 1, "protocol linear: a fraction of 0.005"),
        (["pretrain.layer_decay=0.7"], 1, "pretrain: layer_decay=0.7, but DropPos does not define its layers"),
        (["linear.stage.layer_decay=0.7"], 1, "protocol linear: layer_decay=0.7, but LinearProbe does not define its layers"),
        (["linear.layers=[1,7]"], 1, "protocol linear: layers=(1, 7), and the encoder has 6"),
        (["knn.resize=16"], 1, "protocol knn: images are to be resized to 16 pixels"),
    ],
)
def test_an_impossible_setting_is_refused_with_a_value_that_works(changes, processes, message, tmp_path):
    lines = refused(run_of(tmp_path, *changes, processes=processes))
    assert any(message in line for line in lines), lines
    fixes = [change for line in lines for change in settings(line)]
    assert fixes
    preflight.check([run_of(tmp_path, *changes, *fixes, processes=processes)])


def test_stop_is_refused_with_micro_batches_of_one_image_before_it_trains(tmp_path):
    (line,) = refused(run_of(tmp_path, "pretrain.device_batch=1", paper="stop"))
    assert "pretrain.device_batch=2" in settings(line)


def test_class_token_pooling_of_an_encoder_without_class_token_is_refused(tmp_path):
    lines = refused(run_of(tmp_path, "linear.pool=class", "encoder.class_token=false"))
    assert any("linear.pool=mean" in settings(line) for line in lines)


def test_logistic_regression_needs_a_label_of_every_class(tmp_path):
    run = run_of(tmp_path)
    run.recipe = replace(run.recipe, protocols=(Protocol(name="logistic", kind="logistic"),))
    run.data = replace(run.data, train=run.data.train.subset((run.data.train.labels != 3).nonzero()[:, 0]))
    assert any("1 of 10 classes have no label" in line for line in refused(run))


@pytest.fixture
def swin(monkeypatch, tmp_path):
    """Return a function that gives the lines of the error for a protocol and timm's Swin, which has no stochastic depth here."""
    monkeypatch.setattr(preflight, "_encoder", lambda run, **_: run.recipe.build_encoder(run.data.channels))

    def lines(protocol: Protocol) -> list[str]:
        run = run_of(tmp_path, paper="positional_label")
        run.recipe = replace(choose_arms(run.recipe, ["swin"])["swin"], protocols=(protocol,))
        return refused(run)

    return lines


def test_a_shuffle_test_of_an_encoder_without_patches_is_refused_before_training(swin, tmp_path):
    tuned = next(protocol for protocol in run_of(tmp_path).recipe.protocols if protocol.name == "finetune")
    shuffled = replace(tuned, shuffle_test=True)
    run = run_of(tmp_path)
    run.recipe = replace(run.recipe, protocols=(shuffled,))
    preflight.check([run])
    (line,) = swin(shuffled)
    assert "SwinTransformer returns 16 tokens for images of 8 x 8 pixels" in line and settings(line) == ["finetune.shuffle_test=false"]


def test_a_location_probe_of_an_encoder_without_blocks_is_refused_before_training(swin, tmp_path):
    run = run_of(tmp_path)
    run.recipe = replace(run.recipe, protocols=(LOCATION,))
    preflight.check([run])
    (line,) = swin(LOCATION)
    assert line.startswith("protocol location: SwinTransformer has no `blocks`, so only its last layer can be read")


def test_an_arm_that_cannot_be_built_is_refused_before_the_first_arm_trains(tmp_path, monkeypatch):
    module = paper_module("droppos")
    recipe = replace(choose_recipe(module, "digits", None)[1], arms={"own": (), "odd": ("method.sgima=1",)})
    monkeypatch.setattr("benchmarks.reproduce.choose_recipe", lambda *_: ("digits", recipe))
    with pytest.raises(RecipeError, match="arm odd: pretrain: .*sgima.*did you mean sigma"):
        reproduce(Options("droppos", out=tmp_path / "runs", **OUT))
    assert not (tmp_path / "runs").exists()


def test_an_unsuitable_encoder_file_is_reported_together_with_other_problems(tmp_path):
    save_file({"patch_embed.proj.weight": torch.zeros(3, 1, 2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError) as error:
        options = Options(
            "droppos", encoder=tmp_path / "other.safetensors", set=["linear.stage.batch_size=4096"], out=tmp_path / "runs", **OUT
        )
        reproduce(options)
    assert "--encoder: " in str(error.value) and "protocol linear: 1437" in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_an_unreadable_ledger_is_refused_before_training(tmp_path):
    (tmp_path / "droppos").mkdir()
    (tmp_path / "droppos" / "results.csv").write_text("a,b\n1,2\n")
    run = run_of(tmp_path / "runs")
    with pytest.raises(RecipeError, match="is not a run ledger"):
        preflight.check([run], record=True, root=tmp_path)


@pytest.mark.parametrize(
    ("change", "processes", "message"),
    [
        ("targets.featurse=pixels", 1, "featurse"),
        ("method.vocabulary=1", 1, "vocabulary"),
        ("pretrain.augmentation.flip=0.5", 1, "flip"),
        ("targets.store=absent", 1, "there is no token store"),
        ("targets.sample=10", 1, "cannot form 64 clusters"),
        ("pretrain.batch_size=128", 2, "several processes cannot make them"),
    ],
)
def test_impossible_token_settings_are_refused_before_tokens_are_made(change, processes, message, tmp_path):
    run = run_of(tmp_path / "runs", change, paper="mapet", processes=processes)
    run.data_root = tmp_path / "data"
    assert any(line.startswith("targets: ") and message in line for line in refused(run))
    assert not (tmp_path / "data").exists()


def test_the_checks_do_not_change_the_global_generators(tmp_path):
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1:3]
    preflight.check([run_of(tmp_path, "finetune.mixup=0.8")])
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    for old, new in zip(before[2], numpy.random.get_state()[1:3], strict=True):
        assert numpy.array_equal(old, new)


def test_a_later_stage_with_other_settings_is_refused_before_an_earlier_one_trains(tmp_path):
    run, protocol = run_of(tmp_path), run_of(tmp_path).recipe.protocols[0]
    held = run_of(tmp_path, "finetune.smoothing=0.3")
    with Run(run.root / "finetune-scratch", held.settings(held.recipe.protocols[0], "scratch"), run.fabric.device) as begun:
        begun.finish({"hours": 0.0})
    (line,) = refused(run)
    assert line.startswith("finetune-scratch: ") and f"protocol.smoothing: 0.3 there, {protocol.smoothing} requested" in line
    preflight.check([held])


def test_a_finished_run_is_shown_again_even_if_its_label_list_is_missing(tmp_path):
    run = run_of(tmp_path, "knn.label_list=gone.txt")
    assert any("protocol knn" in line for line in refused(run))
    knn = next(protocol for protocol in run.recipe.protocols if protocol.name == "knn")
    with Run(run.root / "knn-pretrained", run.settings(knn, "pretrained"), run.fabric.device) as done:
        done.finish({"hours": 0.0})
    preflight.check([run])


def test_an_unusable_log_folder_is_refused_before_training(tmp_path):
    (tmp_path / "droppos").write_text("a file where a folder should be")
    run = run_of(tmp_path / "runs")
    assert any(line.startswith("--record: ") and "is a file" in line for line in refused(run, tmp_path, record=True))


def test_all_invalid_values_are_reported_at_once_and_settings_are_checked_together():
    recipe = choose_recipe(paper_module("droppos"), "digits", None)[1]
    with pytest.raises(RecipeError) as error:
        override(recipe, ["pretrain.epochs=0", "linear.stage.ema=2", "knn.temperature=0", "pretrain.augmentation.flip=2", "a.b=1"])
    places = {line.split("=")[0].split(":")[0] for line in str(error.value).splitlines()}
    assert places == {"pretrain.epochs", "linear.stage.ema", "protocol knn", "pretrain.augmentation.flip", "a.b"}
    changed = override(recipe, ["linear.layers=[1, 4]", "linear.kind=logistic", "linear.layers=[4]"])
    assert next((p.kind, p.layers) for p in changed.protocols if p.name == "linear") == ("logistic", (4,))


@pytest.mark.parametrize(
    "change",
    "epochs=0 cooldown_epochs=-1 device_batch=0 base_lr=-1 warmup_epochs=-1 weight_decay=-0.1 ema=1 layer_decay=0 clip_norm=0 "
    "milestones=[5,3] freeze_epoch=0 betas=[0.9,1] lr_batch=0 augmentation.randaugment=rand-m9-inc augmentation.erase=2".split(),
)
def test_an_invalid_stage_value_is_refused_by_path_and_value(change):
    recipe = choose_recipe(paper_module("droppos"), "digits", None)[1]
    with pytest.raises(RecipeError) as error:
        override(recipe, [f"pretrain.{change}"])
    assert str(error.value).startswith(f"pretrain.{change.partition('=')[0]}=")


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--batch", "0"], ["--device", "gpu"], ["--size", "micro"]])
def test_invalid_options_of_the_speed_benchmark_are_refused_before_it_measures(words, monkeypatch, capsys):
    monkeypatch.setattr(steps, "make_steps", None)
    with pytest.raises(SystemExit) as stopped:
        steps.main(["--device", "cpu", "--paper", "mae", *words])
    assert stopped.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_file_that_cannot_store_a_measurement_is_refused_before_measuring(tmp_path):
    (tmp_path / "speed.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column backbone"):
        check_kept(tmp_path / "speed.csv", ["backbone"])
    check_kept(tmp_path / "new.csv", ["backbone"])


@pytest.mark.parametrize("count", [2, 3, 5, 15])
def test_mixup_mixes_every_image_of_an_odd_batch_with_another_one(count):
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 1, 4, 4)
    blended, targets = Supervision(count, mixup=0.8).blend(images, torch.arange(count))
    assert blended.shape == images.shape and targets.shape == (count, count)
    assert ((targets > 0).sum(1) == 2).all() and (targets.gather(1, torch.arange(count)[:, None]) > 0).all()
    torch.testing.assert_close((targets * torch.arange(count)).sum(1), blended[:, 0, 0, 0])


def test_recipes_are_found_if_annotations_are_strings():
    module = ModuleType("paper")
    source = """from __future__ import annotations
import functools
import common.recipe
from common.recipe import Recipe
class Own(Recipe): ...
def small() -> Recipe: ...
def quoted() -> "Recipe": ...
def dotted() -> common.recipe.Recipe: ...
def derived() -> Own: ...
@functools.cache
def cached() -> Recipe: ...
def other() -> int: ...
def changed(recipe: Recipe) -> Recipe: ...
def _private() -> Recipe: ...
"""
    exec(compile(source, "paper", "exec", dont_inherit=True), module.__dict__)
    assert list(recipes(module)) == ["small", "quoted", "dotted", "derived", "cached"]


def test_recipes_are_found_without_the_type_import_and_a_module_without_recipes_fails():
    module = ModuleType("paper")
    exec(compile("from __future__ import annotations\ndef small() -> Recipe: ...\n", "paper", "exec", dont_inherit=True), module.__dict__)
    assert list(recipes(module)) == ["small"]
    with pytest.raises(RecipeError, match="empty has no recipe: a recipe is a public function without parameters"):
        choose_recipe(ModuleType("empty"), "digits", None)


@pytest.mark.parametrize("paper", [*papers(), *baselines()])
def test_no_recipe_has_micro_batches_of_one_image_on_1_to_8_devices(paper):
    for make in recipes(paper_module(paper)).values():
        recipe = make()
        for stage in (recipe.pretrain, *(protocol.stage for protocol in recipe.protocols if protocol.stage)):
            for devices in (1, 2, 4, 8):
                if stage.batch_size % devices == 0:
                    assert device_batch(stage, devices) > 1
