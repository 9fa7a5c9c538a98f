"""A real Slurm of two nodes on this machine (cluster.sh), what a user types there, and how a fault of a run is measured.

Its tests are skipped where Slurm is not installed, and without root.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.slurm import journal
from benchmarks.slurm.snapshot import copy_code
from common.environment import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PATH = f"{os.environ['PATH']}:/usr/sbin"
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
on_slurm = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),  # one cluster
    pytest.mark.skipif(
        bool(MISSING), reason=f"Slurm is not installed: {', '.join(MISSING)} (slurmctld slurmd slurm-client munge of Debian)"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm cluster of several nodes on one machine needs root"),
]
SMALL = ["--gpus", "2", "--cpus", "1", "--hours", "0.1", "--warn", "30"]
CPU = ["--device", "cpu"]
LONG = [*CPU, "--epochs", "16", "--stages", "pretrain", "--checkpoint-seconds", "2"]


def on_cluster(function):
    for mark in on_slurm:
        function = mark(function)
    return function


class Cluster:
    """The running cluster, and what a user types there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        variables = {"SLURM_CONF": f"{folder}/slurm.conf", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.environment = {name: value for name, value in os.environ.items() if "XDIST" not in name} | variables | {"PATH": PATH}

    def run(self, *command: object, code: Path = ROOT, **variables: str) -> str:
        environment = self.environment | {"PYTHONPATH": str(code)} | variables
        done = subprocess.run([*map(str, command)], cwd=code, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, out: Path, *arguments: object, slurm: list[str] = SMALL, paper: str = "droppos", code: Path = ROOT, **variables: str
    ) -> None:
        submit = (sys.executable, "-m", "benchmarks.slurm", "submit", paper, *slurm, "--", *arguments, "--out", out)
        self.run(*submit, code=code, **variables)

    def status(self, out: Path, **variables: str) -> str:
        return self.run(sys.executable, "-m", "benchmarks.slurm", "status", out, **variables)

    def queue(self) -> str:
        return self.run("squeue", "-h", "-r", "-o", "%i %j %T %N %r")


def wait_until(condition, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
    return found


def job(out: Path, name: str) -> str:
    """The id of the last job of a task."""
    listed = [task for path in out.glob("slurm/*/jobs.json") for task in json.loads(path.read_text())]
    return next(task["jobs"][-1] for task in listed if task["name"] == name)


def log(out: Path, name: str) -> Path:
    (found,) = out.glob(f"slurm/*/{name}.jsonl")
    return found


def names(path: Path) -> list[str]:
    return [event["event"] for event in journal.events(path)]


def step(run: Path) -> dict:
    path = run / "progress.json"
    return json.loads(path.read_text()) if path.exists() else {"step": 0, "saved": 0, "time": 0.0}


def processes(job_id: str) -> list[int]:
    """The processes of a job on this machine: those that have its id in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        of_step = any(name.startswith("SLURM_STEP_ID=") for name in variables)  # not the batch script and srun
        of_array = {f"SLURM_ARRAY_JOB_ID={job_id.partition('_')[0]}", f"SLURM_ARRAY_TASK_ID={job_id.partition('_')[2]}"}
        if of_step and (of_array <= {*variables} or f"SLURM_JOB_ID={job_id}" in variables):
            found.append(int(path.parent.name))
    return found


def undisturbed(cluster: Cluster, out: Path, *arguments: object, paper: str = "droppos") -> None:
    """The same run without Slurm, in two processes."""
    cluster.run(sys.executable, "-m", "benchmarks.reproduce", paper, *arguments, "--gpus", "2", "--out", out)


def same_metrics(one: Path, other: Path) -> bool:
    assert (one / "metrics.jsonl").stat().st_size > 0
    return (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def fault(name: str, run: Path, path: Path, strike, seconds: float = 240.0, ready=None) -> str:
    """Strike a run as soon as it is `ready`, wait until it trains on, and return a line of the table without its end.

    ready: by default, a second after the first save. The steps that are lost are those of metrics.jsonl, a line for each 11 steps, after
    the step from which the run resumes.
    """
    wait_until(ready or (lambda: step(run)["saved"] > 0), seconds)
    if ready is None:
        time.sleep(1)
    starts, began = names(path).count("start"), time.time()
    strike()
    metrics = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ['{"step": 0}']
    wait_until(lambda: names(path).count("start") > starts, seconds)
    last = journal.events(path, "start")[-1]
    wait_until(lambda: step(run)["time"] > last["time"], seconds)
    lost = max(0, json.loads(metrics[-1])["step"] - last["progress"][1])
    return f"{name}: 1 time, {lost} steps lost, {step(run)['time'] - began:.0f} s until the next new step"


def checkout(folder: Path) -> Path:
    """A clone of this checkout, as it is now, that a test may edit."""
    clone = copy_code(folder).rename(folder / "checkout")
    (clone / "copied_from.txt").unlink()
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    return clone


def without(folder: Path, name: str) -> str:
    """A PATH with Slurm's commands but one."""
    folder.mkdir()
    for command in ("squeue", "scontrol", "sacct", "git"):
        if command != name:
            (folder / command).symlink_to(shutil.which(command, path=PATH))
    return str(folder)
