"""Compare all methods in an arena.

python -m benchmarks.compare --data digits --seeds 5 --budget images:43000
"""

import itertools
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.compare import table
from benchmarks.compare.arena import ARENAS, Arena, Entry, choose_arena, conditions, enter, entries
from benchmarks.compare.scores import add, load, record, unit_name
from benchmarks.compare.units import DRAW, SEGMENTATION, Plan, digest, failure, read_plan, read_scores
from benchmarks.launch import side_by_side
from benchmarks.papers import ROOT
from benchmarks.report.comparison import comparison_page, draw_intervals
from benchmarks.report.page import write_svg
from benchmarks.reproduce import TYRO, USER_ERRORS
from benchmarks.segmentation.data import open_scenes
from benchmarks.speed.steps import gflop_per_image, images_per_second
from common import keep_freed_memory
from common.convert import load_encoder, read_checkpoint
from common.data import Data, open_data
from common.recipe import RecipeError, nearest
from common.run import RunError, console, sole_use, write_text
from common.stopping import Stopped, stop_on_signals
from common.train import make_fabric

RECORDS = ROOT / "benchmarks" / "compare"  # a folder for each arena
KINDS = ("images", "flops", "minutes")  # of budgets


@dataclass
class Options:
    """Pre-train every method with the same encoder and budget, evaluate all in the same way, and print means, intervals and differences."""

    data: str = "digits"
    """digits, cifar10, or a folder with train/ and val/."""
    arena: str | None = None
    """Arena with its recipes, such as cifar10 for a folder with images of 32 px; by default that of the data."""
    papers: tuple[str, ...] = ()
    """Papers and baselines that take part besides the references (from scratch, MAE); by default all."""
    seeds: int = 5
    """Number of seeds; with fewer than 3 nothing is decided."""
    claims: bool = False
    """Also compare the arms of the papers' own claims: MP3's position embeddings, RPL and APL, MaPeT and masked prediction."""
    budget: str | None = None
    """Of each pre-training: images:500000, flops:1e15, or minutes:8 on this device; by default the images of the arena."""
    evaluations: tuple[str, ...] = ()
    """Names of evaluations, such as finetune_5_per_class knn location; by default all."""
    scenes: Path | None = None
    """Images with masks, as of make segment, for one more evaluation: segmentation, by a linear layer on the frozen encoder."""
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
    """Only print the table and draw the intervals of the scores in OUT, or else of the recorded ones, without training."""
    record: bool = False
    """Copy plan, scores, logs and report to benchmarks/compare/<arena>."""

    def __post_init__(self) -> None:
        for name in ("seeds", "parallel", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"{name.upper()}={value} is less than 1; give a whole number from 1 up")
        if self.arena is not None and self.arena not in ARENAS:
            raise RecipeError(f"--arena {self.arena} is not known; {nearest(self.arena, ARENAS)}")


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
        recipe, images = enter(arena, entry, 100), amount
        if kind == "flops":
            images = amount / (1e9 * gflop_per_image(entry.module, recipe, data, device))
        elif kind == "minutes":
            images = 60 * amount * images_per_second(entry.module, recipe, data, device)
        found[name] = round(images / len(data.train))
        if found[name] < 2:
            raise RecipeError(f"BUDGET={budget} is {images:.0f} images for {name}: two epochs of {len(data.train)} images are the least")
    return found


def prepare(options: Options) -> tuple[Path, Plan]:
    """Check the options; a comparison that was interrupted keeps its epochs. Writes nothing. Raises RecipeError or RunError."""
    device = make_fabric(options.device).device
    arena = choose_arena(options.arena or options.data, device.type, options.limit)
    if arena.held_out and (options.claims or options.scenes is not None):
        raise RecipeError(f"{'SCENES=' if options.scenes else '--claims'}: {arena.name} is for trials of one evaluation; leave it out")
    data = arena.limited(open_data(options.data, options.data_root))
    methods = entries(arena, options.papers, options.encoder, options.claims)
    if options.encoder is not None:
        encoder = enter(arena, [*methods.values()][-1], 2).build_encoder(data.channels)
        load_encoder(encoder, read_checkpoint(options.encoder), allow_unused=("cls_token",))
    known = [*dict.fromkeys(DRAW.sub("", protocol.name) for protocol in arena.protocols("mean", None)), SEGMENTATION]
    for evaluation in options.evaluations:
        if evaluation not in known:
            raise RecipeError(f"EVALUATIONS={evaluation!r} is not known; {nearest(evaluation, known)}")
    if options.scenes is not None:
        if options.evaluations and SEGMENTATION not in options.evaluations:
            raise RecipeError(f"SCENES={options.scenes} is for the evaluation {SEGMENTATION}: add it to EVALUATIONS, or leave SCENES out")
        if data.channels != 3:
            raise RecipeError(f"SCENES={options.scenes}: {data.name} is grey, but {SEGMENTATION} needs encoders of colour images")
        open_scenes(options.scenes).check(arena.patch_size)
    least = int(torch.bincount(data.train.labels, minlength=data.classes).min())
    if max(arena.labels) > least:
        raise RecipeError(
            f"a class of {data.name} has {least} training images, but {max(arena.labels)} labels per class are used: add images"
        )
    folder, budget = options.out.absolute() / "compare" / arena.name, options.budget or f"images:{arena.images}"
    own: dict = {"arena": arena.name, "hash": arena.hash, "limit": arena.limit, "data": options.data, "budget": budget}
    own |= {"device": device.type}
    held = read_plan(folder) if (folder / "plan.json").exists() else None
    scenes = str(options.scenes.absolute()) if options.scenes is not None else held.scenes if held else None
    if scenes is None and SEGMENTATION in options.evaluations:
        raise RecipeError(f"EVALUATIONS={SEGMENTATION} needs images with masks: SCENES=/datasets/streets")
    own |= {"scenes": scenes}
    held = held and replace(held, scenes=held.scenes or scenes)  # they may be added to a comparison
    if held is not None and held.data == Path(options.data).name:  # of a recorded comparison, whose plan has only the folder's name
        held = replace(held, data=options.data)
    if held is not None and (old := [f"{name}: {getattr(held, name)} there" for name in own if getattr(held, name) != own[name]]):
        raise RunError(f"{folder} holds another comparison ({', '.join(old)}): use another OUT")
    new = {name: entry for name, entry in methods.items() if held is None or name not in held.epochs}
    plan = Plan(
        **own,
        data_root=str(options.data_root.absolute()),
        papers=options.papers,
        claims=options.claims,
        encoder_file=str(options.encoder.absolute()) if options.encoder else None,
        epochs=epochs_of(budget, arena, new, data, device) | (held.epochs if held else {}),
        evaluations=options.evaluations,
        cells=(arena.image_size // arena.patch_size) ** 2,
        conditions=(held.conditions if held else {}) | {name: conditions(arena, entry) for name, entry in methods.items()},
    )
    return folder, plan


def train(folder: Path, plan: Plan, seeds: int, parallel: int | None) -> int:
    """Write plan.json, run the units that are missing in the ledger, and add their scores to it. Returns how many failed.

    Raises RunError if another program works in the folder, or if the ledger has other seeds of a missing unit with another recipe.
    """
    methods = plan.methods
    units = {folder / "logs" / f"{unit_name(name, seed)}.txt": (name, seed) for seed in range(seeds) for name in methods}
    program = [sys.executable, "-m", "benchmarks.compare.units", str(folder)]
    failed, count, began = 0, itertools.count(1), time.monotonic()
    ledger = folder / "scores.csv"
    with sole_use(folder, "make compare"):
        write_text(folder / "plan.json", json.dumps(asdict(plan), indent=1) + "\n")
        if ended := [score for unit in units.values() for score in read_scores(folder, *unit)]:
            add(ledger, ended)  # of a unit that ended when this program was killed
        scores = load(ledger)
        held = scores.groupby(["method", "seed"])["evaluation"].unique()
        missing = {log: unit for log, unit in units.items() if not plan.complete(methods[unit[0]], held.get(unit, ()))}
        for name in dict.fromkeys(name for name, _ in missing.values()):
            recipe = digest(enter(choose_arena(plan.arena, plan.device, plan.limit), methods[name], plan.epochs[name]))
            if other := {*scores.loc[scores["method"] == name, "recipe"]} - {recipe, ""}:
                known = f"{name} with recipe {', '.join(other)}, which is {recipe} now"
                raise RunError(f"{ledger} has scores of {known}: seeds of two recipes are no sample; use another OUT")

        def done(log: Path, code: int) -> None:
            nonlocal failed
            (name, seed), lines = missing[log], [line for line in log.read_text().splitlines() if line.strip()]
            fault = f"{lines[-1] if lines else f'exit code {code}'} (see logs/{log.name})" if code else ""
            failed += bool(fault)
            add(ledger, [failure(plan, name, seed, fault)] if fault else read_scores(folder, name, seed))
            place = f"[{next(count)}/{len(missing)}, {(time.monotonic() - began) / 60:.1f} min]"
            console.print(f"{place} {name}, seed {seed}" + (f" failed: {fault}" if fault else ""), markup=False)

        if missing:
            said = f"arena {plan.arena}, {plan.budget}: {len(missing)} of {len(units)} runs are missing; kept in {folder}"
            console.print(said, markup=False)
        side_by_side({log: [*program, name, str(seed)] for log, (name, seed) in missing.items()}, parallel, done, ROOT)
    return failed


def compare(options: Options) -> int:
    """Train and evaluate what is missing, add the scores to the ledger, print the table, and draw the intervals. Returns 1 if a method
    has failed, else 0."""
    failed = 0
    if options.table:
        arena = choose_arena(options.arena or options.data, make_fabric(options.device).device.type).name
        places = [options.out / "compare" / arena, RECORDS / arena]
        folder = next((place for place in places if (place / "scores.csv").exists()), None)
        if folder is None:
            raise RunError(f"{places[0]} has no scores yet: run the comparison without TABLE=1")
        plan = read_plan(folder)
    else:
        folder, plan = prepare(options)
        failed = train(folder, plan, options.seeds, options.parallel)
    scores = load(folder / "scores.csv")
    table.show(scores, plan, f"{plan.data}, {plan.budget}, arena {plan.arena} {plan.hash}")
    if table.measured(scores).empty:
        raise RunError(f"no method has a score: {folder / 'logs'} says why")
    write_svg(draw_intervals(scores), folder / "figures" / "intervals.svg")
    console.print(f"intervals: {folder / 'figures' / 'intervals.svg'}; all figures: make report RUN={folder}", markup=False)
    if options.record:
        comparison_page(folder)
        kept = replace(plan, data=Path(plan.data).name, data_root="data", encoder_file=None, scenes=None)
        record(folder, RECORDS / plan.arena, json.dumps(asdict(kept), indent=1) + "\n")
        console.print(f"recorded in {RECORDS / plan.arena}; `make table` updates its README", markup=False)
    return min(failed, 1)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 if a method has failed, or 2 for a user error."""
    keep_freed_memory()
    try:
        return compare(tyro.cli(Options, args=arguments, prog="python -m benchmarks.compare", description=__doc__, config=TYRO))
    except Stopped:
        console.print("stopped by a signal: progress is saved; run the same command again to resume", markup=False)
        raise
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return 2


if __name__ == "__main__":
    with stop_on_signals(exiting=True):
        sys.exit(main())
