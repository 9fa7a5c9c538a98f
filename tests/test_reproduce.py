"""Tests of the reproduce command, from the command line to the table and the ledger."""

import json
import re
import shutil
import subprocess

import pytest
import timm
import torch
from safetensors.torch import load_file, save

from benchmarks import reproduce
from benchmarks.ledger.rows import load
from benchmarks.papers import choose_recipe, paper_module
from benchmarks.preflight import check
from benchmarks.reproduce import Options, main
from benchmarks.stages import Stages
from common.convert import rename
from common.data import open_data
from common.evaluate import Classifier, FeatureLoader, protocols
from common.recipe import RecipeError, override
from common.train import make_fabric
from droppos.method import OFFICIAL_NAMES

SHORT = ["finetune", "finetune_20_per_class", "finetune_5_per_class", "linear"]
CHANGES = [word for name in SHORT for word in ("--set", f"{name}.stage.epochs=1")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with a finished run of two epochs."""
    out = tmp_path_factory.mktemp("runs")
    assert main(["droppos", "--device", "cpu", "--epochs", "2", "--out", str(out), *CHANGES]) == 0
    return out


def test_a_run_saves_all_files_needed_to_check_it(finished):
    directory = finished / "droppos" / "digits-2ep-seed0" / "pretrain"
    for name in ("recipe.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "encoder.safetensors", "log.txt", "positions.png"):
        assert (directory / name).stat().st_size > 0, name
    recipe = json.loads((directory / "recipe.json").read_text())
    assert recipe["recipe"]["pretrain"]["epochs"] == 2 and recipe["seed"] == 0
    assert {"commit", "torch", "timm", "device"} <= json.loads((directory / "environment.json").read_text())[0].keys()
    starts = {path.name for path in directory.parent.iterdir()}
    assert {"finetune-pretrained", "finetune-scratch", "linear-random", "knn-pixels", "finetune_5_per_class-scratch"} <= starts


def test_timm_loads_the_encoder_of_a_run_without_missing_tensors(finished):
    state = load_file(finished / "droppos" / "digits-2ep-seed0" / "pretrain" / "encoder.safetensors")
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 6, "num_heads": 3}
    encoder = timm.models.VisionTransformer(**shape, num_classes=0)
    encoder.load_state_dict(state)
    # the weights differ from the initial ones
    fresh = choose_recipe(paper_module("droppos"), "digits", None)[1].build_encoder(1)
    assert not torch.equal(encoder.blocks[0].attn.qkv.weight, fresh.blocks[0].attn.qkv.weight)


def test_a_second_call_trains_nothing_and_prints_the_same_table(finished, capsys):
    metrics = sorted(finished.glob("*/*/*/metrics.jsonl"))
    before = [path.read_bytes() for path in metrics]
    assert main(["droppos", "--device", "cpu", "--epochs", "2", "--out", str(finished), *CHANGES]) == 0
    said = capsys.readouterr().out
    assert " step " not in said and "finetune" in said and "raw pixels" in said
    assert [path.read_bytes() for path in metrics] == before


def test_only_pretrained_fine_tuning_starts_from_the_pretrained_weights(finished):
    """In the first step the two differ only in their encoders."""
    directory = finished / "droppos" / "digits-2ep-seed0"
    first = [
        json.loads((directory / f"finetune-{start}" / "metrics.jsonl").read_text().splitlines()[0]) for start in ("pretrained", "scratch")
    ]
    assert first[0]["lr"] == first[1]["lr"] and first[0]["loss"] != first[1]["loss"]


def test_pretrained_and_scratch_fine_tuning_start_with_the_same_head(finished):
    module, data = paper_module("droppos"), open_data("digits")
    name, recipe = choose_recipe(module, "digits", None)
    recipe = override(recipe, ["pretrain.epochs=2"])
    run = Stages(module, name, recipe, data, make_fabric("cpu"), seed=0, out=finished)
    heads, encoders = [], []
    for start in ("pretrained", "scratch"):
        encoders.append(run.start_encoder(start, recipe.protocols[0]))
        heads.append(Classifier(encoders[-1], data.classes, recipe.protocols[0]).head.weight)
    assert torch.equal(*heads) and not torch.equal(*(encoder.patch_embed.proj.weight for encoder in encoders))


def test_recording_writes_every_result_and_its_log_to_the_papers_folder(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "droppos").mkdir()
    assert main(["droppos", "--device", "cpu", "--epochs", "2", "--out", str(finished), "--record", *CHANGES]) == 0
    ledger = load(tmp_path / "droppos" / "results.csv")
    assert set(zip(ledger["protocol"], ledger["start"], strict=True)) == {
        ("pretrain", "pretrained"),
        *((name, start) for name in SHORT[:3] for start in ("pretrained", "scratch")),
        *((name, start) for name in ("linear", "knn") for start in ("pretrained", "random")),
        ("knn", "pixels"),
    }
    given = ledger[["recipe", "arm", "base_arm", "overrides", "encoder_file", "split"]].drop_duplicates()
    assert given.to_numpy().tolist() == [["digits", "", "", " ".join(CHANGES[1::2]), "", ""]]
    log = (tmp_path / ledger["log"][0]).read_text()
    assert "# pretrain" in log and "# finetune-scratch" in log and "step 22/22" in log
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert set(ledger["commit"]) <= {head, head + "+dirty", "unknown"}
    row = ledger[(ledger["protocol"] == "finetune") & (ledger["start"] == "pretrained")].iloc[0]
    result = json.loads((finished / "droppos" / "digits-2ep-seed0" / "finetune-pretrained" / "result.json").read_text())
    assert row["value"] == pytest.approx(result["top1"], abs=1e-4)


def test_an_official_checkpoint_replaces_pre_training(tmp_path, capsys):
    module = paper_module("droppos")
    recipe = choose_recipe(module, "digits", None)[1]
    method = module.build(recipe, recipe.build_encoder(1), 10)
    official = rename(method.state_dict(), {ours: theirs for theirs, ours in OFFICIAL_NAMES.items()})
    torch.save({"epoch": 800, "state_dict": {f"module.{name}": tensor for name, tensor in official.items()}}, tmp_path / "official.pth")
    arguments = ["droppos", "--device", "cpu", "--out", str(tmp_path), *CHANGES]
    assert main([*arguments, "--encoder", str(tmp_path / "official.pth")]) == 0
    said = capsys.readouterr().out
    assert "0 missing" in said and "mask_pos_token" in said
    assert ", 0 epochs of pre-training" in said  # the epochs of the official run do not count
    exported = load_file(tmp_path / "droppos" / "digits-official-seed0" / "pretrain" / "encoder.safetensors")
    assert all(torch.equal(tensor, method.encoder.state_dict()[name]) for name, tensor in exported.items())
    assert main([*arguments, "--encoder", str(tmp_path / "absent.pth")]) == 2
    assert "there is no checkpoint at" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "official.pth").rename(tmp_path / "elsewhere" / "official.pth")
    assert main([*arguments, "--encoder", str(moved)]) == 0  # a file is identified by its content, not its path
    torch.save({"state_dict": {name: tensor + 1 for name, tensor in method.state_dict().items()}}, moved)
    assert main([*arguments, "--encoder", str(moved)]) == 2
    assert "holds a run with other settings (encoder:" in " ".join(capsys.readouterr().out.split())


def test_arms_are_trained_and_printed_side_by_side_and_export_timms_backbone(tmp_path, capsys):
    arguments = ["positional_label", "--device", "cpu", "--epochs", "1", "--out", str(tmp_path), "--arms", "vit", "vit+rpl"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if re.match(r"│ vit +│ scratch", line))
    alone, added = re.fullmatch(r"│ vit +│ scratch +│ +([\d.]+) │ +[\d.]+ \(([+-][\d.]+)\) │", row).groups()
    runs = {name: tmp_path / "positional_label" / f"digits-{name}-1ep-seed0" / "pretrain" for name in ("vit", "vit+rpl")}
    top1 = {name: json.loads((run / "result.json").read_text())["top1"] for name, run in runs.items()}
    assert float(alone) == pytest.approx(top1["vit"], abs=0.01)
    assert float(added) == pytest.approx(top1["vit+rpl"] - top1["vit"], abs=0.02)
    states = [load_file(run / "encoder.safetensors") for run in runs.values()]
    assert states[0].keys() == states[1].keys()  # without the position head
    assert main(arguments[:-1]) == 0
    assert " step " not in capsys.readouterr().out  # this arm is already trained
    assert main([*arguments[:-1], "vitt"]) == 2
    assert "vitt" in capsys.readouterr().out


FROZEN = [
    "finetune.stage.epochs=1",
    "finetune_20_per_class.kind=linear",
    "finetune_20_per_class.stage.epochs=1",
    "finetune_20_per_class.stage.augmentation.crop=none",
    "finetune_20_per_class.layers=[1, 4]",
    'finetune_20_per_class.heads=["norm_affine", "linear"]',
    "finetune_20_per_class.lr_multipliers=[1, 2]",
    "finetune_5_per_class.kind=logistic",
    "finetune_5_per_class.layers=[4]",
    "finetune_5_per_class.statistics=own",
    "linear.kind=logistic",
]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A run with all kinds of evaluation of frozen features, and its rows."""
    out = tmp_path_factory.mktemp("frozen")
    return out, reproduce.reproduce(Options("droppos", device="cpu", epochs=1, out=out, set=FROZEN))


def test_a_grid_gives_the_best_row_per_number_of_layers_and_overall_on_held_out_images(frozen):
    out, rows = frozen
    mine = {row.protocol: row for row in rows if row.protocol.startswith("finetune_20") and row.start == "pretrained"}
    assert list(mine) == [f"finetune_20_per_class_{part}" for part in ("last", "last4", "best")]
    result = json.loads((out / "droppos" / "digits-1ep-seed0" / "finetune_20_per_class-pretrained" / "result.json").read_text())
    grid, held_out = ({one["settings"]: one[name] for one in result["results"][-1]["grid"]} for name in ("top1", "held_out_top1"))
    assert len(grid) == 8
    for part, row in mine.items():
        beginning = "" if part.endswith("best") else f"layers={part.rpartition('_')[2]} "
        assert row.value == round(grid[row.settings], 4)
        assert held_out[row.settings] == max(v for how, v in held_out.items() if how.startswith(beginning))
    assert result["top1"] == grid[mine["finetune_20_per_class_best"].settings]
    log = (out / "droppos" / "digits-1ep-seed0" / "finetune_20_per_class-pretrained" / "log.txt").read_text()
    assert all(f"{how}: top1 " in log for how in grid)


def test_every_row_contains_the_settings_of_its_result(frozen):
    said = {row.protocol: row.settings for row in frozen[1] if row.start == "pretrained"}
    assert said["finetune"] == "pool=mean" and said["pretrain"] == ""
    assert re.fullmatch(
        r"layers=last4? head=(norm_affine|linear) lr=[\d.e-]+ decay=0.05 pool=mean held_out=20 labels=200",
        said["finetune_20_per_class_best"],
    )
    assert said["finetune_5_per_class"] == "layers=last4 pool=mean statistics=own l2=0.0025 labels=50"
    assert said["linear"] == "layers=last pool=mean statistics=train l2=0.0025"
    assert said["knn"] == "layers=last pool=mean neighbours=20 temperature=0.07"
    pixels = next(row.settings for row in frozen[1] if row.start == "pixels")
    assert pixels == "neighbours=20 temperature=0.07"


def probe_of(out, *changes: str, data=None, protocol: str = "linear") -> tuple[dict, list]:
    """Return the result and the rows of a grid of probes on a random encoder, with 20 labels per class and two epochs."""
    module, data = paper_module("stop"), data or open_data("digits")
    name, recipe = choose_recipe(module, "digits", None)
    recipe = override(recipe, ["linear.stage.epochs=2", "linear.labels_per_class=20", *changes])
    run = Stages(module, name, recipe, data, make_fabric("cpu"), seed=0, out=out)
    check([run])
    rows = run.evaluate(next(own for own in recipe.protocols if own.name == protocol), "random")
    return json.loads((run.root / f"{protocol}-random" / "result.json").read_text()), rows


def test_the_choice_of_a_grid_does_not_depend_on_the_test_labels(tmp_path):
    chosen, values = set(), set()
    for shift in (0, 1, 3, 6):
        data = open_data("digits")
        data.val.labels = (data.val.labels + shift) % 10
        _, rows = probe_of(tmp_path / str(shift), data=data)
        chosen.add(tuple(row.settings for row in rows))
        values.add(tuple(row.value for row in rows))
    assert len(chosen) == 1 and len(values) == 4


def test_choose_on_test_reports_the_best_test_accuracy_of_the_grid(tmp_path):
    result, rows = probe_of(tmp_path, "linear.choose_on=test")
    assert rows[-1].value == round(max(one["top1"] for one in result["results"][-1]["grid"]), 4) == round(result["top1"], 4)
    assert all(one["held_out_top1"] is None for one in result["results"][-1]["grid"])


def test_a_row_contains_on_test_or_the_number_of_held_out_images(tmp_path):
    _, rows = probe_of(tmp_path / "held")
    assert [row.protocol for row in rows] == ["linear_last", "linear_last4", "linear_best"]
    assert all(row.settings.endswith("pool=mean held_out=20 labels=200") for row in rows)
    _, rows = probe_of(tmp_path / "test", "linear.choose_on=test")
    assert [row.protocol for row in rows] == ["linear_last_on_test", "linear_last4_on_test", "linear_best_on_test"]
    assert all(row.settings.endswith("pool=mean labels=200") for row in rows)
    _, rows = probe_of(tmp_path / "one", "linear.layers=[4]", 'linear.heads=["linear"]', "linear.lr_multipliers=[0.3]")
    assert [(row.protocol, row.settings) for row in rows] == [
        ("linear", "layers=last4 head=linear lr=0.3 decay=0.0005 pool=mean labels=200")
    ]


@pytest.mark.parametrize("crop", ["none", "padding"])
def test_training_and_held_out_images_are_disjoint_with_and_without_cached_features(crop, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(protocols, "fit", lambda *args, f=protocols.fit, **options: seen.append(args[4]) or f(*args, **options))
    monkeypatch.setattr(protocols, "accuracies", lambda *args, f=protocols.accuracies: seen.append(args[2]) or f(*args))
    probe_of(tmp_path, f"linear.stage.augmentation.crop={crop}")
    train, test, held = (getattr(loader, "loader", loader) for loader in seen)
    assert [isinstance(loader, FeatureLoader) for loader in seen] == [crop == "none"] * 3
    assert (len(train.split), len(held.split), len(test.split)) == (180, 20, 360) and held.augmentation is None is test.augmentation
    pictures = [{image.numpy().tobytes() for image in loader.split.images} for loader in (train, held)]
    whole = {image.numpy().tobytes() for image in open_data("digits").train.per_class(20, 0).images}
    assert not pictures[0] & pictures[1] and pictures[0] | pictures[1] == whole
    if crop == "none":
        assert [loader.target_N.tolist() for loader in seen] == [loader.split.labels.tolist() for loader in (train, test, held)]
        (features, _), images = next(seen[2].epoch(0)), next(held.epoch(0))[0]
        assert features.shape == (20, 4 * 96) and len(images) == 20


def test_a_run_killed_before_the_choice_resumes_to_the_same_choice(tmp_path, monkeypatch):
    undisturbed, _ = probe_of(tmp_path / "undisturbed")
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="killed"):
        broken.setattr(protocols, "accuracies", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        probe_of(tmp_path / "killed")
    torch.rand(5)
    resumed, _ = probe_of(tmp_path / "killed")
    assert len(undisturbed["results"][-1]["grid"]) > 1
    for one in (*resumed["results"], *undisturbed["results"]):
        for timed in (one, *one["grid"]):
            del timed["hours"]
    assert resumed["results"] == undisturbed["results"]


def test_a_grid_without_images_to_hold_out_is_refused_before_training(tmp_path):
    with pytest.raises(RecipeError, match="--set linear.choose_on=test"):
        probe_of(tmp_path, "linear.labels_per_class=1", protocol="knn")
    assert not list(tmp_path.rglob("*.pt"))


def test_cached_features_are_shared_by_all_protocols_that_read_them(frozen):
    names = [path.name for path in (frozen[0] / "droppos" / "digits-1ep-seed0" / "features").iterdir()]
    for start in ("pretrained", "random"):
        mine = sorted(name.rsplit("-", 1)[0] for name in names if name.startswith(start))
        # all labels for linear and k-NN; 20 and 5 labels per class with four layers; test images with one layer and with four
        assert mine == sorted(f"{start}-{part}-mean-8-bicubic" for part in ["train-last", *["train-last4"] * 2, "val-last", "val-last4"])


def test_features_of_another_encoder_are_refused(frozen, capsys):
    """Neither the finished evaluation nor the features of the old encoder are used."""
    directory = frozen[0] / "droppos" / "digits-1ep-seed0"
    (directory / "pretrain" / "encoder.safetensors").write_bytes(encoder_file(1.5))
    changes = [word for change in FROZEN for word in ("--set", change)]
    again = ["droppos", "--device", "cpu", "--epochs", "1", "--out", str(frozen[0]), *changes]
    assert main(again) == 2
    assert "finetune-pretrained holds a run with other settings (pretrained: encoder.safetensors" in capsys.readouterr().out
    for evaluation in directory.glob("*-pretrained"):
        shutil.rmtree(evaluation)
    assert main(again) == 2
    assert "holds features with another encoder; delete it" in capsys.readouterr().out


def encoder_file(scale: float) -> bytes:
    """An untrained encoder of the digits recipe, as a file."""
    fresh = choose_recipe(paper_module("droppos"), "digits", None)[1].build_encoder(1)
    return save({name: scale * tensor for name, tensor in fresh.state_dict().items()})
