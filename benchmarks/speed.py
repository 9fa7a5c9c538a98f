"""Training steps against timm's supervised step and against this machine's matrix products.

    python -m benchmarks.speed

The steps of all papers are timed in turns, so that a machine that changes its speed changes it for all. A step is forward, backward
and AdamW, on images that are already there. Two columns count:

    ratio      median over the rounds of its time over that of timm's supervised float32 step of the same model and batch
    machine    useful FLOPs / (median time x the FLOP/s of the fastest of a few matrix products, same precision, same run)

Useful FLOPs are those of the step's matrix products and attention, as torch counts them.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType

import pandas
import timm
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.papers import ROOT, choose_recipe, paper_module, papers
from common.optim import make_optimizer
from common.recipe import Recipe, Stage
from common.results import commit, device_name, versions
from common.run import console
from common.train import has_fast_bf16

# torch counts attention on GPUs only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}
STAGE = Stage(epochs=1, batch_size=256, base_lr=1e-4)  # a step costs the same at any rate


@dataclass
class Step:
    """One thing to time: a model, its loss on a batch, and a precision."""

    name: str
    backbone: str
    model: nn.Module
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    precision: str
    seconds: list[float] = field(default_factory=list)

    def run(self, images: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Seconds of one training step."""
        device = images.device
        _wait(device)
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            loss = self.loss(self.model, images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        return time.perf_counter() - begun

    def flops(self, images: torch.Tensor) -> int:
        """Useful FLOPs of forward and backward."""
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            self.loss(self.model, images[:1]).backward()
        self.model.zero_grad()
        return counter.get_total_flops() * len(images)


def make_steps(device: torch.device) -> list[Step]:
    """timm's supervised step first, then every paper's method on its ImageNet recipe with the VARIANTS that it names, each in float32
    and, where the device computes it, in bf16-mixed."""
    precisions = ["32-true"] + (["bf16-mixed"] if has_fast_bf16(device) else [])
    steps = []
    for paper in papers():
        module = paper_module(paper)
        _, recipe = choose_recipe(module, ".", None)  # any folder has the recipe for folders
        builds: dict[str, Callable[[], nn.Module]] = {}
        if not any(step.backbone == recipe.backbone for step in steps):
            builds["timm, supervised"] = lambda name=recipe.backbone: timm.create_model(name)
        for variant, options in module.VARIANTS.items():
            builds[f"{paper}, {variant}"] = lambda m=module, r=recipe, o=options: _method(m, r, o)
        for name, build in builds.items():
            loss = _supervised if name.startswith("timm") else _pretraining
            steps += [Step(name, recipe.backbone, build().to(device).train(), loss, precision) for precision in precisions]
    return steps


def measure(device: torch.device, batch: int, rounds: int) -> pandas.DataFrame:
    """One line per step."""
    images = torch.randn(batch, 3, 224, 224, device=device)
    steps = make_steps(device)
    optimizers = [make_optimizer(step.model, STAGE) for step in steps]
    flops = [step.flops(images) for step in steps]
    rates = {precision: _gemm_rate(device, precision) for precision in {step.precision for step in steps}}
    for turn in range(rounds + 1):
        for step, optimizer in zip(steps, optimizers, strict=True):
            seconds = step.run(images, optimizer)
            if turn:  # the first turn warms up
                step.seconds.append(seconds)
        console.print(f"round {turn} of {rounds}" if turn else "warmed up", style="dim")
    base = {step.backbone: step for step in reversed(steps) if step.name.startswith("timm") and step.precision == "32-true"}
    facts = {
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
    }
    lines = [
        {
            "step": step.name,
            "backbone": step.backbone,
            "batch": batch,
            "precision": step.precision,
            "seconds": round(statistics.median(step.seconds), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(step.seconds, base[step.backbone].seconds, strict=True)), 3),
            "machine": round(count / statistics.median(step.seconds) / rates[step.precision], 2),
            "GFLOP": round(count / 1e9),
            "GEMM GFLOP/s": round(rates[step.precision] / 1e9),
            **facts,
        }
        for step, count in zip(steps, flops, strict=True)
    ]
    return pandas.DataFrame(lines)


def main(arguments: list[str] | None = None) -> int:
    """Time, print the table, write benchmarks/speed.csv. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; by default a GPU where there is one"
    )
    parser.add_argument("--batch", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each step is timed (default: 7)")
    options = parser.parse_args(arguments)
    frame = measure(torch.device(options.device), options.batch, options.rounds)
    shown = frame[["step", "precision", "seconds", "ratio", "machine"]]
    table = Table(*shown.columns, title=f"batch {options.batch}, {frame['device'][0]}\n{frame['versions'][0]}")
    for line in shown.itertuples(index=False):
        table.add_row(*map(str, line))
    console.print(table)
    # Steps measured on other devices stay.
    path = ROOT / "benchmarks" / "speed.csv"
    if path.exists():
        held = pandas.read_csv(path)
        frame = pandas.concat([held[held["device"] != frame["device"][0]], frame])
    frame.to_csv(path, index=False)
    return 0


def _supervised(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), torch.arange(len(images), device=images.device))


def _pretraining(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).loss


def _method(module: ModuleType, recipe: Recipe, options: dict) -> nn.Module:
    recipe = replace(recipe, method=recipe.method | options)
    return module.build(recipe, recipe.build_encoder(channels=3), classes=1000)


def _gemm_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of a few large matrix products, of which a ViT-B step at batch 16 has the first two."""
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    rates = []
    for m, k, n in ((3152, 768, 3072), (3152, 3072, 768), (4096, 4096, 4096)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        for _ in range(6):
            _wait(device)
            begun = time.perf_counter()
            a @ b
            _wait(device)
            rates.append(2 * m * k * n / (time.perf_counter() - begun))
    return max(rates)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
