"""What the downstream tasks share: the rows of the ledger, and the command line around a training."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from benchmarks.ledger.rows import Row
from benchmarks.pretrained import Pretrained
from benchmarks.reproduce import USER_ERRORS
from common import keep_freed_memory
from common.recipe import RecipeError
from common.run import console
from common.stopping import Stopped, stop_with_parent

# Options of a command that other columns of its rows tell, or that leave the result as it is; --record excludes limit
NOT_OVERRIDES = {"data", "paper", "checkpoint", "recipe", "set", "seed", "precision", "engine", "frozen", "limit"}
NOT_OVERRIDES |= {"out", "device", "workers", "record", "checkpoint_seconds", "device_batch", "compile", "grad_checkpointing"}


def check_record(record: bool, limit: int | None) -> None:
    """Raise RecipeError for --record of a run that used a part of the images: its row would say the name of the whole data."""
    if record and limit is not None:
        raise RecipeError(f"--record with --limit {limit}: a result of a part of the images is not recorded; leave one of both out")


def given_options(options: Any) -> str:
    """The options of a command, a dataclass, that change the result and are not the default, as they are written: --epochs 8 --lr 0.001."""
    found = []
    for own in fields(options):
        value, name = getattr(options, own.name), own.name.replace("_", "-")
        if own.name in NOT_OVERRIDES or value == own.default:
            continue
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            found.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(found)


def ledger_row(
    task: str,
    pretrained: Pretrained,
    options: Any,
    result: Mapping[str, Any],
    metric: str,
    *,
    data: str,
    seed: int,
    protocol: str,
    start: str,
    precision: str,
    settings: str,
    run: str,
) -> Row:
    """A row of the ledger of benchmarks/<task>, from the options and the result.json of a training.

    run: the name of its folder, which names the log.
    """
    environment = result["environment"]
    return Row(
        date=result["date"],
        commit=environment["commit"],
        paper=pretrained.paper,
        recipe=pretrained.name,
        arm=pretrained.arm,
        base_arm="",
        overrides=f"{pretrained.overrides} {given_options(options)}".strip(),
        encoder_file=pretrained.given,
        split="",
        data=data,
        backbone=pretrained.recipe.backbone,
        pretrain_epochs=pretrained.epochs,
        seed=seed,
        protocol=protocol,
        start=start,
        metric=metric,
        value=round(result[metric], 4),
        device=environment["device"],
        precision=precision,
        hours=round(result["hours"], 5),
        versions=environment["versions"],
        settings=settings,
        log=f"benchmarks/{task}/logs/{run}.txt",
        recipe_sha256=result["recipe_sha256"],
    )


def run_command(work: Callable[[], object], memory_advice: str) -> int:
    """Do the work of a command line. Returns the exit code: 0, or 2 for a user error. After a signal it raises Stopped (exit code 75).

    memory_advice: what to lower if the memory of the GPU, or that for tensors on the CPU, is too small.
    """
    keep_freed_memory()
    if "LOCAL_RANK" in os.environ:  # started by a launcher
        stop_with_parent()
    try:
        work()
    except Stopped:
        console.print("stopped by a signal: progress is saved; run the same command again to resume", markup=False)
        raise
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return 2
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        console.print(f"error: the memory is too small ({error}): {memory_advice}", style="bold red", markup=False)
        return 2
    return 0
