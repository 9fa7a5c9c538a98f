"""Jobs on a real Slurm of two nodes, started on this machine by slurm/cluster.sh: what is submitted, and which faults it survives.

The tests marked `faults` take minutes each; `make test-slurm` runs them. Those of faults print a line each: times tried, steps lost,
seconds from the fault to the next new step, and whether metrics.jsonl is that of an undisturbed run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.slurm import journal
from benchmarks.slurm.__main__ import main
from benchmarks.slurm.cluster import minutes
from benchmarks.slurm.job import launcher_variables
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
        self, out: Path, *arguments: str, slurm: list[str] = SMALL, papers: tuple[str, ...] = ("droppos",), code: Path = ROOT
    ) -> None:
        self.run(sys.executable, "-m", "benchmarks.slurm", "submit", *papers, *slurm, "--", *arguments, "--out", out, code=code)

    def status(self, out: Path, **variables: str) -> str:
        return self.run(sys.executable, "-m", "benchmarks.slurm", "status", out, **variables)

    def queue(self) -> str:
        return self.run("squeue", "-h", "-r", "-o", "%i %j %T %N %r")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    script = ROOT / "tests" / "slurm" / "cluster.sh"
    started = subprocess.run([script, "start", folder], env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=120)
    if started.returncode:
        subprocess.run([script, "stop", folder], env=os.environ | {"PATH": PATH}, capture_output=True, timeout=120)
        pytest.skip(f"Slurm could not be started: {started.stderr}")
    yield Cluster(folder)
    subprocess.run([script, "stop", folder], env=os.environ | {"PATH": PATH}, capture_output=True, timeout=120)


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


def undisturbed(cluster: Cluster, out: Path, *arguments: str) -> None:
    """The same run without Slurm, in two processes."""
    cluster.run(sys.executable, "-m", "benchmarks.reproduce", "droppos", *arguments, "--gpus", "2", "--out", out)


def same_metrics(one: Path, other: Path) -> bool:
    assert (one / "metrics.jsonl").stat().st_size > 0
    return (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def fault(name: str, run: Path, path: Path, strike, seconds: float = 240.0) -> str:
    """Strike a run that has trained and saved some steps, wait until it trains on, and return a line of the table without its end.

    The steps that are lost are those of metrics.jsonl, a line for each 11 steps, after the step from which the run resumes.
    """
    wait_until(lambda: step(run)["saved"] > 0, seconds)
    time.sleep(1)
    starts, began, metrics = names(path).count("start"), time.time(), (run / "metrics.jsonl").read_text().splitlines()
    strike()
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


def test_launcher_variables_are_those_of_slurm():
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "12345", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    slurm |= {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    found = launcher_variables(slurm)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("9", "16", "1", "8")
    assert found["MASTER_ADDR"] == "gpu07" and 20_000 <= int(found["MASTER_PORT"]) < 32_000
    assert launcher_variables(slurm | {"SLURM_RESTART_COUNT": "1"})["MASTER_PORT"] != found["MASTER_PORT"]


def test_time_limits_of_slurm_are_understood():
    assert [minutes(limit) for limit in ("1-00:00:00", "00:05:00", "10-12:30:00", "UNLIMITED")] == [1440, 5, 15150, None]


def test_three_starts_without_a_new_step_end_a_task_and_a_new_step_does_not(tmp_path):
    path, run = tmp_path / "task.jsonl", tmp_path / "run"
    run.mkdir()
    journal.note(path, "submitted", label="x", folders=[str(run)], requeue=True)
    for node in ("n1", "n1", "n2"):
        assert not journal.stuck(path)
        journal.note(path, "start", node=node, job="1", restart=0, progress=journal.progress(path))
    assert journal.stuck(path) == "no step gained in 3 starts, on n1, n1, n2"
    (run / "progress.json").write_text('{"saved": 5}')
    assert not journal.stuck(path)


def test_without_slurm_the_local_command_is_offered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "droppos", "--", "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "sbatch, squeue, scontrol, scancel: not on the PATH" in said and "make reproduce" in said
    assert not list(tmp_path.iterdir())


def test_nodes_without_gpus_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["submit", "droppos", "--nodes", "4"])
    assert stopped.value.code == 2 and "NODES=4 without GPUS" in " ".join(capsys.readouterr().err.split())


def test_the_copy_of_the_code_knows_its_commit(tmp_path):
    copy = copy_code(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(copy)}
    code = "from common.environment import ROOT, commit; print(ROOT, commit())"
    said = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == str(copy) and copy.name.startswith(f"code-{said.split()[1]}")
    assert copy_code(tmp_path) == copy and (copy / "benchmarks" / "slurm" / "job.py").exists()


@on_cluster
def test_a_partition_that_does_not_exist_is_one_clear_message(cluster, tmp_path, monkeypatch, capsys):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    assert main(["submit", "droppos", "--partition", "gpu", "--hours", "0.1", "--", *CPU, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out.strip() == "error: PARTITION=gpu: no such partition; known: main, high"
    assert main(["submit", "droppos", "--hours", "48", "--", *CPU, "--seeds", "60", "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "HOURS=48: the limit of partition main is 24" in said and "MaxArraySize" in said and said.startswith("error: 3 problems found")
    assert not list(tmp_path.iterdir())


@on_cluster
def test_jobs_give_the_numbers_of_a_run_without_slurm(cluster, tmp_path):
    options = [*CPU, "--epochs", "2", "--seeds", "2", "--stages", "pretrain", "knn"]
    cluster.submit(tmp_path / "jobs", *options)
    wait_until(lambda: names(log(tmp_path / "jobs", "table-droppos"))[-1] == "finished", 240)
    undisturbed(cluster, tmp_path / "here", *options)
    results = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here").glob("*/*/*/result.json"))
    assert len(results) == 8  # pre-training, and k-NN on trained and random features and on pixels
    for path in results:
        one, other = (json.loads((tmp_path / where / path).read_text()) for where in ("jobs", "here"))
        assert one.get("top1", one.get("position_top1")) == other.get("top1", other.get("position_top1")) is not None, path
        assert one["environment"]["commit"] == other["environment"]["commit"]
    (table,) = (tmp_path / "jobs").glob(f"slurm/*/{job(tmp_path / 'jobs', 'table-droppos')}/*_0_log.out")
    assert "2 epochs of pre-training, 2 seeds" in table.read_text()
    assert cluster.status(tmp_path / "jobs").count("finished") == 5


@on_cluster
def test_tasks_of_an_array_survive_a_requeue_and_a_killed_process_and_run_the_code_that_was_submitted(cluster, tmp_path):
    code, out = checkout(tmp_path), tmp_path / "jobs"
    cluster.submit(out, *LONG, "--seeds", "2", code=code)
    with open(code / "droppos" / "method.py", "a") as file:
        file.write("raise RuntimeError('this code was edited')\n")
    runs = [out / "droppos" / f"digits-16ep-seed{seed}" / "pretrain" for seed in (0, 1)]
    logs = [log(out, f"pretrain-droppos-seed{seed}") for seed in (0, 1)]
    ids = [job(out, f"pretrain-droppos-seed{seed}") for seed in (0, 1)]
    assert ids[1].endswith("_1")

    def kill() -> None:
        both = processes(ids[0])
        assert len(both) == 2
        os.kill(both[1], signal.SIGKILL)
        wait_until(lambda: not {*processes(ids[0])} & {*both}, 60)  # nothing is left of the job on the node
        wait_until(lambda: names(logs[0])[-1] in ("requeued", "start"), 60)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(fault, "kill -9 of one process of two", runs[0], logs[0], kill)
        second = pool.submit(fault, "scontrol requeue, in an array", runs[1], logs[1], lambda: cluster.run("scontrol", "requeue", ids[1]))
    lines = [first.result(), second.result()]
    wait_until(lambda: all(names(path)[-1] == "finished" for path in logs), 240)
    undisturbed(cluster, tmp_path / "here", *LONG, "--seeds", "2")
    for seed, text in zip((0, 1), lines, strict=True):
        same = same_metrics(runs[seed], tmp_path / "here" / "droppos" / f"digits-16ep-seed{seed}" / "pretrain")
        print(f"\n{text}, {'identical' if same else 'NOT identical'}")
        assert same
    assert "a process was killed by SIGKILL" in logs[0].read_text()


@on_cluster
def test_a_training_that_fails_for_good_cancels_its_dependents_and_status_says_why(cluster, tmp_path):
    cluster.submit(tmp_path, *CPU, "--epochs", "2", "--stages", "pretrain", "knn", "--set", "pretrain.base_lr=1e30")
    wait_until(lambda: str(job(tmp_path, "table-droppos")) not in cluster.queue(), 120)
    for path in (cluster.environment["PATH"], without(tmp_path / "bin", "sacct")):
        said = cluster.status(tmp_path, PATH=path)
        head, training, evaluation, table = said.strip().splitlines()
        assert " failed " in training and "loss is" in training and "learning rate" in training
        assert " cancelled " in evaluation and "depends" in evaluation and " cancelled " in table


def without(folder: Path, name: str) -> str:
    """A PATH with Slurm's commands but one."""
    folder.mkdir()
    for command in ("squeue", "scontrol", "sacct", "git"):
        if command != name:
            (folder / command).symlink_to(shutil.which(command, path=PATH))
    return str(folder)


ONE = ["60" if word == "16" else word for word in LONG]
RUN = Path("droppos") / "digits-60ep-seed0" / "pretrain"
TASK = "pretrain-droppos-seed0"


@pytest.fixture(scope="module")
def reference(cluster, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("reference")
    undisturbed(cluster, out, *ONE)
    return out / RUN


def survives(name: str, out: Path, reference: Path, strike, seconds: float = 240.0) -> None:
    """Strike the run of a submission, wait for its end, print the line of the fault and compare the run with an undisturbed one."""
    line = fault(name, out / RUN, log(out, TASK), strike, seconds)
    wait_until(lambda: names(log(out, TASK))[-1] == "finished", seconds)
    same = same_metrics(out / RUN, reference)
    print(f"\n{line}, {'identical' if same else 'NOT identical'}")
    assert same


@on_cluster
@pytest.mark.faults
def test_a_warning_before_the_time_limit_saves_and_requeues(cluster, tmp_path, reference):
    cluster.submit(tmp_path, *ONE, slurm=[*SMALL, "--hours", "0.033", "--warn", "60"])
    survives("warning before the time limit", tmp_path, reference, lambda: None)
    assert "stopped by a signal, progress saved" in log(tmp_path, TASK).read_text()


@on_cluster
@pytest.mark.faults
def test_a_preempted_job_saves_and_resumes(cluster, tmp_path, reference):
    cluster.submit(tmp_path, *ONE, slurm=[*SMALL, "--sbatch", "nodelist=n1"])
    urgent = ["sbatch", "--partition=high", "--nodelist=n1", "--ntasks=4", f"--output={tmp_path}/urgent", "--wrap=sleep 5"]
    survives("preemption by a higher partition", tmp_path, reference, lambda: cluster.run(*urgent))


@on_cluster
@pytest.mark.faults
def test_a_job_of_a_lost_node_resumes_on_the_other(cluster, tmp_path, reference):
    cluster.submit(tmp_path, *ONE)

    def lose() -> None:
        node = journal.events(log(tmp_path, TASK), "start")[-1]["node"]
        daemon = int((cluster.folder / f"slurmd-{node}.pid").read_text())
        steps = [int(one) for one in subprocess.run(["pgrep", "slurmstepd"], capture_output=True, text=True).stdout.split()]
        for process in [daemon, *steps, *processes(job(tmp_path, TASK))]:
            os.kill(process, signal.SIGKILL)

    survives("node lost: slurmd, steps and processes killed", tmp_path, reference, lose)
    lost, other = [event["node"] for event in journal.events(log(tmp_path, TASK), "start")]
    assert lost != other
    with open(cluster.folder / f"slurmd-{lost}.log", "a") as output:
        daemon = subprocess.Popen(
            ["slurmd", "-D", "-N", lost], env=cluster.environment, stdout=output, stderr=output, start_new_session=True
        )
    (cluster.folder / f"slurmd-{lost}.pid").write_text(f"{daemon.pid}\n")
    wait_until(lambda: cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")


@on_cluster
@pytest.mark.faults
def test_a_chain_resumes_without_requeueing(cluster, tmp_path, reference):
    cluster.submit(tmp_path, *ONE, slurm=[*SMALL, "--chain", "2"])
    first = next(task["jobs"][0] for path in tmp_path.glob("slurm/*/jobs.json") for task in json.loads(path.read_text()))
    survives("signal to a job of a chain (CHAIN=2)", tmp_path, reference, lambda: cluster.run("scancel", "--signal=USR2", first))
    assert "requeued" not in names(log(tmp_path, TASK))
    wait_until(lambda: names(log(tmp_path, "table-droppos"))[-1] == "finished")


@on_cluster
@pytest.mark.faults
def test_a_restart_storm_ends_and_names_the_node(cluster, tmp_path):
    code = checkout(tmp_path)
    method = code / "droppos" / "method.py"
    method.write_text(method.read_text() + "\n\nimport os\nDropPos.forward = lambda *_: os.kill(os.getpid(), 9)\n")
    began = time.time()
    cluster.submit(tmp_path / "jobs", *ONE, code=code)
    wait_until(lambda: names(log(tmp_path / "jobs", TASK))[-1] == "failed", 300)
    why = journal.events(log(tmp_path / "jobs", TASK), "failed")[0]["why"]
    assert "no step gained in 3 starts, on n1, n1, n1" in why and "SIGKILL" in why
    wait_until(lambda: job(tmp_path / "jobs", "table-droppos") not in cluster.queue())
    print(f"\nrestart storm: 3 starts, ended for good after {time.time() - began:.0f} s")


@on_cluster
@pytest.mark.faults
def test_cancelled_jobs_save_and_do_not_come_back(cluster, tmp_path):
    for command in ("cancel", "scancel"):
        out = tmp_path / command
        cluster.submit(out, *ONE)
        wait_until(lambda out=out: step(out / RUN)["step"] > 0)
        if command == "cancel":
            cluster.run(sys.executable, "-m", "benchmarks.slurm", "cancel", out)
        else:
            cluster.run("scancel", job(out, TASK))
        wait_until(lambda: not cluster.queue().strip())
        time.sleep(8)
        assert not cluster.queue().strip() and names(log(out, TASK)).count("start") == 1
        assert cluster.status(out).count(" cancelled ") == 2
