"""A killed and resumed run is bit-identical to an uninterrupted one, for both loaders and both kinds of training."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from PIL import Image

from common.train import EXIT_STOPPED

ROOT = Path(__file__).resolve().parents[1]


# One thread per process: tests run in parallel, and threads competing for cores make a run ten times slower.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def changes(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def command(out: Path, *options: str) -> list[str]:
    always = ["--device", "cpu", "--checkpoint-seconds", "0.2", *changes("finetune.stage.epochs=3", "linear.stage.epochs=2")]
    return [sys.executable, "-u", "-m", "benchmarks.reproduce", "droppos", "--out", str(out), *always, *options]


def digits(tmp_path: Path) -> list[str]:
    return ["--epochs", "12", *changes("finetune_5_per_class.stage.epochs=2", "finetune_20_per_class.stage.epochs=2")]


def folder(tmp_path: Path) -> list[str]:
    """Image files, read by two workers, with random augmentation in the workers and mixup."""
    draw = numpy.random.default_rng(0)
    for split, count in (("train", 48), ("val", 4)):
        for label in range(2):
            directory = tmp_path / "images" / split / f"class{label}"
            directory.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=numpy.uint8)).save(directory / f"{index}.png")
    batches = [f"{stage}batch_size=32" for stage in ("pretrain.", "finetune.stage.", "linear.stage.")]
    small = changes("size=micro", "image_size=32", "patch_size=8", *batches)
    return ["--data", str(tmp_path / "images"), "--epochs", "30", "--workers", "2", *small]


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


def kill_in(stage: str, arguments: list[str], out: Path, draw: random.Random) -> bool:
    """Start, wait until the stage has logged something new, and kill at a random moment. Return False if it ended before that."""
    metrics = [path for path in out.glob(f"*/*/{stage}/metrics.jsonl")]
    before = metrics[0].stat().st_size if metrics else 0
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        metrics = [path for path in out.glob(f"*/*/{stage}/metrics.jsonl")]
        if metrics and metrics[0].stat().st_size > before:
            time.sleep(draw.uniform(0, 1.0))
            break
        time.sleep(0.02)
    alive = process.poll() is None
    if alive:
        process.kill()
    process.wait()
    return alive


@pytest.mark.slow
@pytest.mark.parametrize("data", [digits, folder])
def test_a_run_killed_at_random_times_has_the_logs_of_an_uninterrupted_run(data, tmp_path):
    options = data(tmp_path)
    arguments = {name: command(tmp_path / name, *options) for name in ("undisturbed", "killed")}
    finish(arguments["undisturbed"])
    draw = random.Random(0)
    kills = sum(kill_in(stage, arguments["killed"], tmp_path / "killed", draw) for stage in ("pretrain", "pretrain", "finetune-pretrained"))
    assert kills >= 2, "the run was too short to be killed"
    finish(arguments["killed"])

    logs = {name: sorted((tmp_path / name).glob("*/*/*/metrics.jsonl")) for name in arguments}
    assert len(logs["undisturbed"]) == len(logs["killed"]) >= 5
    resumed = [path for path in (tmp_path / "killed").glob("*/*/*/log.txt") if "resuming from step" in path.read_text()]
    assert resumed, "no run went on from a checkpoint"
    for undisturbed, killed in zip(logs["undisturbed"], logs["killed"], strict=True):
        assert killed.read_text() == undisturbed.read_text(), killed.parent.name
        results = [json.loads((path.parent / "result.json").read_text()) for path in (undisturbed, killed)]
        assert results[0].get("top1") == results[1].get("top1")
        assert results[0].get("position_top1") == results[1].get("position_top1")


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75_and_a_second_run_in_the_folder_is_refused(tmp_path):
    arguments = command(tmp_path, *folder(tmp_path), "--epochs", "200")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)
    while not list(tmp_path.glob("*/*/pretrain/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.05)
    second = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert second.returncode == 2 and "in use by another run" in second.stdout
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun and `timeout` do
    said, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, said
    assert "the same command resumes from here" in said
    step = json.loads(next(tmp_path.glob("*/*/pretrain/metrics.jsonl")).read_text().splitlines()[-1])["step"]
    assert next(tmp_path.glob("*/*/pretrain/checkpoint.pt")).exists() and step > 0
