"""Compare all methods in an arena.

python -m benchmarks.compare --data digits --seeds 5 --budget images:43000
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import torch
import tyro

from benchmarks.compare import table
from benchmarks.compare.arena import Arena, Entry, choose_arena, enter, entries, limited
from benchmarks.compare.scores import add, load
from benchmarks.compare.units import DRAW, Plan, failure, gflop_per_image, images_per_second, read_plan, read_scores, unit_name
from benchmarks.papers import ROOT
from benchmarks.reproduce import TYRO, USER_ERRORS
from common import keep_freed_memory
from common.data import Data, open_data
from common.environment import available_cores
from common.files import locked
from common.recipe import RecipeError, nearest
from common.run import RunError, console, write_text
from common.stopping import EXIT_STOPPED, Stopped, stop_on_signals
from common.train import make_fabric

KINDS = ("images", "flops", "minutes")  # of budgets


@dataclass
class Options:
    """Pre-train every method with the same encoder and budget, evaluate all in the same way, and print means, intervals and differences."""

    data: str = "digits"
    """digits, cifar10, or a folder with train/ and val/."""
    papers: tuple[str, ...] = ()
    """Papers and baselines that take part besides the references (from scratch, MAE); by default all."""
    seeds: int = 5
    """Number of seeds; with fewer than 3 nothing is decided."""
    budget: str | None = None
    """Of each pre-training: images:500000, flops:1e15, or minutes:8 on this device; by default the images of the arena."""
    evaluations: tuple[str, ...] = ()
    """Names of evaluations, such as finetune_5_per_class knn location; by default all."""
    encoder: Path | None = None
    """An encoder of your own, which takes part without pre-training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto uses GPUs if available."""
    parallel: int | None = None
    """Methods and seeds that run at the same time; by default one for each GPU or CPU core."""
    limit: int | None = None
    """Use at most this many training and test images, to try whether everything runs."""
    out: Path = Path("runs")
    """Directory of the runs; the comparison is in OUT/compare/<arena>."""
    data_root: Path = Path("data")
    """Directory of the named data sets."""
    table: bool = False
    """Only print the table of the scores that there are, without training."""

    def __post_init__(self) -> None:
        for name in ("seeds", "parallel", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"{name.upper()}={value} is less than 1; give a whole number from 1 up")


def read_budget(text: str) -> tuple[str, float]:
    """The kind and the amount of a budget. Raises RecipeError."""
    kind, _, amount = text.partition(":")
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if kind not in KINDS or not 0 < number < float("inf"):
        hint = nearest(kind, KINDS) if kind not in KINDS else "the amount is not a number above 0"
        raise RecipeError(f"BUDGET={text!r}: {hint}; write images:500000, flops:1e15 or minutes:8")
    return kind, number


def epochs_of(budget: str, arena: Arena, methods: Mapping[str, Entry], data: Data, device: torch.device) -> dict[str, int]:
    """The epochs of the methods' pre-trainings. Raises RecipeError for fewer than two, as the warm-up needs one."""
    kind, amount = read_budget(budget)
    found = dict.fromkeys(methods, 1)
    for name, entry in methods.items():
        if not entry.trains:
            continue
        images = amount
        if kind != "images":
            measure = images_per_second if kind == "minutes" else gflop_per_image
            unit = measure(entry, enter(arena, entry, 100), data, device)
            images = 60 * amount * unit if kind == "minutes" else amount / (1e9 * unit)
        found[name] = round(images / len(data.train))
        if found[name] < 2:
            raise RecipeError(f"BUDGET={budget} is {images:.0f} images for {name}: two epochs of {len(data.train)} images are the least")
    return found


def prepare(options: Options) -> tuple[Path, Plan]:
    """Check the options, and write plan.json; a comparison that was interrupted keeps its epochs. Raises RecipeError or RunError."""
    device = make_fabric(options.device).device
    arena = choose_arena(options.data, device.type, options.limit)
    data = limited(arena, open_data(options.data, options.data_root))
    methods = entries(options.data, options.papers, options.encoder)
    known = list(dict.fromkeys(DRAW.sub("", protocol.name) for protocol in arena.protocols("mean", None)))
    for evaluation in options.evaluations:
        if evaluation not in known:
            raise RecipeError(f"EVALUATIONS={evaluation!r} is not known; {nearest(evaluation, known)}")
    least = int(torch.bincount(data.train.labels, minlength=data.classes).min())
    if max(arena.labels) > least:
        raise RecipeError(
            f"a class of {data.name} has {least} training images, but {max(arena.labels)} labels per class are used: add images"
        )
    folder, budget = options.out.absolute() / "compare" / arena.name, options.budget or f"images:{arena.images}"
    own: dict = {
        "arena": arena.name,
        "hash": arena.hash,
        "limit": arena.limit,
        "data": options.data,
        "budget": budget,
        "device": device.type,
    }
    held = read_plan(folder) if (folder / "plan.json").exists() else None
    if held is not None and (old := [f"{name}: {getattr(held, name)} there" for name in own if getattr(held, name) != own[name]]):
        raise RunError(f"{folder} holds another comparison ({', '.join(old)}): use another OUT")
    new = {name: entry for name, entry in methods.items() if held is None or name not in held.epochs}
    epochs = epochs_of(budget, arena, new, data, device) | (held.epochs if held else {})
    plan = Plan(
        **own,
        data_root=str(options.data_root.absolute()),
        papers=options.papers,
        encoder_file=str(options.encoder.absolute()) if options.encoder else None,
        epochs=epochs,
        evaluations=options.evaluations,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "plan.json", json.dumps(asdict(plan), indent=1) + "\n")
    return folder, plan


def run_units(folder: Path, units: list[tuple[str, int]], parallel: int | None, done: Callable[[str, int, str], None]) -> None:
    """Run units, several at a time, each with its share of the cores, and a GPU if there are any. Calls `done` after each with its error,
    or "". After a signal they save, and Stopped is raised."""
    gpus, cores = torch.cuda.device_count(), available_cores()
    count = max(1, min(parallel or gpus or cores, len(units)))
    free, running = SimpleQueue[int](), set[subprocess.Popen]()
    for place in range(count):
        free.put(place)

    def run(unit: tuple[str, int]) -> None:
        place, log = free.get(), folder / "logs" / f"{unit_name(*unit)}.txt"
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // count))}
        environment |= {"CUDA_VISIBLE_DEVICES": str(place % gpus)} if gpus else {}
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as output:
            command = [sys.executable, "-m", "benchmarks.compare.units", str(folder), unit[0], str(unit[1])]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        running.add(process)
        code = process.wait()
        running.discard(process)
        free.put(place)
        if code not in (EXIT_STOPPED, -signal.SIGTERM):
            last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
            done(*unit, f"{' '.join(last) or f'exit code {code}'} (see {log})" if code else "")

    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(run, unit) for unit in units]
        try:
            for one in waiting:
                one.result()
        except BaseException:
            for one in waiting:
                one.cancel()
            for process in list(running):
                process.send_signal(signal.SIGTERM)
            raise


def compare(options: Options) -> None:
    """Train and evaluate what is missing, add the scores to the ledger, and print the table."""
    folder, plan = prepare(options)
    arena, _, methods = plan.open()
    units = [(name, seed) for seed in range(options.seeds) for name in methods]
    ledger = folder / "scores.csv"
    with locked(folder / ".lock"):
        missing = [] if options.table else [unit for unit in units if not plan.complete(read_scores(folder, *unit))]
        count, began = itertools.count(1), time.time()

        def done(name: str, seed: int, fault: str) -> None:
            add(ledger, [failure(plan, name, seed, fault)] if fault else read_scores(folder, name, seed))
            place = f"[{next(count)}/{len(missing)}, {(time.time() - began) / 60:.1f} min]"
            console.print(f"{place} {name}, seed {seed}" + (f" failed: {fault}" if fault else ""), markup=False)

        if missing:
            console.print(
                f"arena {plan.arena}, {plan.budget}: {len(missing)} of {len(units)} runs are missing; kept in {folder}", markup=False
            )
        run_units(folder, missing, options.parallel, done)
    scores = load(ledger)
    if scores.empty:
        raise RunError(f"{ledger} has no scores yet: run the comparison without TABLE=1")
    table.show(scores, arena, methods, f"{plan.data}, {plan.budget}, arena {plan.arena} {plan.hash}")


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a user error."""
    keep_freed_memory()
    try:
        compare(tyro.cli(Options, args=arguments, prog="python -m benchmarks.compare", description=__doc__, config=TYRO))
    except Stopped:
        console.print("stopped by a signal: progress is saved; run the same command again to resume", markup=False)
        raise
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    with stop_on_signals(exiting=True):
        sys.exit(main())
