"""Tests of StoP's and I-JEPA's recipes: published settings, models, and the output of a run."""

import csv
import re

import pytest
import torch

from benchmarks.papers import ROOT, paper_module, recipes
from benchmarks.reproduce import main
from common.recipe import choose_arms
from stop.method import StoP

STOP, IJEPA = (recipes(paper_module(name)) for name in ("stop", "ijepa"))
FIELDS = "epochs batch_size lr warmup_epochs warmup_lr min_lr weight_decay final_weight_decay freeze_epoch".split()


def settings(recipe) -> list:
    return [getattr(recipe.pretrain, name) for name in FIELDS]


@pytest.mark.parametrize(
    ("recipe", "printed", "sigma", "depth"),
    [
        (STOP["imagenet_vitb16"], [600, 2048, 8e-4, 15, 2e-4, 1e-4, 0.04, 0.4, None], 0.25, 6),
        (STOP["imagenet_vitl16"], [600, 2048, 8e-4, 15, 2e-4, 1e-4, 0.04, 0.4, None], 0.25, 12),
        (STOP["imagenet_vith16"], [300, 2048, 1e-3, 40, 2e-4, 1e-6, 0.04, 0.4, 250], 0.2, 12),
        (STOP["imagenet_vith14"], [300, 2048, 1e-3, 40, 2e-4, 1e-6, 0.04, 0.4, None], 0.2, 12),
        (STOP["imagenet_ablation"], [300, 2048, 1e-3, 15, 2e-4, 1e-4, 0.04, 0.4, None], 0.25, 6),
        (IJEPA["imagenet_vitb16"], [600, 2048, 1e-3, 15, 1e-4, 1e-6, 0.04, 0.4, None], None, 6),
        (IJEPA["imagenet_vitl16"], [600, 2048, 1e-3, 15, 1e-4, 1e-6, 0.04, 0.4, None], None, 12),
        (IJEPA["imagenet_vith14"], [300, 2048, 1e-3, 40, 2e-4, 1e-6, 0.04, 0.4, None], None, 12),
        (IJEPA["imagenet_vith16_448"], [300, 2048, 1e-3, 40, 2e-4, 1e-6, 0.04, 0.4, None], None, 12),
    ],
)
def test_imagenet_recipes_have_the_settings_of_papers_and_configurations(recipe, printed, sigma, depth):
    recipe = recipe()
    assert settings(recipe) == printed and recipe.pretrain.betas == (0.9, 0.999) and recipe.pretrain.clip_norm is None
    with torch.device("meta"):
        model = paper_module("stop").build(recipe, recipe.build_encoder(3), 1000)
    assert len(model.predictor.blocks) == depth and model.predictor.embed.out_features == 384 and model.momentum == 0.996
    assert (model.noise, model.masks.sampling) == ("none" if sigma is None else "masked", "released")
    assert sigma is None or model.sigma == sigma
    shown = recipe.pretrain.augmentation
    assert (shown.crop, shown.scale, shown.interpolation) == ("resized", (0.3, 1.0), "bilinear")
    assert (shown.flip, shown.grey, shown.blur) == ((0.0, 0.0, 0.0) if sigma is None else (0.5, 0.2, 0.5))


@pytest.mark.parametrize(
    ("name", "encoder", "predictor"),
    [("imagenet_vitb16", 85.80, 11.31), ("imagenet_vitl16", 303.30, 22.16), ("imagenet_vith16", 630.92, 22.35)],
)
def test_models_have_the_official_number_of_parameters(name, encoder, predictor):
    """The official numbers include fixed positions and the predictor's mask token, which StoP does not use."""
    recipe = STOP[name]()
    with torch.device("meta"):
        model = paper_module("stop").build(recipe, recipe.build_encoder(3), 1000)

    def millions(module: torch.nn.Module) -> float:
        return sum(tensor.numel() for tensor in module.state_dict().values()) / 1e6

    assert millions(model.encoder) == pytest.approx(encoder, abs=0.005)
    assert millions(model.predictor) == pytest.approx(predictor, abs=0.005)


@pytest.mark.parametrize("name", [name for name in STOP if not name.startswith("transfer")])
def test_all_arms_of_a_recipe_have_the_same_masks_augmentation_and_epochs(name):
    arms = choose_arms(STOP[name]())
    ijepa, stop = arms["ijepa"], arms["ijepa+stop"]
    assert ijepa.method["noise"] == "none" and ijepa.method["mode"] == "paper" and "noise" not in stop.method
    same = [{key: value for key, value in arm.method.items() if key not in ("noise", "mode")} for arm in (ijepa, stop)]
    assert same[0] == same[1] and (ijepa.pretrain, ijepa.protocols, ijepa.encoder) == (stop.pretrain, stop.protocols, stop.encoder)


def test_every_arm_of_every_recipe_can_be_built():
    for made in (*STOP.values(), *IJEPA.values()):
        for arm in choose_arms(made()).values():
            with torch.device("meta"):
                assert isinstance(paper_module("stop").build(arm, arm.build_encoder(3), 10), StoP)


@pytest.mark.parametrize(
    ("name", "epochs", "milestones", "crop"),
    [
        ("transfer_cifar100", 28, (8, 16, 24), "resized"),
        ("transfer_places205", 14, (4, 8, 12), "resized"),
        ("transfer_inat18", 84, (24, 48, 72), "resized"),
        ("transfer_clevr_count", 50, (), "squash"),
        ("transfer_clevr_dist", 100, (), "squash"),
    ],
)
def test_transfer_recipes_have_the_expected_settings(name, epochs, milestones, crop):
    (probe,) = STOP[name]().protocols
    stage = probe.stage
    assert (stage.epochs, stage.milestones, stage.augmentation.crop, stage.augmentation.flip) == (epochs, milestones, crop, 0.5)
    assert (stage.optimizer, stage.betas[0], stage.lr, stage.batch_size, stage.weight_decay) == ("sgd", 0.9, 0.01, 256, 5e-4)
    assert stage.min_lr == (0 if milestones else 1e-4)
    assert (probe.layers, probe.heads, probe.resize) == ((1, 4), ("norm_affine", "linear"), None if milestones else 0)


def test_results_in_docstrings_are_published_ones():
    with open(ROOT / "stop/published.csv") as stop, open(ROOT / "benchmarks/baselines/published.csv") as others:
        values = {row["value"] for file in (stop, others) for row in csv.DictReader(file)}
    quoted = {
        number
        for made in (*STOP.values(), *IJEPA.values())
        for number in re.findall(r"\b\d\d\.\d\b", made.__doc__)
        if not made.__name__.startswith(("digits", "cifar"))
    }
    assert len(quoted) > 20 and quoted <= values


def test_a_run_prints_ijepa_and_stop_side_by_side_and_saves_a_figure(tmp_path, capsys):
    short = [word for change in ("linear.stage.epochs=1",) for word in ("--set", change)]
    assert main(["stop", "--device", "cpu", "--epochs", "1", "--out", str(tmp_path), *short]) == 0
    said = capsys.readouterr().out
    cells = " ".join(word for word in said.split() if word != "│")
    assert "arm ijepa:" in said and "arm ijepa+stop:" in said
    assert re.search(r"Protocol.*Alone.*\+ STOP.*From scratch", said)
    for protocol in ("linear last", "linear last4", "linear best", "logistic 20 per class", "knn"):
        assert protocol in cells or protocol.rpartition(" ")[0] in cells
    for arm in ("ijepa", "ijepa+stop"):
        directory = tmp_path / "stop" / f"digits-{arm}-1ep-seed0" / "pretrain"
        assert (directory / "blocks.png").stat().st_size > 0
        assert {"context", "feature_std", "rankme"} < set(
            (directory / "metrics.jsonl").read_text().replace('"', "").replace(":", "").split()
        )
