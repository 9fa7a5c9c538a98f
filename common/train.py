"""The only training loop: pre-training, fine-tuning and linear probing all go through `fit`.

Everything random in a step is drawn from (seed, step, micro-batch, rank), and the images from (seed, epoch, image), so the
step number is all there is to restore: a run killed at any moment goes on bit-identically from its last checkpoint.
"""

import copy
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.checkpoint import PlainCheckpointIO, load_checkpoint, save_checkpoint
from common.data import Loader
from common.optim import Schedule, make_optimizer
from common.randomness import reseed
from common.recipe import RecipeError, Stage
from common.run import Run, RunError, console
from common.vit import Block

EXIT_STOPPED = 75  # a signal stopped the run after a checkpoint; the same command goes on (sysexits' EX_TEMPFAIL)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


for _name in ("lightning.fabric", "lightning.pytorch"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # what they say at INFO, the first line of a run says better


class Stopped(SystemExit):
    """Raised after SIGTERM, SIGUSR1 or Ctrl-C, once the step is finished and saved. The process exits with EXIT_STOPPED."""

    def __init__(self):
        super().__init__(EXIT_STOPPED)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are computed by the hardware: CUDA GPUs, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def make_fabric(device: str = "auto", precision: str = "auto", strategy: str = "auto") -> Fabric:
    """Lightning Fabric for one process or, under torchrun, for all of them; not yet launched.

    device: "auto", "cpu" or "cuda". precision: "auto" (bf16-mixed where the hardware has it), "bf16-mixed" or "32-true".
    strategy, for several processes: "auto" and "ddp" copy the model to each, "fsdp" shares it out.
    Raises RunError for a device that is asked for and absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RunError(f"device {device!r} is not known; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "DEVICE=cuda was asked for, but torch sees no CUDA GPU here; use DEVICE=cpu, or check the driver and the torch build"
        )
    accelerator = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if precision == "auto":
        precision = "bf16-mixed" if has_fast_bf16(torch.device(accelerator)) else "32-true"
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    return Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=world // local,
        precision=precision,
        strategy="auto"
        if world == 1
        else FSDPStrategy(auto_wrap_policy={Block}, state_dict_type="full")
        if strategy == "fsdp"
        else strategy,
        plugins=[PlainCheckpointIO()],
    )


def device_batch(stage: Stage, devices: int) -> int:
    """Images given to one device at once: the largest whole part of the effective batch within the stage's `device_batch`.

    Raises RecipeError where the effective batch cannot be shared out among the devices.
    """
    share, rest = divmod(stage.batch_size, devices)
    if rest or share < 1:
        raise RecipeError(f"a batch of {stage.batch_size} cannot be shared out among {devices} devices; choose a multiple of {devices}")
    return max(size for size in range(1, min(share, stage.device_batch) + 1) if share % size == 0)


def fit(
    run: Run,
    fabric: Fabric,
    model: nn.Module,
    stage: Stage,
    loader: Loader,
    seed: int,
    *,
    compile: bool = False,
    checkpoint_seconds: float = 20.0,
) -> tuple[nn.Module, float]:
    """Train a method (see common/method.py), cool-down and all; return it, or its average where the stage asks for one, and the hours.

    `loader` yields micro-batches of `device_batch(stage, world size)` images. Goes on from run.checkpoint where there is one,
    and saves no more often than every `checkpoint_seconds`.
    Raises RunError for a loss that is not finite, and Stopped after a signal; in both cases a checkpoint is left to go on from.
    """
    rank, world = fabric.global_rank, fabric.world_size
    accumulate = stage.batch_size // (world * device_batch(stage, world))
    steps_per_epoch = len(loader) // accumulate
    total = (stage.epochs + stage.cooldown_epochs) * steps_per_epoch
    at_step, after_step = (getattr(model, name, lambda step, total: None) for name in ("at_step", "after_step"))
    optimizer = make_optimizer(model, stage)
    schedule = Schedule(optimizer, stage, steps_per_epoch)
    blank = copy.deepcopy(model)  # setting a model up for several devices may change it for good
    trained, optimizer = fabric.setup(torch.compile(model) if compile else model, optimizer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(stage.ema)) if stage.ema else None

    progress = {"step": 0, "hours": 0.0, "sums": {}, "count": 0}
    state = {"model": trained, "optimizer": optimizer, "progress": progress}
    if average is not None:
        state["average"] = average
    if run.checkpoint.exists():
        load_checkpoint(fabric, run.checkpoint, state)
        progress = state["progress"]
        run.say(f"going on from step {progress['step']} of {total}")
    run.forget_after(progress["step"])

    started, step, sums, count = time.perf_counter() - 3600 * progress["hours"], progress["step"], progress["sums"], progress["count"]
    log_every = max(1, min(50, steps_per_epoch))
    saved_at, save_seconds = time.perf_counter(), 0.0
    tensorboard = _tensorboard(run)

    def advice() -> str:
        kept = f"The last good checkpoint is {run.checkpoint}" if run.checkpoint.exists() else "No checkpoint was written yet"
        return f"{kept}. Lower the learning rate, lengthen the warm-up, clip gradients (clip_norm), or use --precision 32-true"

    def save() -> None:
        nonlocal saved_at, save_seconds
        begun = time.perf_counter()
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise RunError(f"a weight is not finite after step {step} of {total}, so nothing was saved. {advice()}")
        state["progress"] = {"step": step, "hours": (begun - started) / 3600, "sums": sums, "count": count}
        save_checkpoint(fabric, run.checkpoint, state)
        saved_at, save_seconds = time.perf_counter(), time.perf_counter() - begun

    def due() -> bool:
        # Saving takes at most a fiftieth of the time, however large the model is. Every process must agree, so the first decides.
        return fabric.broadcast(time.perf_counter() - saved_at > max(checkpoint_seconds, 50 * save_seconds))

    batches = None
    trained.train()
    with _catching_signals() as stop, _progress_bar(run, total, step) as show:
        while step < total:
            epoch, position = divmod(step, steps_per_epoch)
            if batches is None or position == 0:
                batches = loader.epoch(epoch, start=position * accumulate)
            schedule.step_update(step)
            at_step(step, total)
            losses = []
            for micro in range(accumulate):
                images, targets = next(batches)
                reseed(seed, step, micro, rank)
                with fabric.no_backward_sync(trained, enabled=micro < accumulate - 1 and world > 1):
                    output = trained(images, targets)
                    fabric.backward(output.loss / accumulate)
                losses.append({"loss": output.loss.detach(), **output.metrics})
            values = _mean(fabric, losses, stop=float(bool(stop)))
            if stage.clip_norm is not None:
                norm = fabric.clip_gradients(trained, optimizer, max_norm=stage.clip_norm, error_if_nonfinite=False)
                values["gradient_norm"] = float(norm)
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(values.get(name, 0.0)):
                    where = f"step {step} of {total} (epoch {epoch}, learning rate {_rate(optimizer):.3g})"
                    raise RunError(f"the {name.replace('_', ' ')} is {values[name]} at {where}. {advice()}")
            learning_rate = _rate(optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after_step(step, total)
            if average is not None:
                average.update_parameters(model)
            step += 1

            stopped = values.pop("stop") > 0
            sums, count = {name: sums.get(name, 0.0) + value for name, value in values.items()}, count + 1
            if step % log_every == 0 or step == total:
                means = {name: value / count for name, value in sums.items()}
                run.record(step, {"epoch": step / steps_per_epoch, "lr": learning_rate, **means})
                if tensorboard is not None:
                    for name, value in means.items():
                        tensorboard.add_scalar(name, value, step)
                sums, count = {}, 0
            show(step, stage.batch_size, values)
            if stopped or step == total or due():
                save()
            if stopped and step < total:
                run.say(f"stopped by a signal after step {step} of {total}; saved, and the same command goes on from here")
                raise Stopped
    saved = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
    if stage.ema:
        saved["model"] = {name.removeprefix("module."): value for name, value in saved["average"].items() if name != "n_averaged"}
    blank.load_state_dict(saved["model"])
    getattr(blank, "at_step", at_step)(total - 1, total)
    return blank.to(fabric.device), state["progress"]["hours"]


def _rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the head: the largest of all groups under layer decay."""
    return max(group["lr"] for group in optimizer.param_groups)


def _mean(fabric: Fabric, losses: list[dict[str, torch.Tensor]], stop: float) -> dict[str, float]:
    """Metrics averaged over micro-batches and processes in one exchange; `stop` > 0 where any process was told to stop."""
    names = list(losses[0])
    rows = torch.stack([torch.stack([loss[name].float() for name in names]) for loss in losses]).mean(0)
    packed = torch.cat([rows, rows.new_tensor([stop])])
    return dict(zip([*names, "stop"], fabric.all_reduce(packed, reduce_op="mean").tolist(), strict=True))


@contextmanager
def _catching_signals() -> Iterator[list[int]]:
    """A list that is empty until one of STOP_SIGNALS arrives. A second Ctrl-C stops at once."""
    caught: list[int] = []

    def handler(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield caught
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _progress_bar(run: Run, total: int, done: int) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """A function (step, images, values) that keeps a bar on a terminal, and writes a line for every tenth of the way to the log."""
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


def _tensorboard(run: Run):
    """A TensorBoard writer in the run's directory where TensorBoard is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.directory / "tensorboard")) if run.main else None
