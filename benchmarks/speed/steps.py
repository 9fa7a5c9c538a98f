"""Time training steps, relative to timm's supervised step and to this machine's matrix products.

    python -m benchmarks.speed                  all papers, then attention (benchmarks.speed.attention)
    python -m benchmarks.speed --paper mp3      one paper's variants beside the baselines'

The steps are timed in turns, in another order each round, so that a change of the machine's speed affects all steps. A step is forward,
backward and AdamW, on images that are already on the device. The results:

    ratio      step time / time of timm's supervised float32 step, median over the rounds; timm's step has the same batch and the model
               `against`: the same model, or, if a variant has its own model, that of the recipe
    machine    useful FLOPs / (median time x the FLOP/s of the fastest of a few matrix products, same precision, same run)
    memory     peak memory of the step in GB, without what is allocated before it: images, weights and AdamW's moments

Useful FLOPs are those of the step's matrix products and attention, as torch counts them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

import pandas
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.papers import ROOT, baselines, choose_recipe, paper_module, papers
from benchmarks.speed import attention
from benchmarks.speed.measure import check_kept, facts, gemm_rate, keep, show, wait
from common import keep_freed_memory
from common.data import Data
from common.optim import make_optimizer
from common.randomness import generator
from common.recipe import Recipe, TrainConfig, override
from common.run import console
from common.train import device_batch, has_fast_bf16, make_fabric
from common.vit import SIZES

# torch counts the FLOPs of attention only on GPUs.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}
SAME = ["device", "backbone", "batch", "step", "precision"]  # a new measurement replaces old ones with the same values in these columns
STAGE = TrainConfig(epochs=1, batch_size=256, base_lr=1e-4)  # the cost of a step does not depend on the learning rate


@dataclass
class Step:
    """One step to time: a model, its loss on a batch, and a precision."""

    name: str
    backbone: str
    model: nn.Module
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    precision: str
    seconds: list[float] = field(default_factory=list)

    def run(self, images: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Seconds of one training step."""
        device = images.device
        wait(device)
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            loss = self.loss(self.model, images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        getattr(self.model, "after_step", lambda step, total: None)(0, 1)
        wait(device)
        return time.perf_counter() - begun

    def flops(self, images: torch.Tensor) -> int:
        """Useful FLOPs of forward and backward."""
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            self.loss(self.model, images).backward()
        self.model.zero_grad()
        return counter.get_total_flops()

    def memory(self, images: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Peak memory in GB of a step after the first one."""
        if images.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(images.device)
            before = torch.cuda.memory_allocated(images.device)
            self.run(images, optimizer)
            return (torch.cuda.max_memory_allocated(images.device) - before) / 1e9
        frozen = [parameter.requires_grad_() for parameter in self.model.parameters() if not parameter.requires_grad]
        with MemTracker() as seen:  # it cannot hook frozen parameters; such a teacher runs without gradients anyway
            self.run(images, optimizer)
        for parameter in frozen:
            parameter.requires_grad_(False)
        held = {str(kind): size for kind, size in seen.get_tracker_snapshot("peak")[images.device].items()}
        return (held["Total"] - held["_MemRefType.PARAM"]) / 1e9


def make_steps(device: torch.device, names: list[str], size: str | None = None) -> list[Step]:
    """timm's supervised step first, then the methods of these papers and baselines, with their ImageNet recipes and VARIANTS, each in
    float32 and, if the device supports it, in bf16-mixed. `size` replaces the encoder size of the recipes."""
    precisions = ["32-true"] + (["bf16-mixed"] if has_fast_bf16(device) else [])
    steps: list[Step] = []
    for paper in names:
        module = paper_module(paper)
        _, recipe = choose_recipe(module, ".", None)  # any folder selects the recipe for folders
        if size is not None:
            recipe = replace(recipe, size=size, patch_size=recipe.patch_size or 16)
        builds: dict[str, Callable[..., nn.Module]] = {}
        if not any(step.backbone == recipe.backbone for step in steps):
            builds["timm, supervised"] = lambda name=recipe.backbone: timm.create_model(name)
        backbones = dict.fromkeys(builds, recipe.backbone)
        for variant, changes in module.VARIANTS.items():
            changed = override(recipe, changes)
            builds[f"{paper}, {variant}"] = lambda m=module, r=changed: m.build(r, r.build_encoder(channels=3), classes=1000)
            backbones[f"{paper}, {variant}"] = changed.backbone
        for name, build in builds.items():
            loss = _supervised if name.startswith("timm") else partial(_method, module)
            model = build().to(device).train()  # one for both precisions, because a run of all papers holds many
            steps += [Step(name, backbones[name], model, loss, precision) for precision in precisions]
    return steps


def gflop_per_image(module: ModuleType, recipe: Recipe, data: Data, device: torch.device) -> float:
    """Useful GFLOP of the forward and backward pass of a recipe's pre-training, for one image."""
    step, images = _pretraining(module, recipe, data, device, 4)
    return step.flops(images) / 4e9


def images_per_second(module: ModuleType, recipe: Recipe, data: Data, device: torch.device) -> float:
    """Images per second of a recipe's pre-training steps with one thread, or on one GPU: the median of six steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    step, images = _pretraining(module, recipe, data, device, device_batch(recipe.pretrain, 1))
    optimizer = make_optimizer(step.model, recipe.pretrain)
    seconds = [step.run(images, optimizer) for _ in range(8)]
    torch.set_num_threads(threads)
    return len(images) / statistics.median(seconds[2:])


def _pretraining(module: ModuleType, recipe: Recipe, data: Data, device: torch.device, batch: int) -> tuple[Step, torch.Tensor]:
    """A step of the pre-training, in the precision of the runs, and images for it."""
    model = module.build(recipe, recipe.build_encoder(data.channels), data.classes).to(device).train()
    images = torch.randn(batch, data.channels, recipe.image_size, recipe.image_size, device=device)
    precision = str(make_fabric(device.type)._precision.precision)
    return Step(recipe.backbone, recipe.backbone, model, partial(_method, module, classes=data.classes), precision), images


def measure(device: torch.device, steps: list[Step], batch: int, rounds: int) -> pandas.DataFrame:
    """One line per step."""
    images = torch.randn(batch, 3, 224, 224, device=device)
    models = {step.model: step for step in steps}  # both precisions share one
    optimizers = {model: make_optimizer(model, STAGE) for model in models}
    flops = {model: step.flops(images) for model, step in models.items()}
    about = facts(device)
    rates = {precision: gemm_rate(device, precision) for precision in {step.precision for step in steps}}
    for turn in range(rounds + 1):
        # In another order each round: a step affects the next one through the caches and, on CPUs, the clock rate.
        for index in torch.randperm(len(steps), generator=generator(turn)).tolist():
            step = steps[index]
            seconds = step.run(images, optimizers[step.model])
            if turn:  # the first turn warms up
                step.seconds.append(seconds)
        console.print(f"round {turn} of {rounds}" if turn else "warmed up", style="dim")
    timms = {step.backbone: step for step in reversed(steps) if step.name.startswith("timm") and step.precision == "32-true"}
    base = {step.backbone: timms.get(step.backbone, next(iter(reversed(timms.values())))) for step in steps}
    lines = [
        {
            "step": step.name,
            "backbone": step.backbone,
            "against": base[step.backbone].backbone,
            "batch": batch,
            "precision": step.precision,
            "seconds": round(statistics.median(step.seconds), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(step.seconds, base[step.backbone].seconds, strict=True)), 3),
            "machine": round(flops[step.model] / statistics.median(step.seconds) / rates[step.precision], 2),
            "memory": round(step.memory(images, optimizers[step.model]), 2),
            "GFLOP": round(flops[step.model] / 1e9),
            "GEMM GFLOP/s": round(rates[step.precision] / 1e9),
            **about,
        }
        for step in steps
    ]
    return pandas.DataFrame(lines)


def main(arguments: list[str] | None = None) -> int:
    """Time, print the table, write benchmarks/speed/steps.csv. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: a GPU if there is one)"
    )
    timms = [size for size in SIZES if timm.is_model(f"vit_{size}_patch16_224")]  # the steps are timed against timm's
    parser.add_argument("--batch", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--rounds", type=int, default=5, help="number of timings per step (default: 5)")
    parser.add_argument("--paper", choices=[*papers(), *baselines()], help="only one paper and the baselines, without attention")
    parser.add_argument("--size", choices=timms, help="encoder size, instead of that of the recipes")
    options = parser.parse_args(arguments)
    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is less than 1; give a whole number from 1 up")
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {options.device}: use cpu, or cuda if torch finds a GPU")
    file = ROOT / "benchmarks/speed/steps.csv"
    try:
        check_kept(file, SAME)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    keep_freed_memory()
    device = torch.device(options.device)
    names = papers() if options.paper is None else list(dict.fromkeys([options.paper, *baselines()]))
    frame = measure(device, make_steps(device, names, options.size), options.batch, options.rounds)
    show(frame[["step", "precision", "seconds", "ratio", "machine", "memory"]], f"{frame['backbone'][0]}, batch {options.batch}", device)
    keep(frame, file, SAME)
    if options.paper is None:
        attention.run(device)
    return 0


def _supervised(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), torch.arange(len(images), device=images.device))


def _method(module: ModuleType, model: nn.Module, images: torch.Tensor, classes: int = 1000) -> torch.Tensor:
    labels = torch.arange(len(images), device=images.device) % classes
    return model(images, module.example_targets(model, images) if hasattr(module, "example_targets") else labels).loss
