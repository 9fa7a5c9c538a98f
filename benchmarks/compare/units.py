"""One method and seed of a comparison, as a process of its own: it pre-trains and evaluates, and writes its scores as JSON.

    python -m benchmarks.compare.units FOLDER METHOD SEED     (started by benchmarks.compare; FOLDER has plan.json)

A unit that was stopped goes on where it was, because its stages do.
"""

import hashlib
import json
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.arena import Entry, choose_arena, enter, entries
from benchmarks.compare.scores import Score, unit_name
from benchmarks.ledger.rows import Row
from benchmarks.pretrained import Pretrained
from benchmarks.reproduce import USER_ERRORS
from benchmarks.segmentation.__main__ import Options, segment
from benchmarks.speed.measure import facts
from benchmarks.speed.steps import gflop_per_image
from benchmarks.stages import Stages
from common import keep_freed_memory
from common.data import open_data
from common.recipe import Recipe, as_json, without_later
from common.run import console, write_text
from common.stopping import stop_on_signals, stop_with_parent
from common.train import make_fabric

DRAW = re.compile(r"_draw(\d+)$")
SEGMENTATION = "segmentation"  # an evaluation on other images, which the user names; it is not part of the arena
CROP = (24, 32)  # its crops, in patches


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all units of a comparison share; plan.json in its folder."""

    arena: str
    hash: str
    limit: int | None
    data: str
    budget: str
    device: str
    data_root: str
    papers: tuple[str, ...]
    encoder_file: str | None
    epochs: dict[str, int]  # of each method's pre-training
    evaluations: tuple[str, ...]  # names, without the draw; () = all
    cells: int  # of the patch grid; the location probe's chance is one of these
    conditions: dict[str, dict[str, str]]  # what differs between methods, by method and title
    claims: bool = False  # whether the arms of the papers' claims take part
    scenes: str | None = None  # folder with the images and masks of `segmentation`

    @property
    def methods(self) -> dict[str, Entry]:
        """The entries by name."""
        file = Path(self.encoder_file) if self.encoder_file else None
        return entries(choose_arena(self.arena, self.device), self.papers, file, self.claims)

    def takes(self, protocol: str) -> bool:
        """Whether a protocol of the arena, or `segmentation`, is requested."""
        able = protocol != SEGMENTATION or self.scenes is not None
        return able and (not self.evaluations or DRAW.sub("", protocol) in self.evaluations)

    def complete(self, entry: Entry, evaluations: Iterable[str]) -> bool:
        """Whether the evaluations of a unit's scores are all that were requested of a method."""
        have = {re.sub(r"^location_\d+$", "location", evaluation) for evaluation in evaluations}
        known = [one.name for one in enter(choose_arena(self.arena, self.device, self.limit), entry, 100).protocols]
        known += [SEGMENTATION] if entry.position is None else []
        return all(DRAW.sub("", name) in have for name in known if self.takes(name))


def read_plan(folder: Path) -> Plan:
    """The plan of a comparison."""
    held = json.loads((folder / "plan.json").read_text())
    return Plan(**held | {name: tuple(held[name]) for name in ("papers", "evaluations")})


def read_scores(folder: Path, method: str, seed: int) -> list[Score]:
    """The scores of a unit that has ended; [] if it has not."""
    path = folder / "scores" / f"{unit_name(method, seed)}.json"
    return [Score(**score) for score in json.loads(path.read_text())] if path.exists() else []


def failure(plan: Plan, method: str, seed: int, why: str) -> Score:
    """The score of a unit that has failed."""
    about = facts(torch.device(plan.device)) | {"recipe": "", "precision": "", "hours": 0.0, "epochs": plan.epochs[method]}
    own = {"evaluation": "failed", "draw": 0, "value": float("nan"), "note": why, "method": method, "seed": seed, "stage": ""}
    return _score(vars(plan) | about | own)


def run(folder: Path, method: str, seed: int) -> None:
    """Run the unit of a method and seed, and write its scores."""
    plan = read_plan(folder)
    arena, entry = choose_arena(plan.arena, plan.device, plan.limit), plan.methods[method]
    fabric = make_fabric(plan.device)
    fabric.launch()
    stages = Stages(
        module=entry.module,
        name=arena.name,
        recipe=enter(arena, entry, plan.epochs[method]),
        data=arena.limited(open_data(plan.data, Path(plan.data_root))),
        fabric=fabric,
        seed=seed,
        out=folder,
        arm=entry.arm,
        encoder_file=entry.encoder_file,
        data_root=Path(plan.data_root),
        workers=1,
    )
    resumed = any(stages.root.glob("*/result.json"))
    done = list[tuple[str, Row]]()  # the stage of each row
    if entry.trains:
        done += [("pretrain", row) for row in stages.pretrain()]
    elif entry.encoder_file is not None:
        stages.convert(entry.encoder_file)
    start = "pretrained" if entry.start == "pretrained" else ""
    for protocol in filter(lambda protocol: plan.takes(protocol.name), stages.recipe.protocols):
        begin = start or ("scratch" if protocol.kind == "finetune" else "random")
        done += [(f"{protocol.name}-{begin}", row) for row in stages.evaluate(protocol, begin)]
    if plan.takes(SEGMENTATION) and entry.position is None:
        begin = start or "random"
        done.append((f"{SEGMENTATION}-{begin}", segmentation(stages, plan, begin)))
    own = {"method": method, "recipe": digest(stages.recipe), "epochs": plan.epochs[method]}
    scores = [_accuracy(vars(plan) | asdict(row) | own, stages.root.relative_to(folder) / stage) for stage, row in done]
    about = vars(plan) | asdict(done[-1][1]) | own | {"stage": (stages.root.relative_to(folder) / "pretrain").as_posix()}
    scores += _costs(stages, entry, about, resumed)
    (folder / "scores").mkdir(exist_ok=True)
    write_text(folder / "scores" / f"{unit_name(method, seed)}.json", json.dumps([asdict(score) for score in scores], indent=1) + "\n")


def segmentation(stages: Stages, plan: Plan, start: str) -> Row:
    """Train a linear layer on the frozen patch tokens; return the row of the mean IoU."""
    recipe, patch = stages.recipe, stages.recipe.patch_size or 1
    file = None if start == "random" else stages.encoder_path(start)
    colours: dict = {"mean": stages.data.mean, "std": stages.data.std}
    pretrained = Pretrained(paper=stages.paper, name=stages.name, recipe=recipe, file=file, arm=stages.arm, **colours)
    size = (CROP[0] * patch, CROP[1] * patch)
    own: dict = {"seed": stages.seed, "limit": plan.limit, "workers": stages.workers, "device": plan.device}
    options = Options(Path(str(plan.scenes)), frozen=True, size=size, **own)
    return segment(options, pretrained, stages.root / f"{SEGMENTATION}-{start}")[0]


def _accuracy(row: dict[str, Any], stage: Path) -> Score:
    draw = DRAW.search(row["protocol"])
    own = row["protocol"] in ("pretrain", "scratch")  # of the pre-trained model itself
    evaluation = f"own_{row['metric']}" if own else SEGMENTATION if row["metric"] == "miou" else DRAW.sub("", row["protocol"])
    return _score(row | {"evaluation": evaluation, "draw": int(draw[1]) if draw else 0, "note": row["settings"], "stage": stage.as_posix()})


def _costs(stages: Stages, entry: Entry, shared: dict[str, Any], resumed: bool) -> Iterator[Score]:
    """Speed and FLOPs of the pre-training; peak memory of this process, or of the GPU, unless an earlier process ran some of the stages;
    minutes of the pre-training and the evaluations."""
    hours = {path.parent.name: json.loads(path.read_text())["hours"] for path in stages.root.glob("*/result.json")}
    device = stages.fabric.device
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, else KB
    memory = peak if device.type == "cpu" else torch.cuda.max_memory_allocated() / 1e9
    costs = ({} if resumed else {"memory_gb": memory}) | {"minutes": 60 * sum(hours.values())}
    if entry.trains:
        costs["images_per_second"] = stages.recipe.pretrain.epochs * len(stages.data.train) / (3600 * hours["pretrain"])
        costs["gflop_per_image"] = gflop_per_image(entry.module, stages.recipe, stages.data, device)
    for name, value in costs.items():
        yield _score(shared | {"evaluation": f"cost_{name}", "draw": 0, "value": round(value, 4), "note": ""})


def digest(recipe: Recipe) -> str:
    """12 hexadecimal digits that identify a recipe."""
    return hashlib.sha256(json.dumps(without_later(as_json(recipe)), sort_keys=True).encode()).hexdigest()[:12]


def _score(found: dict[str, Any]) -> Score:
    return Score(**{name: found[name] for name in Score.__dataclass_fields__})


def main(arguments: list[str]) -> int:
    """The program. Returns the exit code: 0, or 2 for a user error."""
    stop_with_parent()
    keep_freed_memory()
    try:
        run(Path(arguments[0]), arguments[1], int(arguments[2]))
    except USER_ERRORS as error:
        console.print(f"error: {error}", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    with stop_on_signals(exiting=True):
        sys.exit(main(sys.argv[1:]))
