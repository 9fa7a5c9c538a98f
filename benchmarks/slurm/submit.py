"""Submit the jobs of some papers with submitit.

Everything is below OUT/slurm/TIME: submitit's scripts and logs, a journal for each task, and jobs.json with the job ids. submitit's
own record of a result, a pickle, is never read.
"""

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import submitit
import tyro
from submitit.core.utils import FailedJobError, FailedSubmissionError

from benchmarks.reproduce import parse
from benchmarks.slurm import journal
from benchmarks.slurm.cluster import ClusterError, Wanted, ask, problems
from benchmarks.slurm.job import run
from benchmarks.slurm.snapshot import copy_code
from benchmarks.slurm.status import read_jobs
from benchmarks.slurm.tasks import Group, Task, groups
from common.recipe import RecipeError
from common.run import write_text


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
    """Time limit of a job; a training that needs longer is saved, requeued and resumed."""
    nodes: int = 1
    """Nodes of each pre-training and evaluation."""
    gpus: int | None = None
    """GPUs of each node, one process each (with --device cpu: processes); by default 1."""
    cpus: int = 8
    """CPU cores for each process."""
    parallel: int = 4
    """Pre-trainings, or evaluations of one paper, that run at the same time. Without effect on a chain."""
    chain: int = 1
    """Jobs for each task, one after the other, for clusters that do not let jobs be requeued."""
    warn: int = 300
    """Seconds before the time limit at which a job saves."""
    sbatch: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Other option of sbatch, repeatable: --sbatch constraint=a100 --sbatch mem=64G."""

    def __post_init__(self) -> None:
        if not self.papers:
            raise RecipeError("name one or several papers, such as PAPER=droppos")
        if self.nodes > 1 and self.gpus is None:
            raise RecipeError(f"NODES={self.nodes} without GPUS: give the number of GPUs of each node, such as GPUS=8")
        for name in ("hours", "nodes", "gpus", "cpus", "parallel", "chain", "warn"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise RecipeError(f"{name.upper()}={value} is not greater than 0")
        if wrong := [option for option in self.sbatch if "=" not in option]:
            raise RecipeError(f"--sbatch {wrong[0]}: give name=value, such as --sbatch mem=64G")

    @property
    def requeue(self) -> bool:
        return self.chain == 1

    def options(self, alone: bool, on_gpu: bool) -> dict[str, str | int]:
        """The options of sbatch. alone: for one process."""
        gpus = 1 if alone else self.gpus or 1
        found: dict[str, str | int] = {"time": math.ceil(60 * self.hours), "nodes": 1 if alone else self.nodes, "ntasks-per-node": gpus}
        found |= {"cpus-per-task": self.cpus} | ({"gpus-per-node": gpus} if on_gpu else {})
        found |= {name: value for name in ("partition", "account") if (value := getattr(self, name))}
        return found | dict(option.split("=", 1) for option in self.sbatch)


def submit(resources: Resources, arguments: Sequence[str]) -> str:
    """Check everything, copy the code and submit all jobs; return a message. Raises RecipeError with all problems."""
    options = parse([resources.papers[0], *arguments])
    out, on_gpu = options.out.absolute(), options.device != "cpu"
    if options.record:
        raise RecipeError("--record is not for jobs: when they are finished, call make reproduce with RECORD=1 and the same OUT")
    # the jobs run in another folder
    fixed = ["--out", str(out), "--data-root", str(options.data_root.absolute()), *(["--device", "cuda"] if on_gpu else [])]
    fixed += ["--data", str(Path(options.data).absolute())] if Path(options.data).is_dir() else []
    fixed += ["--encoder", str(options.encoder.absolute())] if options.encoder else []
    calls = [(parse([paper, *arguments]), [paper, *arguments, *fixed]) for paper in resources.papers]
    planned = groups(calls, resources.nodes * (resources.gpus or 1))
    flags = [f"--{name}={value}" for name, value in resources.options(False, on_gpu).items()]
    largest = max(len(group.tasks) for group in planned)
    wanted = Wanted(resources.partition, math.ceil(60 * resources.hours), largest, resources.requeue, flags)
    found = [*problems(wanted), *_live(out)]
    if found:
        head = [f"{len(found)} problems found, nothing was submitted:"] if len(found) > 1 else []
        raise RecipeError("\n".join([*head, *found]))
    folder = out / "slurm" / time.strftime("%Y-%m-%dT%H:%M:%S")
    folder.mkdir(parents=True)
    Submission(resources, folder, copy_code(out), on_gpu).send(planned)
    count = sum(len(task.jobs) for group in planned for task in group.tasks)
    return f"{count} jobs submitted, logs in {folder}\nmake status OUT={options.out} shows them, make cancel OUT={options.out} ends them"


def _live(out: Path) -> list[str]:
    """Jobs of an earlier submission to the same folder that have not ended."""
    live = [job.id for job in read_jobs(out) if job.live] if shutil.which("squeue") else []
    return [f"OUT={out} has {len(live)} jobs that wait or run, such as {live[0]}: use make cancel, or another OUT"] if live else []


@dataclass
class Submission:
    """The jobs of one call of make submit."""

    resources: Resources
    folder: Path
    code: Path
    on_gpu: bool

    def send(self, planned: Sequence[Group]) -> None:
        """Submit groups of tasks, and write the job ids after each. If one is refused, all are cancelled, and ClusterError is raised."""
        tasks = [task for group in planned for task in group.tasks]
        try:
            for group in planned:
                if self.resources.requeue:
                    self._send(group.tasks, group)
                else:
                    for task in group.tasks * self.resources.chain:
                        self._send([task], group)
                write_text(self.folder / "jobs.json", json.dumps([vars(task) for task in tasks if task.jobs], indent=1) + "\n")
        except (FailedJobError, FailedSubmissionError) as error:
            if ids := [job for task in tasks for job in task.jobs]:
                ask("scancel", *ids)
            raise ClusterError(f"sbatch refused a job, so all were cancelled: {str(error).strip().splitlines()[-1]}") from None

    def _send(self, tasks: Sequence[Task], group: Group) -> None:
        """Submit tasks as an array, or one task as a job."""
        resources, options = self.resources, self.resources.options(group.alone, self.on_gpu)
        conditions = [] if resources.requeue else ["singleton"]
        if group.after:
            conditions.append("afterok:" + ":".join(dict.fromkeys(task.jobs[-1] for task in group.after)))
        extra: dict = {"kill-on-invalid-dep": "yes", "requeue" if resources.requeue else "no-requeue": True}
        extra |= {"dependency": ",".join(conditions)} if conditions else {}
        setup, teardown = self._shell([task.name for task in tasks], int(options["nodes"]))
        executor = submitit.SlurmExecutor(self.folder / "%j")
        executor.update_parameters(
            job_name=f"{tasks[0].name if len(tasks) == 1 else tasks[0].name.partition('-')[0]}-{self.folder.name}",
            setup=setup,
            teardown=teardown,
            signal_delay_s=resources.warn,
            array_parallelism=resources.parallel,
            srun_args=["--kill-on-bad-exit=1", "--cpu-bind=none", f"--cpus-per-task={options['cpus-per-task']}"],
            stderr_to_stdout=True,
            time=options.pop("time"),
            additional_parameters=options | extra,
        )
        for task in tasks:
            if not self._journal(task).exists():
                journal.note(self._journal(task), "submitted", label=task.label, folders=task.folders, requeue=resources.requeue)
        with executor.batch():
            jobs = [executor.submit(run, task.arguments, self._journal(task)) for task in tasks]
        for task, job in zip(tasks, jobs, strict=True):
            task.jobs.append(job.job_id)

    def _journal(self, task: Task) -> Path:
        return self.folder / f"{task.name}.jsonl"

    def _shell(self, names: Sequence[str], nodes: int) -> tuple[list[str], list[str]]:
        """Lines of the batch script before and after srun: go to the copy of the code on nodes that share OUT; requeue."""
        folder, python = shlex.quote(str(self.folder)), shlex.quote(sys.executable)
        check = f'test -w {folder} || {{ echo "error: node $SLURMD_NODENAME does not see {folder}: use a shared OUT"; exit 2; }}'
        setup = [
            check,
            f"cd {shlex.quote(str(self.code))}",
            "export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}",
        ]
        if nodes > 1:
            setup.append(f"srun --ntasks={nodes} --ntasks-per-node=1 sh -c {shlex.quote(check)} || exit 2")
        setup.append(f"tasks=({' '.join(map(shlex.quote, names))})")
        log = f'{folder}/"${{tasks[${{SLURM_ARRAY_TASK_ID:-0}}]}}".jsonl'
        return setup, ["code=$?", f"{python} benchmarks/slurm/journal.py {log} $code", "exit $code"]
