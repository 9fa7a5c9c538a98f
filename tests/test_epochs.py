"""Tests of --every: evaluations after some epochs of pre-training."""

import dataclasses

import pandas
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import reproduce
from benchmarks.reproduce import main
from common.train import Stopped
from tests.tiny import STAGE, Tiny, train

RUN = ["droppos", "--device", "cpu", "--epochs", "3", "--stages", "pretrain", "knn"]


def kept(out, name: str) -> bytes:
    return (out / "droppos" / "digits-3ep-seed0" / "pretrain" / name).read_bytes()


def test_after_each_epoch_the_callback_gets_the_average_as_it_is_then(tmp_path):
    seen = {}

    def keep(epoch: int, model: torch.nn.Module) -> None:
        seen[epoch] = model.layer.weight.detach().clone()

    _, trained = train(tmp_path, Tiny(), dataclasses.replace(STAGE, ema=0.5), after_epoch=keep)
    assert sorted(seen) == [1, 2] and not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], trained.layer.weight)


def test_after_each_checkpoint_the_callback_gets_the_average_that_was_saved(tmp_path):
    seen = []

    def compare(model: torch.nn.Module) -> None:
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        same = [
            torch.equal(saved[part][name], model.layer.weight)
            for part, name in (("average", "module.layer.weight"), ("model", "layer.weight"))
        ]
        seen.append((saved["progress"]["step"], *same))

    train(tmp_path, Tiny(), dataclasses.replace(STAGE, ema=0.5), after_save=compare, checkpoint_seconds=0)
    assert len(seen) > 1 and all(average for _, average, _ in seen) and seen[-1] == (6, True, False)


def test_a_stopped_run_has_the_encoder_of_its_checkpoint_and_no_evaluation_uses_it(tmp_path, capsys, monkeypatch):
    steps = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr("common.train.stop_requested", lambda: next(steps) >= 15)
        with pytest.raises(Stopped):
            main([*RUN, "--out", str(tmp_path)])
    folder = tmp_path / "droppos" / "digits-3ep-seed0"
    saved = torch.load(folder / "pretrain" / "checkpoint.pt", weights_only=True)["model"]
    encoder = load_file(folder / "pretrain" / "encoder.safetensors")
    assert encoder and all(torch.equal(tensor, saved[f"encoder.{name}"]) for name, tensor in encoder.items())
    assert main([*RUN[:-2], "knn", "--out", str(tmp_path)]) == 2
    assert "is not finished, and the protocols need its encoder" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in folder.iterdir()] == ["pretrain"]


def test_the_encoders_after_some_epochs_are_evaluated_into_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.reproduce.record", lambda rows, *_: recorded.extend(rows))
    recorded: list = []
    assert main([*RUN, "--every", "1", "--seeds", "2", "--record", "--out", str(tmp_path)]) == 0
    table = pandas.read_csv(tmp_path / "droppos" / "epochs.csv")
    assert table[["seed", "epoch"]].values.tolist() == [[0, 1], [0, 2], [0, 3], [1, 1], [1, 2], [1, 3]]
    assert set(table["protocol"]) == {"knn"} and table["commit"].notna().all() and table["settings"].str.contains("neighbours").all()
    last = {row.seed: row.value for row in recorded if row.protocol == "knn" and row.start == "pretrained"}
    assert table.query("epoch == 3").set_index("seed")["top1"].to_dict() == pytest.approx(last)
    assert {row.start for row in recorded} == {"pretrained", "random", "pixels"}  # the ledger has whole runs only
    encoders = [kept(tmp_path, name) for name in ("encoder-1ep.safetensors", "encoder-2ep.safetensors", "encoder.safetensors")]
    assert len(set(encoders)) == 3
    assert "epochs.csv" in capsys.readouterr().out.replace("\n", "")


def test_a_stopped_run_keeps_the_same_encoders_as_an_undisturbed_one(tmp_path, monkeypatch):
    command = [*RUN[:-2], "pretrain", "--every", "1", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert main(["droppos", "--device", "cpu", "--epochs", "3", "--stages", "pretrain", "--out", str(tmp_path / "plain")]) == 0
    assert kept(tmp_path / "whole", "encoder.safetensors") == kept(tmp_path / "plain", "encoder.safetensors")
    steps = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr("common.train.stop_requested", lambda: next(steps) >= 11 + 4)  # in the second of three epochs of 11 steps
        with pytest.raises(Stopped):
            main([*command, str(tmp_path / "stopped")])
    assert main([*command, str(tmp_path / "stopped")]) == 0
    for epoch in (1, 2):
        name = f"encoder-{epoch}ep.safetensors"
        assert kept(tmp_path / "stopped", name) == kept(tmp_path / "whole", name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every", "3"], "EVERY=3, and the pre-training has 3 epochs: use fewer than these"),
        (["--every", "1"], "was past epoch 1 when EVERY=1 was asked for: use another OUT"),
    ],
)
def test_epochs_that_cannot_be_evaluated_are_refused_before_training(arguments, message, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "droppos" / "digits-3ep-seed0" / "pretrain"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text('{"saved": 11, "total": 33, "step": 11, "epoch": 1, "time": 0}')
    monkeypatch.setattr(reproduce.Stages, "run", None)
    assert main([*RUN, *arguments, "--out", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().out.split())
