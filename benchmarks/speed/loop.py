"""Time the training loop: what it adds to a bare step, and what several processes gain.

    python -m benchmarks.speed.loop                  two processes, on the CPU with one thread each
    python -m benchmarks.speed.loop --processes 8    on a machine with eight GPUs

A bare step is forward, backward and AdamW. The loop's step has everything else that a run does: learning rate, seeds, metrics and their
exchange, the check for signals, logs, progress reports. Both take the same images, which are on the device already. All processes
together train on the same effective batch:

    overhead      loop step / bare step - 1, in one process, in turns
    efficiency    loop step in one process / (processes x loop step in all of them), in turns
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas
import torch

from benchmarks.launch import launch
from benchmarks.papers import ROOT, choose_recipe, paper_module
from benchmarks.speed.measure import facts, keep, show, wait
from common import keep_freed_memory
from common.data import Augmentation
from common.optim import make_optimizer
from common.recipe import Recipe, TrainConfig
from common.run import Run, console
from common.train import fit, make_fabric

SAME = ["device", "case", "batch", "processes"]
WARM = 5  # steps that are not timed
CASES = {"digits": ("digits", None, 128, 1), "224 px": (".", "small", 8, 3)}  # data of DropPos' recipe, size, effective batch, channels


@dataclass
class _Batches:
    """The same images in each step."""

    images: torch.Tensor
    steps: int

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Any:
        return (
            (self.images, torch.zeros(len(self.images), dtype=torch.int64, device=self.images.device)) for _ in range(start, self.steps)
        )


def bare_steps(model: Any, stage: TrainConfig, images: torch.Tensor, steps: int) -> list[float]:
    """Seconds of each step."""
    optimizer, targets, seconds = make_optimizer(model, stage), torch.zeros(len(images), dtype=torch.int64, device=images.device), []
    model.train()
    for step in range(steps):
        wait(images.device)
        begun = time.perf_counter()
        getattr(model, "at_step", lambda step, total: None)(step, steps)
        model(images, targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        getattr(model, "after_step", lambda step, total: None)(step, steps)
        wait(images.device)
        seconds.append(time.perf_counter() - begun)
    return seconds[WARM:]


def loop_steps(model: Any, stage: TrainConfig, fabric: Any, images: torch.Tensor, steps: int, folder: Path) -> list[float]:
    """Seconds from the beginning of each step to that of the next one, in `fit`."""
    began, at_step = [], getattr(model, "at_step", lambda step, total: None)

    def timed(step: int, total: int) -> None:
        wait(images.device)
        began.append(time.perf_counter())
        at_step(step, total)

    model.at_step = timed
    with Run(folder, {}, fabric.device, main=fabric.is_global_zero) as run:
        fit(run, fabric, model, stage, _Batches(images, steps), 0, checkpoint_seconds=1e9)
    return [after - before for before, after in zip(began[WARM:], began[WARM + 1 :], strict=False)]


def _case(name: str, processes: int) -> tuple[Recipe, TrainConfig, int]:
    data, size, batch, channels = CASES[name]
    _, recipe = choose_recipe(paper_module("droppos"), data, None)
    recipe = replace(recipe, size=size or recipe.size)
    stage = TrainConfig(epochs=1, batch_size=batch, device_batch=batch // processes, base_lr=1e-4, augmentation=Augmentation())
    return recipe, stage, channels


def _process(name: str, device: str, steps: int, out: Path) -> None:
    """One process of the launcher; the main one writes medians to `out`."""
    console.quiet = True
    keep_freed_memory()
    fabric = make_fabric(device, "32-true")
    fabric.launch()
    recipe, stage, channels = _case(name, fabric.world_size)
    images = torch.randn(stage.device_batch, channels, recipe.image_size, recipe.image_size, device=fabric.device)

    def model() -> Any:
        torch.manual_seed(0)
        return paper_module("droppos").build(recipe, recipe.build_encoder(channels), 10)

    found = {"loop": statistics.median(loop_steps(model(), stage, fabric, images, steps, out.with_name("run")))}
    if fabric.world_size == 1:
        found["bare"] = statistics.median(bare_steps(model().to(fabric.device), stage, images, steps))
    if fabric.is_global_zero:
        out.write_text(json.dumps(found))


def measure(name: str, device: str, processes: int, rounds: int, steps: int) -> dict[str, object]:
    """A line of the table: medians over the rounds, in milliseconds, and of the ratios in percent."""
    one, several = list[dict[str, float]](), list[float]()
    for _ in range(rounds):
        for count in (1, processes):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "found.json"
                code = launch(
                    count, "benchmarks.speed.loop", ["--case", name, "--device", device, "--steps", str(steps), "--out", str(out)]
                )
                if code:
                    raise RuntimeError(f"a process ended with exit code {code}")
                found = json.loads(out.read_text())
            one += [found] if count == 1 else []
            several += [found["loop"]] if count > 1 else []
    overheads = [found["loop"] / found["bare"] - 1 for found in one]
    gains = [alone["loop"] / (processes * together) for alone, together in zip(one, several, strict=True)]
    recipe, stage, _ = _case(name, processes)
    return {
        "case": f"DropPos, {name}",
        "backbone": recipe.backbone,
        "batch": stage.batch_size,
        "processes": processes,
        "bare ms": round(1e3 * statistics.median(found["bare"] for found in one), 2),
        "loop ms": round(1e3 * statistics.median(found["loop"] for found in one), 2),
        "overhead %": round(100 * statistics.median(overheads), 1),
        "all ms": round(1e3 * statistics.median(several), 2),
        "efficiency %": round(100 * statistics.median(gains), 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Time, print the table, write benchmarks/speed/loop.csv. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.device_count() > 1 else "cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=2, help="number of processes beside one (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="number of starts of each (default: 3)")
    parser.add_argument("--steps", type=int, default=25, help=f"steps of each start (default: 25); the first {WARM} do not count")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)  # in a process of the launcher
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.out is not None:
        _process(options.case, options.device, options.steps, options.out)
        return 0
    if options.processes < 2 or options.rounds < 1 or options.steps < WARM + 2:
        parser.error(f"give --processes of 2 or more, --rounds of 1 or more, --steps of {WARM + 2} or more")
    if options.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    elif options.processes > torch.cuda.device_count():
        parser.error(f"--processes {options.processes}, but torch finds {torch.cuda.device_count()} GPUs; on the CPU use --device cpu")
    device = torch.device(options.device)
    lines = [measure(name, options.device, options.processes, options.rounds, options.steps) for name in CASES]
    show(pandas.DataFrame(lines).drop(columns="backbone"), "the training loop, in float32", device)
    keep(pandas.DataFrame([line | facts(device) for line in lines]), ROOT / "benchmarks/speed/loop.csv", SAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
