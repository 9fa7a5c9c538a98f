"""Tests of the export of encoders to timm and transformers, and of the model card."""

import dataclasses
import json
import re
import socket
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks.papers import ROOT, baselines, folder, paper_module, papers
from benchmarks.reproduce import Options, plan
from benchmarks.reproduce import main as reproduce
from common.card import LOADING, _interval, model_card
from common.checkpoint import export_encoder
from common.evaluate import as_encoder, pool_tokens
from common.export import ExportError, export, main, open_run
from common.run import write_text
from common.train import make_fabric

SIDE = 8  # pixels of digits
# The digits recipe of each paper, whose encoder's position, pooling and class token are those of the paper, and other encoders.
RECIPES = [
    ("droppos", "", (), "ViTModel"),
    ("mp3", "", (), "ViTModel"),  # no position embedding
    ("mapet", "", (), "ViTModel"),
    ("mapet", "", ("encoder.layer_scale=0.1",), "TimmWrapperModel"),  # as in MaPeT's ImageNet recipes
    ("stop", "ijepa+stop", (), "TimmWrapperModel"),  # no class token
    ("ijepa", "", (), "TimmWrapperModel"),
    ("mae", "", (), "ViTModel"),
    ("deit", "", (), "ViTModel"),  # reads the class token
    ("deit", "", ("encoder.position=relative",), "TimmWrapperModel"),
    ("droppos", "", ("encoder.position=learned", "encoder.depth=2", "encoder.mlp_ratio=2"), "ViTModel"),
    ("positional_label", "vit+rpl", (), "TimmWrapperModel"),
    ("positional_label", "deit", (), "TimmWrapperModel"),
    ("positional_label", "swin", (), "TimmWrapperModel"),
]
ids = ["-".join(filter(None, [paper, arm, *changes])) for paper, arm, changes, _ in RECIPES]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise OSError("a test must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_run(out: Path, paper: str, arm: str = "", changes: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Write the files of a pre-training that an export reads, with random weights in place of trained ones."""
    options = Options(paper=paper, arms=(arm,) if arm else (), set=list(changes), out=out, device="cpu", first_seed=seed)
    (stages,) = plan(options, make_fabric("cpu", "32-true"))
    method = stages.build_method()
    for parameter in method.encoder.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    with stages.open("pretrain") as (run, _):
        export_encoder(method.encoder, run.directory / "encoder.safetensors")
        write_text(run.directory / "progress.json", json.dumps({"step": 20, "total": 30, "saved": 10}))
    return stages.root


def images(run: Path) -> torch.Tensor:
    trained = open_run(run)
    return torch.randn(3, 1, *trained.encoder.image_size, generator=torch.Generator().manual_seed(5))


def our_feature(run: Path, given: torch.Tensor) -> torch.Tensor:
    """One feature per image, as the frozen evaluations of the recipe read it."""
    trained = open_run(run)
    encoder = as_encoder(trained.encoder, 1, trained.encoder.image_size)
    return pool_tokens(encoder(given), encoder, trained.pool)


@pytest.mark.parametrize(("paper", "arm", "changes", "_"), RECIPES, ids=ids)
@torch.no_grad()
def test_timm_loads_an_export_with_the_features_of_the_evaluations(paper, arm, changes, _, tmp_path):
    run = make_run(tmp_path / "runs", paper, arm, changes)
    assert export(run, "timm", tmp_path / "model") == "timm.create_model"
    model, given = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval(), images(run)
    if paper == "positional_label":  # with its classifier
        assert model(given).shape == (3, 10)
        torch.testing.assert_close(model.forward_features(given), open_run(run).encoder.forward_features(given), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(model(given), our_feature(run, given), rtol=1e-5, atol=1e-5)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"][1:] == tuple(given.shape[2:]) and data["mean"] == pytest.approx((0.3054,), abs=1e-4)


@pytest.mark.parametrize(("paper", "arm", "changes", "name"), RECIPES, ids=ids)
@torch.no_grad()
def test_transformers_loads_an_export_with_the_features_of_the_evaluations(paper, arm, changes, name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[export]'")
    run = make_run(tmp_path / "runs", paper, arm, changes)
    assert export(run, "transformers", tmp_path / "model") == f"transformers.{name}"
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, given = getattr(transformers, name).from_pretrained(tmp_path / "model", **options).eval(), images(run)
    found, trained = model(given), open_run(run)
    tokens = found.last_hidden_state
    if paper == "positional_label":
        ours = trained.encoder.forward_features(given)
        torch.testing.assert_close(tokens, ours, rtol=1e-5, atol=1e-5)
    else:
        pooled = tokens[:, 0] if trained.pool == "class" else tokens[:, trained.encoder.prefix_tokens :].mean(1)
        torch.testing.assert_close(pooled, our_feature(run, given), rtol=1e-5, atol=1e-5)
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "model")).__name__ == name


@pytest.mark.parametrize("target", ["timm", "transformers"])
def test_a_backbone_that_the_method_has_changed_is_refused_and_nothing_is_written(target, tmp_path, capsys):
    if target == "transformers":
        pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[export]'")
    run = make_run(tmp_path / "runs", "positional_label", "swin_released+rpl")
    assert main([str(run), "--to", target, str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert "neither timm nor transformers has this encoder, because the method has changed timm's SwinTransformer" in said
    assert "cpe" in said and "as its README shows" in said and not list(tmp_path.glob("model*"))


def test_a_model_that_timm_has_no_name_for_is_refused_with_a_fix(tmp_path, capsys):
    run = make_run(tmp_path / "runs", "positional_label", "nest+apl")
    assert main([str(run), "--to", "timm", str(tmp_path / "model")]) == 2
    assert "timm has no name for models of the class Nest: train with --set size= and a name of timm" in capsys.readouterr().err


def test_an_export_with_other_features_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    run = make_run(tmp_path / "runs", "droppos")
    monkeypatch.setattr("common.export.timm.create_model", lambda *_, **__: timm.models.VisionTransformer(**SHAPE))
    with pytest.raises(ExportError, match=r"does not give the tokens of the encoder \(difference .*nothing was written"):
        export(run, "timm", tmp_path / "model")
    assert not list(tmp_path.glob("model*"))


SHAPE = {"img_size": SIDE, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 0}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("recipe.json", "give the folder of a run"),
        ("encoder.safetensors", "wait for the first checkpoint"),
        ("card.json", "repeat the command that made the run"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_with_a_fix(missing, message, tmp_path, capsys):
    run = make_run(tmp_path / "runs", "droppos")
    (run / "pretrain" / missing).unlink()
    assert main([str(run), "--to", "timm", str(tmp_path / "model")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_files_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    assert main([str(make_run(tmp_path / "runs", "droppos")), "--to", "timm", str(tmp_path / "model")]) == 2
    assert "is not an empty folder: name a new one" in capsys.readouterr().err


def test_without_transformers_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.export.find_spec", lambda name: None)
    assert main([str(tmp_path), "--to", "transformers", str(tmp_path / "model")]) == 2
    assert "transformers is not installed: pip install -e '.[export]'" in capsys.readouterr().err


# ---- the card


def card_of(run: Path) -> str:
    trained = open_run(run)
    return model_card(run, trained.settings, trained.card, "timm.create_model", "")


def test_the_card_of_an_unfinished_run_says_how_far_it_is(tmp_path):
    text = card_of(make_run(tmp_path, "droppos"))
    assert "**The training is not finished: step 10 of 30.**" in text and "No evaluation is finished." in text


def test_the_card_of_a_real_run_has_its_numbers_over_the_seeds_beside_it(tmp_path):
    command = ["droppos", "--device", "cpu", "--epochs", "1", "--stages", "pretrain", "knn", "--out", str(tmp_path / "runs")]
    assert reproduce([*command, "--seeds", "2"]) == 0
    runs = sorted(tmp_path.glob("runs/droppos/*"))
    found = [json.loads((run / "knn-pretrained" / "result.json").read_text())["top1"] for run in runs]
    mean, half = sum(found) / 2, 12.7062 * abs(found[0] - found[1]) / 2  # the 97.5 % quantile of t with one degree of freedom
    assert main([str(runs[0]), "--to", "timm", str(tmp_path / "model")]) == 0
    text = (tmp_path / "model" / "README.md").read_text()
    (row,) = re.findall(r"^\| knn \| (\S+) ± (\S+) \(95 % t interval, 2 seeds\) \| (.*) \|$", text, re.MULTILINE)
    assert [float(row[0]), float(row[1])] == pytest.approx([mean, half], abs=0.006) and "neighbours=20" in row[2]
    assert json.loads((runs[0] / "pretrain" / "result.json").read_text())["environment"]["commit"] in text
    other = json.loads((runs[1] / "knn-pretrained" / "result.json").read_text())
    other["environment"]["commit"] = "another"
    (runs[1] / "knn-pretrained" / "result.json").write_text(json.dumps(other))
    assert f"| knn | {found[0]:.2f} (one seed) |" in card_of(runs[0])


def test_the_interval_of_three_seeds_is_that_of_the_t_distribution():
    assert _interval([90.0, 91.0, 92.0]) == "91.00 ± 2.48 (95 % t interval, 3 seeds)"  # 4.3027 / sqrt(3)


@pytest.mark.parametrize("paper", ["stop", "ijepa", "mae"])
def test_the_card_names_the_licence_of_an_official_code_that_restricts_its_use(paper, tmp_path):
    run = make_run(tmp_path, paper, "ijepa+stop" if paper == "stop" else "")
    assert "is CC BY-NC 4.0; no part of it was used" in card_of(run)
    path = run / "pretrain" / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_file": "official.pth"}))
    text = " ".join(card_of(run).split())
    assert "from the file `official.pth`" in text and "the licence of that file applies. The [official code]" in text


@pytest.mark.parametrize("paper", [*papers(), *baselines()])
def test_every_method_names_its_paper_as_its_page_does(paper):
    source = paper_module(paper).SOURCE
    page = " ".join((ROOT / folder(paper) / "README.md").read_text().split())
    title = re.search(r"\*(.+)\*", source.citation)[1]
    assert f"*{title}*" in page and f"https://arxiv.org/abs/{source.arxiv}" in page
    assert not source.code or f"https://github.com/{source.code}" in page
    assert all(isinstance(getattr(source, field.name), str) for field in dataclasses.fields(source)) and source.name


def test_every_loading_code_of_the_card_compiles():
    for code in LOADING.values():
        compile(code, "card", "exec")
