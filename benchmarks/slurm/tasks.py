"""Which jobs reproduce a paper: one for each seed and arm, then one for each seed and protocol, then one for the table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.reproduce import Options, plan
from benchmarks.stages import Stages
from common.train import device_batch, make_fabric


@dataclass
class Task:
    """One call of benchmarks.reproduce."""

    name: str
    label: str  # for people
    arguments: list[str]
    folders: list[str]  # of its stages, as patterns
    jobs: list[str] = field(default_factory=list)  # ids


@dataclass
class Group:
    """Tasks that are submitted together, when those that they need are finished."""

    tasks: list[Task]
    after: list[Task]
    alone: bool = False  # one process is enough


def groups(calls: Sequence[tuple[Options, list[str]]], processes: int) -> list[Group]:
    """The groups of several papers, in order: what trainings read (MaPeT's tokens, and one copy of the images for all papers), all
    pre-trainings, then the evaluations and the table of each paper.

    calls: the options of each paper and the arguments of its tasks. Raises RecipeError for options that a job would refuse.
    """
    prepared, pretrainings, rest = list[Task](), list[Task](), list[Group]()
    for options, arguments in calls:
        runs = plan(options, make_fabric("cpu", "32-true"))
        for own in runs:
            device_batch(own.recipe.pretrain, processes)
        if hasattr(runs[0].module, "prepare") and options.encoder is None:
            prepared.append(Task(f"tokens-{options.paper}", f"{options.paper} tokens", [*arguments, "--prepare"], []))
        first = list(_pretrainings(runs, arguments))
        then = list(_evaluations(runs, arguments))
        rest += [Group(then, first)] if then else []
        rest.append(Group([Task(f"table-{options.paper}", f"{options.paper} table", arguments, [])], then or first, alone=True))
        pretrainings += first
    if calls[0][0].cache is not None and not prepared:  # the job of the tokens makes it too
        options, arguments = calls[0]
        prepared = [Task(f"copy-{options.paper}", f"{options.paper} copy of the images", [*arguments, "--prepare"], [])]
    first_of_all = [Group(prepared, [], alone=True)] if prepared else []
    return [*first_of_all, *([Group(pretrainings, prepared)] if pretrainings else []), *rest]


def _pretrainings(runs: Sequence[Stages], arguments: Sequence[str]) -> Iterable[Task]:
    for own in (own for own in runs if own.runs("pretrain")):
        name = "-".join(filter(None, ["pretrain", own.paper, own.arm.replace("+", "-"), f"seed{own.seed}"]))
        label = " ".join(filter(None, [own.paper, own.arm, f"seed {own.seed} pretrain"]))
        chosen = [*_seed(own.seed), *(["--arms", own.arm] if own.arm else []), "--stages", "pretrain"]
        yield Task(name, label, [*arguments, *chosen], [str(own.root.absolute() / "pretrain")])


def _evaluations(runs: Sequence[Stages], arguments: Sequence[str]) -> Iterable[Task]:
    protocols = list(dict.fromkeys(protocol.name for own in runs for protocol in own.recipe.protocols if own.runs(protocol.name)))
    for seed in dict.fromkeys(own.seed for own in runs):
        folders = [own.root.absolute() for own in runs if own.seed == seed]
        for protocol in protocols:  # for all arms, which share their baselines
            chosen = [*_seed(seed), "--stages", protocol]
            paper = runs[0].paper
            yield Task(
                f"{protocol}-{paper}-seed{seed}",
                f"{paper} seed {seed} {protocol}",
                [*arguments, *chosen],
                [str(folder / f"{protocol}-*") for folder in folders],
            )


def _seed(seed: int) -> list[str]:
    return ["--first-seed", str(seed), "--seeds", "1"]
