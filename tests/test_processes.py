"""Tests of runs with several processes: features, results, stopping and resuming."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.environment import ROOT

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(processes: int, *command: str) -> subprocess.Popen:
    """Start a program, under torchrun if there is more than one process."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    head = [sys.executable, *(["-m", *torchrun] if processes > 1 else [])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*head, *command], cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


def script(folder: Path, code: str) -> str:
    file = folder / "program.py"
    file.write_text(code)
    return str(file)


def short(*names: str) -> list[str]:
    return [word for name in names for word in ("--set", f"{name}.stage.epochs=1")]


STOP = ["stop", "--arms", "ijepa+stop", "--device", "cpu", "--precision", "32-true", *short("linear")]
DROPPOS = ["droppos", "--device", "cpu", "--precision", "32-true", "--epochs", "1"]
DROPPOS += short("finetune", "finetune_20_per_class", "finetune_5_per_class", "linear")

# ---- features and accuracies

FEATURES = """
import sys, torch, common
from common.data import Loader, open_data
from common.evaluate import accuracy, features, own_metrics
from common.method import Output
from common.train import make_fabric
from common.vit import ViT

fabric = make_fabric("cpu", "32-true")
fabric.launch()
data = open_data("digits")
torch.manual_seed(0)
encoder = ViT(image_size=8, patch_size=4, channels=1, width=16, depth=2, heads=2)
for count in (1, 2, 5, 9, 23):
    split = data.val.subset(range(count))
    def loader(rank, world):
        options = {"augmentation": None, "seed": 0, "device": fabric.device, "workers": 0, "rank": rank, "world_size": world}
        return Loader(split, data=data, image_size=(8, 8), batch_size=2, **options)
    seen = []
    hook = encoder.patch_embed.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    alone = features(fabric, encoder, loader(0, 1), "mean", 2)
    seen.clear()
    shared = features(fabric, encoder, loader(fabric.global_rank, fabric.world_size), "mean", 2)
    pixels = features(fabric, None, loader(fabric.global_rank, fabric.world_size), "mean")[0]
    hook.remove()
    assert torch.equal(shared[1], alone[1]) and torch.equal(shared[1], split.labels)
    torch.testing.assert_close(shared[0], alone[0], atol=1e-6, rtol=0)
    assert torch.equal(pixels, torch.cat([images.flatten(1) for images, _ in loader(0, 1).epoch(0)]))

    class Method(torch.nn.Module):
        def forward(self, images, targets=None):
            brightness = images.mean((1, 2, 3))
            return Output(images.mean(), {"brightness": brightness.mean()}, {"logits": torch.eye(10)[(brightness > 0).long()]})
    found = own_metrics(fabric, Method(), loader(fabric.global_rank, fabric.world_size), 0)
    brightness = pixels.mean(1)
    assert abs(found["brightness"] - brightness.mean()) < 1e-5, found
    top1 = accuracy(fabric, Method(), loader(fabric.global_rank, fabric.world_size))["top1"]
    assert abs(top1 - 100 * ((brightness > 0).long() == split.labels).float().mean()) < 1e-4, top1
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_features_and_accuracies_are_the_same_with_any_number_of_processes(processes, tmp_path):
    """This includes an incomplete last batch, and fewer images than processes."""
    assert finish(launch(processes, script(tmp_path, FEATURES))).count("done") == processes


# ---- whole runs


@pytest.mark.slow
def test_frozen_features_and_results_of_two_processes_equal_those_of_one(tmp_path):
    for processes in (1, 2):
        options = ["-m", "benchmarks.reproduce", *DROPPOS, "--out", str(tmp_path / str(processes))]
        said = finish(launch(processes, *options))
        assert said.count("Protocol") == 1  # one table
    kept = [{path.name: load_file(path) for path in (tmp_path / str(n)).glob("*/*/features/random-*")} for n in (1, 2)]
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) == 2
    for name, alone in kept[0].items():
        assert torch.equal(alone["classes"], kept[1][name]["classes"])
        torch.testing.assert_close(alone["features"], kept[1][name]["features"], atol=1e-5, rtol=0)
    results = [json.loads(next((tmp_path / str(n)).glob("*/*/knn-random/result.json")).read_text())["top1"] for n in (1, 2)]
    assert results[0] == pytest.approx(results[1], abs=0.3)  # one test image is .28; another order of summation may change one prediction


SLOW = """
import os, sys, time
import benchmarks.reproduce as program
from benchmarks import stages
from common.evaluate import protocols

def late(module, name):
    call = getattr(module, name)
    def wrapped(*given, **options):
        time.sleep(1.5)
        return call(*given, **options)
    setattr(module, name, wrapped)

if os.environ["RANK"] == sys.argv[1]:
    for name in ("fit", "own_metrics", "export_encoder"):
        late(stages, name)
    for name in ("fit", "accuracy", "accuracies", "features"):
        late(protocols, name)
sys.exit(program.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["0", "1"])
def test_a_run_with_one_very_slow_process_completes_without_errors(slow, tmp_path):
    said = finish(launch(2, script(tmp_path, SLOW), slow, *DROPPOS, "--out", str(tmp_path / "runs")))
    assert "Traceback" not in said
    assert "Protocol" in finish(launch(2, script(tmp_path, SLOW), slow, *DROPPOS, "--out", str(tmp_path / "runs")))  # the run is finished


TEACHER = """
import sys
import benchmarks.reproduce as program
from benchmarks import stages
from common.evaluate.frozen import fingerprint

fit = stages.fit
def watched(run, fabric, model, *given, **options):
    if run.directory.name == "pretrain":
        model.register_forward_hook(lambda *_: seen.append(1))
    seen = []
    method, hours = fit(run, fabric, model, *given, **options)
    if run.directory.name == "pretrain":
        print(f"teacher {fingerprint(model.encoder)} student {fingerprint(model.context_encoder)} after {len(seen)}", flush=True)
    return method, hours
stages.fit = watched
sys.exit(program.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_ema_encoder_of_stop_is_the_same_on_every_process_but_not_the_student(tmp_path):
    said = finish(launch(2, script(tmp_path, TEACHER), *STOP, "--epochs", "1", "--out", str(tmp_path / "runs")))
    found = re.findall(r"teacher (\w+) student (\w+) after (\d+)", said)
    assert len(found) == 2 and found[0] == found[1] and found[0][0] != found[0][1] and int(found[0][2]) > 0


def losses(out: Path) -> dict[int, float]:
    lines = next(out.glob("*/*/pretrain/metrics.jsonl")).read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(2, 1), (1, 2)])
def test_a_run_stopped_by_a_signal_resumes_with_another_number_of_processes(numbers, tmp_path):
    """Every process stops after the same step, saves, and exits with 75. DropPos draws per process, so losses differ slightly."""
    arguments = ["-m", "benchmarks.reproduce", *DROPPOS, "--epochs", "15", "--checkpoint-seconds", "1000", "--out", str(tmp_path)]
    process = launch(numbers[0], *arguments)
    while not list(tmp_path.glob("*/*/pretrain/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]) if numbers[0] > 1 else process.pid, signal.SIGUSR2)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == (75 if numbers[0] == 1 else 1), said
    assert len(re.findall(r"exitcode +: 75", said)) == (0 if numbers[0] == 1 else 2), said  # torchrun lists the exit code of each process
    assert "checkpoint saved, the same command resumes from here" in said
    assert not list(tmp_path.glob("*/*/finetune*"))
    before = losses(tmp_path)
    said = finish(launch(numbers[1], *arguments))
    assert "resuming from step" in said
    after = losses(tmp_path)
    assert before.items() <= after.items() and len(after) > len(before)
    assert after[max(after)] < after[min(after)]


# ---- training does not depend on how the effective batch is divided
# In float64: processes add gradients in another order, and AdamW divides a gradient that is nearly zero by its own size, so after 22 steps
# in float32 the rounding alone exceeds 1e-5 on some processors.

TRAIN = """
import itertools, json, os, sys
from pathlib import Path
import common.train
from benchmarks.papers import choose_recipe, paper_module
from benchmarks.stages import Stages
from common.data import open_data
from common.processes import close_connections
from common.recipe import choose_arms, override
from common.train import make_fabric

if "STOP_AFTER" in os.environ:
    steps = itertools.count()
    common.train.stop_requested = lambda: next(steps) >= int(os.environ["STOP_AFTER"])
fabric = make_fabric("cpu", "64-true")
fabric.launch()
data = open_data("digits")
for paper, arm, *changes in json.loads(sys.argv[2]):
    module = paper_module(paper)
    name, recipe = choose_recipe(module, "digits", "digits_mae" if arm.startswith("mae") else None)
    recipe = override(choose_arms(recipe, [arm] if arm else [])[arm], changes + sys.argv[3:])
    Stages(module=module, name=name, recipe=recipe, data=data, fabric=fabric, seed=0, out=Path(sys.argv[1]), arm=arm).pretrain()
close_connections()
"""
BATCHES = ["pretrain.epochs=2", "pretrain.warmup_epochs=1", "pretrain.batch_size=128", "pretrain.device_batch=32"]
METHODS = [
    ("droppos", "", "method.attentive=true"),
    ("mp3", ""),
    ("positional_label", "vit+apl"),
    ("positional_label", "swin+rpl", "method.mixup=0.8"),
    ("positional_label", "nest+rpl"),
    ("positional_label", "mae+rpl"),
    ("stop", "ijepa+stop", "method.mode=released", "method.masks=released", "method.min_keep=3"),
    ("mapet", ""),
    ("mae", ""),
    ("deit", "", "method.cutmix=1.0"),
]


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_effective_batch(tmp_path):
    """22 steps of four micro-batches; the random numbers of a micro-batch do not depend on the process."""
    one, two = (train(processes, tmp_path / str(processes), METHODS) for processes in (1, 2))
    assert len(one) == len(METHODS) and one.keys() == two.keys()
    for name in one:
        assert_same_training(one[name], two[name])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_saved_on_two_processes_resumes_on_another_number(processes, tmp_path, monkeypatch):
    (whole,) = train(1, tmp_path / "whole", METHODS[1:2]).values()
    monkeypatch.setitem(ENVIRONMENT, "STOP_AFTER", "7")
    train(2, tmp_path / "stopped", METHODS[1:2], code=1)  # torchrun's code for 75
    monkeypatch.delitem(ENVIRONMENT, "STOP_AFTER")
    (resumed,) = train(processes, tmp_path / "stopped", METHODS[1:2]).values()
    assert_same_training(whole, resumed)
    assert "resuming from step 8 of 22" in next((tmp_path / "stopped").glob("*/*/pretrain/log.txt")).read_text()


def train(
    processes: int, out: Path, methods: list[tuple[str, ...]], code: int = 0
) -> dict[str, tuple[list[dict], dict[str, torch.Tensor]]]:
    """The metrics and the encoder of each method, by run, pre-trained by TRAIN on this many processes."""
    out.mkdir(exist_ok=True)
    finish(launch(processes, script(out, TRAIN), str(out), json.dumps(methods), *BATCHES), code)
    found = {}
    for encoder in (path.with_name("encoder.safetensors") for path in out.glob("*/*/pretrain/result.json")):
        lines = (encoder.parent / "metrics.jsonl").read_text().splitlines()
        found[encoder.parents[1].relative_to(out).as_posix()] = [json.loads(line) for line in lines], load_file(encoder)
    return found


def assert_same_training(one: tuple[list[dict], dict], two: tuple[list[dict], dict]) -> None:
    (lines, encoder), (others, other) = one, two
    assert len(lines) == 2 and [line.keys() for line in lines] == [line.keys() for line in others]
    for line, same in zip(lines, others, strict=True):
        assert all(same[name] == pytest.approx(value, rel=1e-5, abs=1e-5) for name, value in line.items()), (line, same)
    for name, value in encoder.items():
        if name.endswith("qkv.bias"):  # a key's bias cancels in the softmax: its gradient is rounding, which AdamW divides by its own size
            value.chunk(3)[1].zero_()
            other[name].chunk(3)[1].zero_()
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-5, msg=name)
