"""Tests of the training loop."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.method import Output
from common.run import Run, RunError
from common.train import EXIT_STOPPED, Stopped, make_fabric
from tests.tiny import STAGE, Tiny, train

ROOT = Path(__file__).resolve().parents[1]


def lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_gradient_accumulation_gives_the_same_training_as_one_large_batch(tmp_path):
    whole, trained = train(tmp_path / "whole", Tiny())
    parts, accumulated = train(tmp_path / "parts", Tiny(), dataclasses.replace(STAGE, device_batch=100))
    assert [line["loss"] for line in lines(parts)] == pytest.approx([line["loss"] for line in lines(whole)], abs=1e-6)
    torch.testing.assert_close(accumulated.layer.weight, trained.layer.weight, atol=1e-6, rtol=1e-5)


class Weighted(Tiny):
    """A weighted mean over the images, with weights that differ."""

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> Output:
        loss_B = torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), targets, reduction="none")
        weight_B = 1.0 + targets**2
        return Output((loss_B * weight_B).sum() / weight_B.sum(), weight=weight_B.sum())


def test_a_weighted_mean_is_over_the_effective_batch(tmp_path):
    _, trained = train(tmp_path / "whole", Weighted())
    _, accumulated = train(tmp_path / "parts", Weighted(), dataclasses.replace(STAGE, device_batch=50))
    torch.testing.assert_close(accumulated.layer.weight, trained.layer.weight, atol=1e-6, rtol=1e-5)


def test_a_line_of_metrics_has_the_mean_over_its_steps_and_the_last_lr(tmp_path):
    run, _ = train(tmp_path, Tiny())
    assert [line["step"] for line in lines(run)] == [3, 6]
    assert [line["epoch"] for line in lines(run)] == [1.0, 2.0]
    lr = 1e-3 * 400 / 256
    assert lines(run)[0]["lr"] == pytest.approx(lr * 0.75)  # half-cosine over six steps, at step 2


def test_at_step_is_called_at_every_step(tmp_path):
    model = Tiny()
    train(tmp_path, model)
    assert model.at == [(step, 6) for step in range(6)]


def test_a_cooldown_adds_epochs_at_the_lowest_lr(tmp_path):
    class Rating(Tiny):
        def at_step(self, step: int, total_steps: int) -> None:
            super().at_step(step, total_steps)
            self.weight = self.layer.weight.detach().clone()

    model, stage = Rating(), dataclasses.replace(STAGE, cooldown_epochs=2)
    run, trained = train(tmp_path, model, stage)
    assert model.at == [(step, 12) for step in range(12)]  # three steps per epoch
    assert [(line["epoch"], line["lr"] > 0) for line in lines(run)] == [(1.0, True), (2.0, True), (3.0, False), (4.0, False)]
    assert trained.at[-1] == (11, 12)  # the returned model got the last step of the whole run
    assert torch.equal(trained.layer.weight, model.weight)  # weights do not change at lr 0: this is the end of the half-cosine


def test_training_with_ema_returns_the_averaged_weights(tmp_path):
    plain = Tiny()
    train(tmp_path / "plain", plain)
    followed = Tiny()
    _, averaged = train(tmp_path / "average", followed, dataclasses.replace(STAGE, ema=0.5))
    torch.testing.assert_close(followed.layer.weight, plain.layer.weight)  # the EMA does not change the training
    assert not torch.allclose(averaged.layer.weight, plain.layer.weight)
    # The EMA of the last steps is closer to the end than to the start.
    start, end = Tiny().layer.weight, plain.layer.weight
    assert (averaged.layer.weight - end).norm() < (averaged.layer.weight - start).norm()


def test_clipping_limits_the_gradient_norm_and_logs_the_norm_before_clipping(tmp_path):
    run, trained = train(tmp_path / "clipped", Tiny(), dataclasses.replace(STAGE, epochs=1, clip_norm=1e-9, weight_decay=0.0))
    assert all(line["gradient_norm"] > 1e-9 for line in lines(run))
    # AdamW divides by sqrt(v) + 1e-8: gradients this small hardly change a weight.
    assert (trained.layer.weight - Tiny().layer.weight).abs().max() < 0.2 * STAGE.lr


def test_a_signal_finishes_the_step_saves_and_exits_with_75(tmp_path):
    class Interrupted(Tiny):
        def at_step(self, step: int, total_steps: int) -> None:
            super().at_step(step, total_steps)
            if step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Stopped) as stopped:
        train(tmp_path / "stopped", Interrupted())
    assert stopped.value.code == EXIT_STOPPED == 75
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    resumed, _ = train(tmp_path / "stopped", Tiny())
    undisturbed, _ = train(tmp_path / "undisturbed", Tiny())
    assert resumed.metrics.read_text() == undisturbed.metrics.read_text()
    assert "resuming from step 4 of 6" in (tmp_path / "stopped" / "log.txt").read_text()


def test_a_run_records_the_commits_it_was_trained_with(tmp_path, monkeypatch):
    """A start without a checkpoint does not contribute to the result; one with a checkpoint does."""

    def starts(*commits: str) -> str:
        for commit, spoiled_step in zip(commits, (*[3] * (len(commits) - 1), None), strict=True):
            monkeypatch.setattr("common.run.environment", lambda device, commit=commit: {"commit": commit})
            try:
                run, _ = train(tmp_path / "-".join(commits), Tiny(spoiled_step), checkpoint_seconds=seconds)
            except RunError:
                continue
        with run:
            run.finish({"top1": 1.0})
        return run.result["environment"]["commit"]

    seconds = 1000.0  # no checkpoint before the end
    assert starts("old", "new") == "new"
    seconds = -1.0  # one after every step
    assert starts("first", "second") == "first+mixed"
    assert starts("same", "same") == "same"


def test_bf16_is_the_default_only_if_the_hardware_supports_it(monkeypatch):
    for found, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr("common.train.has_fast_bf16", lambda device, found=found: found)
        assert make_fabric("cpu")._precision.precision == expected


@pytest.mark.slow
def test_two_processes_train_on_the_same_effective_batches_as_one(tmp_path):
    """Fine-tuning without mixup and drop path has no random numbers in a step, so one and two devices log the same."""
    changes = [
        "finetune.drop_path=0",
        "linear.lr_multipliers=[1, 0.5]",
        *(f"{name}.stage.epochs=1" for name in ("finetune", "finetune_5_per_class", "finetune_20_per_class", "linear")),
    ]
    options = ["droppos", "--device", "cpu", "--precision", "32-true", "--epochs", "1", *(word for c in changes for word in ("--set", c))]
    launchers = {"one": [sys.executable, "-m"], "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]}
    logged, grids = {}, {}
    for name, launcher in launchers.items():
        command = [*launcher, "benchmarks.reproduce", *options, "--out", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        path = next((tmp_path / name).glob("*/*/finetune-scratch/metrics.jsonl"))
        logged[name] = [json.loads(line) for line in path.read_text().splitlines()]
        grids[name] = json.loads(next((tmp_path / name).glob("*/*/linear-random/result.json")).read_text())["results"][-1]["grid"]
    for one, two in zip(grids["one"], grids["two"], strict=True):  # the same images choose the best
        assert one["settings"] == two["settings"] and one["settings"].endswith("held_out=145")
        assert all(two[value] == pytest.approx(one[value], abs=2) for value in ("top1", "held_out_top1"))
    assert [line["step"] for line in logged["two"]] == [line["step"] for line in logged["one"]]
    assert [line["loss"] for line in logged["two"]] == pytest.approx([line["loss"] for line in logged["one"]], rel=1e-4)


def test_after_step_gets_the_weights_after_the_optimizer_step(tmp_path):
    class Follower(Tiny):
        def __init__(self):
            super().__init__()
            self.seen = []

        def after_step(self, step: int, total_steps: int) -> None:
            self.seen.append((step, total_steps, self.layer.weight.detach().clone()))

    model = Follower()
    before = model.layer.weight.detach().clone()
    _, trained = train(tmp_path, model)
    assert [(step, total) for step, total, _ in model.seen] == [(step, 6) for step in range(6)]
    weights = [before, *(weight for _, _, weight in model.seen)]
    assert all(not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False))
    assert torch.equal(weights[-1], trained.layer.weight)


@pytest.mark.parametrize("read_after", [0, 1, 4])
def test_delayed_reading_of_metrics_changes_neither_values_nor_the_reported_step(read_after, tmp_path, monkeypatch):
    """As on a GPU, where an immediate read would synchronise. No checkpoint depends on a loss that was not read yet."""
    undisturbed, _ = train(tmp_path / "undisturbed", Tiny())
    monkeypatch.setattr("common.train.READ_AFTER", {"cpu": read_after})
    run, _ = train(tmp_path / "late", Tiny())
    assert run.metrics.read_text() == undisturbed.metrics.read_text()
    with pytest.raises(RunError, match="the loss is nan at step 4 of 6"):
        train(tmp_path / "spoiled", Tiny(spoiled_step=4), checkpoint_seconds=-1)
    resumed, _ = train(tmp_path / "spoiled", Tiny())
    assert resumed.metrics.read_text() == undisturbed.metrics.read_text()


def test_an_expensive_metric_is_computed_in_logged_steps_only(tmp_path):
    class Costly(Tiny):
        def forward(self, images, targets):
            output = super().forward(images, targets)
            output.metrics["costly"] = lambda: computed.append(self.at[-1][0]) or torch.tensor(1.0 * self.at[-1][0])
            return output

    computed = []
    run, _ = train(tmp_path, Costly())
    assert computed == [2, 5] and [line["costly"] for line in lines(run)] == [2.0, 5.0]


def test_tensorboard_has_each_point_once_even_after_a_resume_and_is_closed(tmp_path, monkeypatch):
    class Writer:
        """Like SummaryWriter with repeated steps: drops points from `purge_step` on."""

        points, closed = {}, 0

        def __init__(self, folder: str, purge_step: int):
            Writer.points = {key: value for key, value in Writer.points.items() if key[1] < purge_step}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert (name, step) not in Writer.points
            Writer.points[name, step] = value

        def __enter__(self):
            return self

        def __exit__(self, *_):
            Writer.closed += 1

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    with pytest.raises(RunError):
        train(tmp_path, Tiny(spoiled_step=4), checkpoint_seconds=1000)
    run, _ = train(tmp_path, Tiny())
    assert Writer.closed == 2
    assert {step for _, step in Writer.points} == {line["step"] for line in lines(run)}
