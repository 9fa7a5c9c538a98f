"""The only training loop: pre-training, fine-tuning and linear probing all go through `fit`.

All random numbers of a step are drawn from (seed, step, micro-batch, rank), and those of the images from (seed, epoch, image). So the
step number is the only random state to restore: a run killed at any moment resumes bit-identically from its last checkpoint.
"""

import atexit
import copy
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.checkpoint import PlainCheckpointIO, load_checkpoint, save_checkpoint
from common.data import Augmentation, Batches, Data, Loader, Split
from common.files import partial
from common.optim import Schedule, make_optimizer
from common.processes import close_connections, on_any_process, sum_over_processes
from common.randomness import reseed
from common.recipe import RecipeError, TrainConfig
from common.run import Run, RunError, console
from common.stopping import EXIT_STOPPED, Stopped, finish_first, stop_requested

__all__ = ["EXIT_STOPPED", "Stopped", "device_batch", "fit", "has_fast_bf16", "make_fabric"]

# The metrics of a step are read this many steps later. By then the GPU has computed them, so the loop does not wait for it.
READ_AFTER = {"cuda": 4}
M = TypeVar("M", bound=nn.Module)
# Limit for processes that wait while the main process works alone, for example on a logistic regression. The launcher, not this timeout,
# detects a process that dies.
TIMEOUT = timedelta(hours=12)

for _name in ("lightning.fabric", "lightning.pytorch"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # the first log line of a run replaces their INFO messages


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bfloat16 matrix products: CUDA GPUs, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def make_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Create the Fabric object of Lightning for one process or, under torchrun, for all processes; it is not launched yet.

    device: "auto", "cpu" or "cuda". precision: "auto" (bf16-mixed if the hardware supports it), "bf16-mixed" or "32-true".
    Raises RunError for an unknown device, and if "cuda" is requested and no GPU is available.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RunError(f"device {device!r} is not known; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("DEVICE=cuda was requested, but torch finds no CUDA GPU; use DEVICE=cpu, or check the driver and the torch build")
    accelerator = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if precision == "auto":
        precision = "bf16-mixed" if has_fast_bf16(torch.device(accelerator)) else "32-true"
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        atexit.register(close_connections)
    options: dict = {"devices": local, "num_nodes": world // local, "precision": precision}
    options |= {"strategy": DDPStrategy(timeout=TIMEOUT)} if world > 1 else {}
    # Only torchrun's variables count: Fabric would otherwise start by itself in a shell of Slurm.
    launcher = TorchElasticEnvironment() if world > 1 else LightningEnvironment()
    return Fabric(accelerator=accelerator, plugins=[PlainCheckpointIO(), launcher], **options)


def device_batch(stage: TrainConfig, devices: int) -> int:
    """Images per micro-batch on one device: the largest divisor of the batch per device that does not exceed the stage's `device_batch`.

    Raises RecipeError if the effective batch cannot be divided among the devices, and if it has no divisor near `device_batch`, so that a
    step would have more than twice as many micro-batches as needed.
    """
    per_device, rest = divmod(stage.batch_size, devices)
    if rest or per_device < 1:
        raise RecipeError(f"a batch of {stage.batch_size} cannot be divided among {devices} devices; choose a multiple of {devices}")
    size = max(size for size in range(1, min(per_device, stage.device_batch) + 1) if per_device % size == 0)
    if per_device // size > 2 * math.ceil(per_device / stage.device_batch):
        larger = next(size for size in range(stage.device_batch, per_device + 1) if per_device % size == 0)
        near = devices * 2 ** int(math.log2(per_device))
        raise RecipeError(
            f"a batch of {stage.batch_size} on {devices} devices is {per_device // size} micro-batches of {size} images, as {per_device} "
            f"has no larger divisor up to device_batch={stage.device_batch}; choose a batch of {near} or device_batch={larger}"
        )
    return size


def make_loader(
    fabric: Fabric,
    split: Split,
    stage: TrainConfig,
    augmentation: Augmentation | None,
    *,
    data: Data,
    image_size: tuple[int, int],
    seed: int,
    workers: int,
    resize: int | None = None,
    interpolation: str = "bicubic",
    alone: bool = False,
) -> Loader:
    """Create a Loader for the micro-batches of a stage in this process. With `alone`, every process loads all images. See Loader."""
    world = fabric.world_size
    batch = device_batch(stage, world)
    return Loader(
        split,
        data=data,
        image_size=image_size,
        batch_size=batch,
        augmentation=augmentation,
        seed=seed,
        device=fabric.device,
        workers=workers,
        rank=0 if alone else fabric.global_rank,
        world_size=1 if alone else world,
        accumulate=stage.batch_size // (batch * world),
        resize=resize,
        interpolation=interpolation,
    )


def fit(
    run: Run,
    fabric: Fabric,
    model: M,
    stage: TrainConfig,
    loader: Batches,
    seed: int,
    *,
    compile: bool = False,
    checkpoint_seconds: float = 20.0,
    after_epoch: Callable[[int, M], None] | None = None,
    after_save: Callable[[M], None] | None = None,
) -> tuple[M, float]:
    """Train a method (see common/method.py), including the cool-down. Return the model (its EMA if the stage has `ema`) and the hours.

    `loader` yields micro-batches of `device_batch(stage, world size)` images. Resumes from run.checkpoint if it exists, and saves at
    most once every `checkpoint_seconds`. after_epoch: called with the number of finished epochs and the model (its EMA) after each of them;
    after a crash it may be called again for the last ones. after_save: called with the model (its EMA) after each checkpoint; its time
    counts as time for saving.
    Each step has one exchange between processes besides that of the gradients; its metrics are read READ_AFTER steps later.
    Raises RunError, with the step, for a loss that is not finite, and Stopped after a signal; the last checkpoint is kept for resuming.
    """
    rank, world = fabric.global_rank, fabric.world_size
    accumulate = stage.batch_size // (world * device_batch(stage, world))
    steps_per_epoch = len(loader) // accumulate
    total = (stage.epochs + stage.cooldown_epochs) * steps_per_epoch
    at_step, after_step = (getattr(model, name, lambda step, total: None) for name in ("at_step", "after_step"))
    optimizer = make_optimizer(model, stage)
    schedule = Schedule(optimizer, stage, steps_per_epoch)
    blank = copy.deepcopy(model)  # fabric.setup for several devices may change a model permanently
    trained, optimizer = fabric.setup(torch.compile(model) if compile else model, optimizer)  # type: ignore[arg-type]  # a Module
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(stage.ema)) if stage.ema else None
    evaluated: M = model if average is None else average.module  # type: ignore[assignment]  # an M too

    progress: dict = {"step": 0, "hours": 0.0, "sums": {}, "count": 0}
    state: dict = {"model": trained, "optimizer": optimizer, "progress": progress}
    if average is not None:
        state["average"] = average
    if run.checkpoint.exists():
        load_checkpoint(fabric, run.checkpoint, state)
        progress = state["progress"]
        interrupted = "; the last save was interrupted, so the one before it is used" if partial(run.checkpoint).exists() else ""
        run.say(f"resuming from step {progress['step']} of {total}{interrupted}")
    run.forget_after(progress["step"])

    started, step, sums, count = time.perf_counter() - 3600 * progress["hours"], progress["step"], progress["sums"], progress["count"]
    log_every = max(1, min(50, steps_per_epoch))
    saved_at, save_seconds = time.perf_counter(), 0.0
    unread: deque[_Numbers] = deque()
    read_after, values, stopping, save_due = READ_AFTER.get(fabric.device.type, 0), {}, False, False

    def advice() -> str:
        kept = f"The last good checkpoint is {run.checkpoint}" if run.checkpoint.exists() else "No checkpoint was written yet"
        return f"{kept}. Lower the learning rate, lengthen the warm-up, clip gradients (clip_norm), or use --precision 32-true"

    def read(keep: int) -> None:
        """Check and accumulate the metrics of all steps except the last `keep`."""
        nonlocal values, stopping, save_due, count
        while len(unread) > keep:
            numbers = unread.popleft()
            values = numbers.read()
            stopping, save_due = bool(values.pop("stop")) or stopping, bool(values.pop("save")) or save_due
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(values.get(name, 0.0)):
                    epoch = numbers.step // steps_per_epoch
                    where = f"step {numbers.step} of {total} (epoch {epoch}, learning rate {numbers.learning_rate:.3g})"
                    raise RunError(f"the {name.replace('_', ' ')} is {values[name]} at {where}. {advice()}")
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1

    def save() -> None:
        nonlocal saved_at, save_seconds, save_due
        begun = time.perf_counter()
        finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        if on_any_process(fabric, not finite):
            raise RunError(f"a weight is not finite after step {step} of {total}, so nothing was saved. {advice()}")
        state["progress"] = {"step": step, "hours": (begun - started) / 3600, "sums": dict(sums), "count": count}
        save_checkpoint(fabric, run.checkpoint, state)
        if after_save is not None:
            after_save(evaluated)
        run.report(step, total, step / steps_per_epoch, step, now=True)
        saved_at, save_seconds, save_due = time.perf_counter(), time.perf_counter() - begun, False

    batches = None
    trained.train()
    with finish_first(), _tensorboard(run, step) as add_scalars, _progress_bar(run, total, step) as show:
        while step < total:
            epoch, position = divmod(step, steps_per_epoch)
            if batches is None or position == 0:
                batches = loader.epoch(epoch, start=position * accumulate)
            schedule.step_update(step)
            at_step(step, total)
            losses, weights, logged = [], [], (step + 1) % log_every == 0 or step + 1 == total
            for micro in range(accumulate):
                images, targets = next(batches)
                reseed(seed, step, micro * world + rank, 0)  # a micro-batch has the same draws for any number of processes
                with fabric.no_backward_sync(trained, enabled=micro < accumulate - 1 and world > 1):
                    output = trained(images, targets)
                    loss = output.loss if output.weight is None else output.loss * output.weight
                    fabric.backward(loss / accumulate)
                metrics = {name: value for name, value in output.metrics.items() if not callable(value)}
                costly = {name: value() for name, value in output.metrics.items() if callable(value)} if logged else {}
                losses.append({"loss": output.loss.detach(), **metrics, **costly})
                weights += [] if output.weight is None else [output.weight]
            if weights:
                _divide_gradients(model, sum_over_processes(fabric, torch.stack(weights).sum()) / (accumulate * world))
            norm: dict = {}
            if stage.clip_norm is not None:
                norm["gradient_norm"] = fabric.clip_gradients(trained, optimizer, max_norm=stage.clip_norm, error_if_nonfinite=False)
            # Saving takes at most 1/50 of the time, for a model of any size. All processes must agree, so the main process decides.
            due = rank == 0 and time.perf_counter() - saved_at > max(checkpoint_seconds, 50 * save_seconds)
            learning_rate = _rate(optimizer)
            unread.append(_exchange(fabric, step, learning_rate, losses, norm, {"stop": stop_requested(), "save": due}))
            read(0 if logged else read_after)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after_step(step, total)
            if average is not None:
                average.update_parameters(model)
            step += 1

            if logged:
                means = {name: value / count for name, value in sums.items()} | {name: values[name] for name in costly}
                run.record(step, {"epoch": step / steps_per_epoch, "lr": learning_rate, **means})
                add_scalars(step, means)
                sums, count = {}, 0
            if after_epoch is not None and step % steps_per_epoch == 0:
                read(0)  # the loss of all steps is finite
                after_epoch(step // steps_per_epoch, evaluated)
            show(step, stage.batch_size, values)
            run.report(step, total, step / steps_per_epoch, state["progress"]["step"])
            if stopping or save_due or step == total:
                read(0)
                save()
            if stopping:
                break
        if on_any_process(fabric, stopping or stop_requested()):  # a signal may arrive during the last save
            run.say(f"stopped by a signal after step {step} of {total}; checkpoint saved, the same command resumes from here")
            raise Stopped
    saved = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
    if stage.ema:
        saved["model"] = {name.removeprefix("module."): value for name, value in saved["average"].items() if name != "n_averaged"}
    blank.load_state_dict(saved["model"])
    getattr(blank, "at_step", at_step)(total - 1, total)
    return blank.to(fabric.device), state["progress"]["hours"]


def _divide_gradients(model: nn.Module, divisor: torch.Tensor) -> None:
    divisor = divisor.clamp(min=torch.finfo(torch.float32).tiny)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= divisor


def _rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the head: the largest of all parameter groups if layer decay is used."""
    return max(group["lr"] for group in optimizer.param_groups)


@dataclass
class _Numbers:
    """The metrics and flags of one step, while they are copied from the device."""

    step: int
    learning_rate: float
    names: list[str]
    values: torch.Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def _exchange(
    fabric: Fabric,
    step: int,
    learning_rate: float,
    losses: list[dict[str, torch.Tensor]],
    norm: dict[str, torch.Tensor],
    flags: dict[str, bool],
) -> _Numbers:
    """Average metrics over micro-batches and processes, and combine the flags of all processes, in one exchange that does not block."""
    on_gpu = fabric.device.type == "cuda"
    names = [*losses[0], *norm, *flags]
    means = torch.stack([torch.stack([loss[name].float() for name in losses[0]]) for loss in losses]).mean(0)
    raised = torch.tensor([float(flag) for flag in flags.values()], pin_memory=on_gpu).to(fabric.device, non_blocking=True)
    packed = torch.cat([means, *(value.float().reshape(1) for value in norm.values()), raised])
    packed = sum_over_processes(fabric, packed) / fabric.world_size
    if not on_gpu:
        return _Numbers(step, learning_rate, names, packed, None)
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Numbers(step, learning_rate, names, host, arrived)


@contextmanager
def _progress_bar(run: Run, total: int, done: int) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """Yield a function (step, images, values) that updates a progress bar on a terminal and logs a line after each tenth of the steps."""
    begun, first = time.perf_counter(), done
    columns = (TextColumn(run.directory.name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and run.main)) as bar:
        task = bar.add_task("", total=total, completed=done, text="")

        def show(step: int, images: int, values: dict[str, float]) -> None:
            seconds = time.perf_counter() - begun
            rate = (step - first) * images / seconds
            text = ", ".join([f"{rate:.0f} images/s", *(f"{name} {value:.4g}" for name, value in values.items())])
            bar.update(task, completed=step, text=text)
            if step * 10 // total > (step - 1) * 10 // total:
                left = (total - step) * seconds / (step - first)
                run.say(f"{run.directory.name} step {step}/{total}, {text}, {left:.0f} s left")

        yield show


@contextmanager
def _tensorboard(run: Run, done: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yield a function (step, values) that writes to TensorBoard in the run's directory, if TensorBoard is installed.

    `done` steps are already trained; points that an earlier process wrote for later steps are purged, because they are written again.
    """
    SummaryWriter: Any = None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        pass
    if SummaryWriter is None or not run.main:
        yield lambda step, values: None
        return
    with SummaryWriter(str(run.directory / "tensorboard"), purge_step=done + 1) as writer:

        def add_scalars(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield add_scalars
