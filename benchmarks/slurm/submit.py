"""Submit the jobs of some papers: pre-training, then the evaluations, then the tables.

Everything is below OUT/slurm/TIME: submitit's scripts and logs, a journal for each task, and jobs.json with the job ids.
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import submitit
import tyro
from submitit.core.utils import FailedJobError, FailedSubmissionError

from benchmarks.reproduce import Options, parse, plan
from benchmarks.slurm import journal
from benchmarks.slurm.cluster import ClusterError, Wanted, ask, problems
from benchmarks.slurm.job import run
from benchmarks.slurm.status import read_jobs
from benchmarks.stages import Stages
from common.environment import COPIED_FROM, ROOT, commit
from common.recipe import RecipeError
from common.run import RunError, write_text
from common.train import device_batch, make_fabric


@dataclass
class Resources:
    """Submit pre-training, evaluations and tables as jobs. After -- follow options of benchmarks.reproduce, such as --epochs 800."""

    papers: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Papers or baselines, such as droppos mp3."""
    partition: str | None = None
    """Partition of the cluster; by default the cluster's."""
    account: str | None = None
    """Account that pays for the jobs; by default yours."""
    hours: float = 24.0
    """Time limit of a job; a job that needs longer is saved, requeued and resumed."""
    nodes: int = 1
    """Nodes of each pre-training and evaluation."""
    gpus: int | None = None
    """GPUs of each node, one process each (with --device cpu: processes); by default 1."""
    cpus: int = 8
    """CPU cores for each process."""
    parallel: int = 4
    """Pre-trainings, and evaluations of one paper, that run at the same time."""
    chain: int = 1
    """Jobs for each task, one after the other, for clusters that do not let jobs be requeued."""
    warn: int = 300
    """Seconds before the time limit at which a job saves."""
    sbatch: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Other option of sbatch, repeatable: --sbatch constraint=a100 --sbatch mem=64G."""

    def __post_init__(self) -> None:
        if self.nodes > 1 and self.gpus is None:
            raise RecipeError(f"NODES={self.nodes} without GPUS: give the number of GPUs of each node, such as GPUS=8")
        for name in ("hours", "nodes", "gpus", "cpus", "parallel", "chain", "warn"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise RecipeError(f"{name.upper()}={value} is not greater than 0")
        if wrong := [option for option in self.sbatch if "=" not in option]:
            raise RecipeError(f"--sbatch {wrong[0]}: give name=value, such as --sbatch mem=64G")

    @property
    def minutes(self) -> int:
        return math.ceil(60 * self.hours)

    @property
    def processes(self) -> int:
        return self.nodes * (self.gpus or 1)


@dataclass
class Task:
    """One call of benchmarks.reproduce."""

    name: str
    label: str  # for people
    arguments: list[str]
    folders: list[str]  # its stages, as patterns
    jobs: list[str] = field(default_factory=list)  # ids


@dataclass
class Group:
    """Tasks that are submitted together, as an array."""

    tasks: list[Task]
    resources: Resources
    after: list[Task]  # that must be finished first


def submit(resources: Resources, arguments: Sequence[str]) -> str:
    """Check everything, copy the code and submit all jobs; return what to tell. Raises RecipeError with all problems."""
    options = parse([resources.papers[0], *arguments])
    out, on_gpu = options.out.absolute(), options.device != "cpu"
    fixed = ["--out", str(out), "--data-root", str(options.data_root.absolute()), *(["--device", "cuda"] if on_gpu else [])]
    fixed += ["--data", str(Path(options.data).absolute())] if Path(options.data).is_dir() else []
    fixed += ["--encoder", str(options.encoder.absolute())] if options.encoder else []
    if options.record:
        raise RecipeError("--record is not for jobs: call make reproduce with RECORD=1 and the same OUT when they are finished")
    groups = [group for paper in resources.papers for group in tasks(parse([paper, *arguments]), [paper, *arguments, *fixed], resources)]
    groups = _joined(groups)
    largest = max(len(group.tasks) for group in groups)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in _sbatch(resources, on_gpu).items()]
    found = list(problems(Wanted(resources.partition, resources.minutes, largest, resources.chain == 1, flags)))
    found += _live(out)
    if found:
        head = [f"{len(found)} problems found, nothing was submitted:"] if len(found) > 1 else []
        raise RecipeError("\n".join([*head, *found]))
    folder = out / "slurm" / time.strftime("%Y-%m-%dT%H:%M:%S")
    folder.mkdir(parents=True)
    code = copy_code(out)
    _send(groups, folder, code, resources, on_gpu)
    count = sum(len(task.jobs) for group in groups for task in group.tasks)
    return f"{count} jobs submitted, logs in {folder}, code in {code}; make status OUT={options.out}, make cancel OUT={options.out}"


def tasks(options: Options, arguments: list[str], resources: Resources) -> list[Group]:
    """The tasks of one paper in three or four groups: tokens (MaPeT only), pre-training, evaluations, table."""
    runs = plan(options, make_fabric("cpu", "32-true"))
    for own in runs:
        device_batch(own.recipe.pretrain, resources.processes)
    one = replace(resources, nodes=1, gpus=1)
    paper, groups = options.paper, list[Group]()

    def add(kind: str, found: list[tuple[str, list[str], list[Stages], str]], resources: Resources) -> None:
        after = groups[-1].tasks if groups else []
        made = [
            Task(f"{kind}-{paper}-{index}", f"{paper} {label}", [*arguments, *more], [str(own.root.absolute() / stage) for own in of])
            for index, (label, more, of, stage) in enumerate(found)
        ]
        groups.append(Group(made, resources, after))

    seeds = sorted({own.seed for own in runs})
    if hasattr(runs[0].module, "prepare") and options.encoder is None:
        add("tokens", [("tokens", ["--prepare"], [], "")], one)
    alone = [(own, ["--first-seed", str(own.seed), "--seeds", "1"]) for own in runs]
    add(
        "pretrain",
        [
            (
                f"{own.arm} seed {own.seed} pretrain".strip(),
                [*seed, *(["--arms", own.arm] if own.arm else []), "--stages", "pretrain"],
                [own],
                "pretrain",
            )
            for own, seed in alone
        ],
        resources,
    )
    protocols = list(dict.fromkeys(protocol.name for own in runs for protocol in own.recipe.protocols))
    evaluations = [
        (
            f"seed {seed} {name}",
            ["--first-seed", str(seed), "--seeds", "1", "--stages", name],
            [own for own in runs if own.seed == seed],
            f"{name}-*",
        )
        for seed in seeds
        for name in protocols
    ]
    if evaluations:
        add("evaluate", evaluations, resources)
    add("table", [("table", [], [], "")], one)
    return groups


def _joined(groups: list[Group]) -> list[Group]:
    """The pre-trainings of all papers in one array, for one limit on how many run at the same time."""
    first = [group for group in groups if group.tasks[0].name.startswith("pretrain")]
    tokens = [group for group in groups if group.tasks[0].name.startswith("tokens")]
    rest = [group for group in groups if group not in first + tokens]
    joined = Group(
        [task for group in first for task in group.tasks], first[0].resources, [task for group in tokens for task in group.tasks]
    )
    return [*tokens, joined, *rest]


def _sbatch(resources: Resources, on_gpu: bool) -> dict[str, str | int]:
    """The options of sbatch, by the names of submitit."""
    gpus = resources.gpus or 1
    found: dict[str, str | int] = {"time": resources.minutes, "nodes": resources.nodes, "ntasks_per_node": gpus}
    found |= {"cpus_per_task": resources.cpus} | ({"gpus_per_node": gpus} if on_gpu else {})
    found |= {"partition": resources.partition} if resources.partition else {}
    found |= {"account": resources.account} if resources.account else {}
    return found | dict(option.split("=", 1) for option in resources.sbatch)


def _send(groups: list[Group], folder: Path, code: Path, resources: Resources, on_gpu: bool) -> None:
    """Submit the groups, and write their job ids after each. If one is refused, cancel all."""
    token = folder / "shared"
    token.touch()
    sent: list[Task] = []
    try:
        for group in groups:
            arrays = [group.tasks] if resources.chain == 1 else [[task] for task in group.tasks for _ in range(resources.chain)]
            for array in arrays:
                name = array[0].name if len(array) == 1 else array[0].name.partition("-")[0] + "-" + folder.name
                _send_array(array, name, group, folder, code, token, resources, on_gpu)
            sent += group.tasks
            write_text(folder / "jobs.json", json.dumps([vars(task) for task in sent], indent=1) + "\n")
    except (FailedJobError, FailedSubmissionError) as error:
        ids = [job for group in groups for task in group.tasks for job in task.jobs]
        if ids:
            ask("scancel", *ids)
        raise ClusterError(f"sbatch refused a job, so all were cancelled: {str(error).strip().splitlines()[-1]}") from None


def _send_array(
    array: list[Task], name: str, group: Group, folder: Path, code: Path, token: Path, resources: Resources, on_gpu: bool
) -> None:
    """Submit tasks as an array, or one task as a job."""
    own = group.resources
    shared, python = shlex.quote(str(token)), shlex.quote(sys.executable)
    blind = f"error: node $SLURMD_NODENAME does not see {shared}: OUT must be on a file system that all nodes share"
    setup = [
        f"cd {shlex.quote(str(code))} && test -w {shlex.quote(str(folder))} || {{ echo {shlex.quote(blind)}; exit 2; }}",
        "export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}",
    ]
    if own.nodes > 1:
        check = f"test -w {shlex.quote(str(folder))} || {{ echo {shlex.quote(blind)}; exit 2; }}"
        setup.append(f"srun --ntasks-per-node=1 --ntasks=$SLURM_JOB_NUM_NODES sh -c {shlex.quote(check)} || exit 2")
    log = folder / f"{array[0].name}.jsonl"
    journals = str(log)
    if len(array) > 1:
        names = " ".join(shlex.quote(task.name) for task in array)
        setup.append(f"names=({names})")
        journals = f"{folder}/${{names[$SLURM_ARRAY_TASK_ID]}}.jsonl"
    teardown = ["code=$?", f'{python} benchmarks/slurm/journal.py "{journals}" $code', "exit $code"]
    conditions = ["singleton"] if resources.chain > 1 else []
    conditions += ["afterok:" + ":".join(dict.fromkeys(task.jobs[-1] for task in group.after))] if group.after else []
    extra: dict = (
        {"kill-on-invalid-dep": "yes", "requeue": True} if resources.chain == 1 else {"kill-on-invalid-dep": "yes", "no-requeue": True}
    )
    extra |= {"dependency": ",".join(conditions)} if conditions else {}
    known = _sbatch(own, on_gpu)
    executor = submitit.SlurmExecutor(folder / "%j")
    executor.update_parameters(
        job_name=name,
        setup=setup,
        teardown=teardown,
        signal_delay_s=resources.warn,
        array_parallelism=resources.parallel,
        srun_args=["--kill-on-bad-exit=1", "--cpu-bind=none", f"--cpus-per-task={own.cpus}"],
        stderr_to_stdout=True,
        time=known.pop("time"),
        additional_parameters={name.replace("_", "-"): value for name, value in known.items()} | extra,
    )
    for task in array:
        if not (path := folder / f"{task.name}.jsonl").exists():
            journal.note(path, "submitted", label=task.label, folders=task.folders, requeue=resources.chain == 1)
    with executor.batch():
        jobs = [executor.submit(run, task.arguments, folder / f"{task.name}.jsonl") for task in array]
    for task, job in zip(array, jobs, strict=True):
        task.jobs.append(job.job_id)


def _live(out: Path) -> list[str]:
    """Jobs of an earlier submission to the same folder that have not ended."""
    live = [job for job in read_jobs(out) if job.live] if shutil.which("squeue") else []
    return [f"OUT={out} has {len(live)} jobs that wait or run, such as {live[0].id}: make cancel, or use another OUT"] if live else []


def copy_code(out: Path) -> Path:
    """Copy the code as it is now, committed or not, to OUT/code-COMMIT, which the jobs run; return the folder.

    These are the files that git tracks, and new Python files. The copy is made beside it and renamed. Raises RunError outside a checkout.
    """
    names = set[str]()
    for which in (["--cached"], ["--others", "--exclude-standard", "*.py"]):
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", *which], capture_output=True, text=True)
        if listed.returncode:
            raise RunError(f"{ROOT} is not a git checkout, so its code cannot be copied for the jobs: {listed.stderr.strip()}")
        names |= {name for name in listed.stdout.split("\0") if (ROOT / name).is_file() and not (ROOT / name).is_relative_to(out)}
    state = commit()
    content = hashlib.sha256(b"".join(name.encode() + (ROOT / name).read_bytes() for name in sorted(names))).hexdigest()
    folder = out / f"code-{state}{'-' + content[:8] if state.endswith('+dirty') else ''}"
    if not folder.exists():
        staged = out / f".{folder.name}.{os.getpid()}"
        for name in names:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, staged / name)
        (staged / COPIED_FROM).write_text(state + "\n")
        os.rename(staged, folder)
    return folder
