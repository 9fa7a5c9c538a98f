"""Faults on a real Slurm. `make test-slurm` runs them.

Each prints a line: times tried, steps lost, seconds from the fault to the next new step, and whether metrics.jsonl is that of an
undisturbed run.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.slurm import journal
from benchmarks.slurm.job import launcher_variables
from tests.slurm.cluster import (
    CPU,
    LONG,
    SMALL,
    checkout,
    fault,
    job,
    log,
    names,
    on_cluster,
    processes,
    same_metrics,
    step,
    undisturbed,
    wait_until,
)

ONE = ["60" if word == "16" else word for word in LONG]
RUN = Path("droppos") / "digits-60ep-seed0" / "pretrain"
TASK = "pretrain-droppos-seed0"


SHORT_RUN = Path("droppos") / "digits-16ep-seed0" / "pretrain"


@pytest.fixture(scope="module")
def reference(cluster, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("reference")
    undisturbed(cluster, out, *ONE)
    return out / RUN


@pytest.fixture(scope="module")
def short(cluster, tmp_path_factory):
    """An undisturbed run of 16 epochs."""
    out = tmp_path_factory.mktemp("short")
    undisturbed(cluster, out, *LONG)
    return out / SHORT_RUN


def survives(name: str, out: Path, reference: Path, strike, run: Path = RUN, task: str = TASK, ready=None) -> None:
    """Strike the run of a submission, wait for its end, print the line of the fault and compare the run with an undisturbed one."""
    line = fault(name, out / run, log(out, task), strike, ready=ready)
    wait_until(lambda: names(log(out, task))[-1] == "finished", 240)
    same = same_metrics(out / run, reference)
    print(f"\n{line}, {'identical' if same else 'NOT identical'}")
    assert same


def edited(folder: Path, file: str, code: str) -> Path:
    """A checkout with some code added to the end of a file."""
    copy = checkout(folder)
    with open(copy / file, "a") as source:
        source.write(code)
    return copy


def started(out: Path, task: str = TASK):
    """Whether a task has started."""
    return lambda: "start" in names(log(out, task))


def requeued(out: Path, task: str = TASK):
    """A strike for code that strikes itself: wait until the job has been requeued."""
    return lambda: wait_until(lambda: "requeued" in names(log(out, task)))


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
    urgent = ["sbatch", "--partition=high", "--nodes=1", "--nodelist=n1", "--ntasks=4", f"--output={tmp_path}/urgent", "--wrap=sleep 5"]
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


@on_cluster
@pytest.mark.faults
def test_a_signal_while_the_data_are_opened_resumes(cluster, tmp_path, short):
    cluster.submit(tmp_path, *LONG)
    strike = lambda: cluster.run("scancel", "--signal=USR2", job(tmp_path, TASK))  # noqa: E731
    survives("signal before the first step", tmp_path, short, strike, SHORT_RUN, ready=started(tmp_path))
    assert journal.events(log(tmp_path, TASK), "start")[1]["progress"] == [0, 0]


@on_cluster
@pytest.mark.faults
def test_more_signals_during_the_save_do_not_interrupt_it(cluster, tmp_path, short):
    slow = """
_save = PlainCheckpointIO.save_checkpoint

def _slow(self, checkpoint, path, storage_options=None):
    import time
    _save(self, checkpoint, path)
    time.sleep(3)

PlainCheckpointIO.save_checkpoint = _slow
"""
    cluster.submit(tmp_path / "out", *LONG, code=edited(tmp_path, "common/checkpoint.py", slow))

    def strike() -> None:
        for name in ("USR2", "USR2", "TERM"):
            cluster.run("scancel", f"--signal={name}", job(tmp_path / "out", TASK))
            time.sleep(0.7)

    survives("three signals, two of them during the save", tmp_path / "out", short, strike, SHORT_RUN)


@on_cluster
@pytest.mark.faults
def test_a_signal_in_the_last_step_of_an_epoch_resumes_with_the_next_epoch(cluster, tmp_path, short):
    signals = """
_update = Schedule.step_update

def _signalled(self, step):
    import os, pathlib, signal
    sent = pathlib.Path(__file__).with_name(f"sent-{os.environ['RANK']}")
    if step == 21 and not sent.exists():
        sent.touch()
        os.kill(os.getpid(), signal.SIGUSR2)
    _update(self, step)

Schedule.step_update = _signalled
"""
    out = tmp_path / "out"
    cluster.submit(out, *LONG, code=edited(tmp_path, "common/optim.py", signals))
    survives("signal in the last step of an epoch", out, short, requeued(out), SHORT_RUN, ready=started(out))
    assert journal.events(log(out, TASK), "start")[1]["progress"] == [0, 22]


@on_cluster
@pytest.mark.faults
def test_a_signal_during_a_compile_resumes(cluster, tmp_path):
    options = [*LONG, "--compile"]
    undisturbed(cluster, tmp_path / "here", *options)
    cluster.submit(tmp_path / "out", *options, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    strike = lambda: cluster.run("scancel", "--signal=USR2", job(tmp_path / "out", TASK))  # noqa: E731

    def compiling() -> bool:
        return any((tmp_path / "cache").rglob("*.cpp")) and not step(tmp_path / "out" / SHORT_RUN)["step"]

    survives("signal during a compile", tmp_path / "out", tmp_path / "here" / SHORT_RUN, strike, SHORT_RUN, ready=compiling)


@on_cluster
@pytest.mark.faults
def test_a_signal_during_an_evaluation_resumes(cluster, tmp_path):
    stages = ["--stages", "pretrain", "finetune", "--set", "finetune.stage.epochs=16"]
    options = [*CPU, "--epochs", "2", "--checkpoint-seconds", "1", *stages]
    undisturbed(cluster, tmp_path / "here", *options)
    cluster.submit(tmp_path / "out", *options)
    run, task = SHORT_RUN.parents[1] / "digits-2ep-seed0" / "finetune-pretrained", "finetune-droppos-seed0"
    strike = lambda: cluster.run("scancel", "--signal=USR2", job(tmp_path / "out", task))  # noqa: E731
    survives("signal during fine-tuning", tmp_path / "out", tmp_path / "here" / run, strike, run, task)
    one, other = ((tmp_path / where / run / "result.json").read_text().partition('"hours"')[0] for where in ("out", "here"))
    assert one == other


@on_cluster
@pytest.mark.faults
def test_a_signal_while_the_tokens_are_made_resumes(cluster, tmp_path):
    options = [*CPU, "--epochs", "2", "--stages", "pretrain"]
    cluster.submit(tmp_path / "out", *options, "--data-root", tmp_path / "data", paper="mapet")
    path = log(tmp_path / "out", "tokens-mapet")
    wait_until(started(tmp_path / "out", "tokens-mapet"))
    began = time.time()
    cluster.run("scancel", "--signal=USR2", job(tmp_path / "out", "tokens-mapet"))
    wait_until(lambda: names(path)[-1] == "finished", 240)
    assert names(path).count("start") == 2
    seconds = journal.events(path, "start")[1]["time"] - began
    wait_until(lambda: names(log(tmp_path / "out", "pretrain-mapet-seed0"))[-1] == "finished", 240)
    cluster.run(sys.executable, "-m", "benchmarks.reproduce", "mapet", "--prepare", *CPU, "--data-root", tmp_path / "other")
    undisturbed(cluster, tmp_path / "here", *options, "--data-root", tmp_path / "other", paper="mapet")
    run = Path("mapet") / "digits-2ep-seed0" / "pretrain"
    same = same_metrics(tmp_path / "out" / run, tmp_path / "here" / run)
    print(f"\nsignal while tokens are made: 1 time, {seconds:.0f} s until the next start, {'identical' if same else 'NOT identical'}")
    assert same


@on_cluster
@pytest.mark.faults
def test_a_killed_loader_worker_ends_the_job_which_resumes(cluster, tmp_path):
    options = [*LONG, "--workers", "2", "--set", "pretrain.augmentation.randaugment=rand-m9"]  # only this needs workers on digits
    undisturbed(cluster, tmp_path / "here", *options)
    cluster.submit(tmp_path / "out", *options)

    def kill() -> None:
        all_of_job = processes(job(tmp_path / "out", TASK))
        parents = {process: int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]) for process in all_of_job}
        workers = [process for process, parent in parents.items() if parent in parents]
        assert len(workers) == 4  # two for each process
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: not {*processes(job(tmp_path / "out", TASK))} & {*all_of_job}, 60)  # nothing is left on the node

    survives("kill -9 of a loader worker", tmp_path / "out", tmp_path / "here" / SHORT_RUN, kill, SHORT_RUN)


@on_cluster
@pytest.mark.faults
def test_a_node_without_scontrol_fails_clearly_and_a_chain_goes_on(cluster, tmp_path, short):
    (tmp_path / "bin").mkdir()
    for name in ("srun", "sh", "bash", "git", "gcc"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    hidden = f"export=ALL,PATH={tmp_path / 'bin'}"
    cluster.submit(tmp_path / "out", *LONG, slurm=[*SMALL, "--sbatch", hidden])
    wait_until(lambda: step(tmp_path / "out" / SHORT_RUN)["saved"] > 0)
    cluster.run("scancel", "--signal=USR2", job(tmp_path / "out", TASK))
    wait_until(lambda: names(log(tmp_path / "out", TASK))[-1] == "failed")
    assert "n1 has no scontrol: submit again with CHAIN=4" in log(tmp_path / "out", TASK).read_text()
    wait_until(lambda: not cluster.queue().strip())
    assert "CHAIN=4" in cluster.status(tmp_path / "out")
    time.sleep(1)  # folders of submissions are named after the second
    cluster.submit(tmp_path / "out", *LONG, slurm=[*SMALL, "--chain", "2", "--sbatch", hidden])
    newest = sorted(tmp_path.glob(f"out/slurm/*/{TASK}.jsonl"))[-1]
    wait_until(lambda: names(newest)[-1] == "finished", 240)
    same = same_metrics(tmp_path / "out" / SHORT_RUN, short)
    print(f"\nno scontrol on the node: 1 time, says CHAIN=4, which resumes, {'identical' if same else 'NOT identical'}")
    assert same


@on_cluster
@pytest.mark.faults
def test_a_kill_in_the_middle_of_a_save_resumes_from_the_previous_one_and_says_so(cluster, tmp_path, short):
    cut = """
_save, _saves = PlainCheckpointIO.save_checkpoint, []

def _cut(self, checkpoint, path, storage_options=None):
    import os, pathlib, signal
    _save(self, checkpoint, path)
    _saves.append(path)
    killed = pathlib.Path(__file__).with_name("killed")
    if len(_saves) == 2 and not killed.exists():
        killed.touch()
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

PlainCheckpointIO.save_checkpoint = _cut
"""
    out = tmp_path / "out"
    cluster.submit(out, *LONG, code=edited(tmp_path, "common/checkpoint.py", cut))
    survives("kill -9 in the middle of a save", out, short, requeued(out), SHORT_RUN)
    assert "the last save was interrupted, so the one before it is used" in (out / SHORT_RUN / "log.txt").read_text()


@on_cluster
@pytest.mark.faults
def test_a_full_disk_fails_for_good_and_the_next_submission_resumes_from_the_previous_save(cluster, tmp_path, short):
    disk, out = tmp_path / "out" / SHORT_RUN, tmp_path / "out"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], check=True)  # one checkpoint of 11 MB, not two
    try:
        cluster.submit(out, *LONG)
        wait_until(lambda: names(log(out, TASK))[-1] == "failed")
        why = journal.events(log(out, TASK), "failed")[0]["why"]
        assert "could not be written" in why and "the previous one is intact" in why and "Free some space" in why
        saved = step(out / SHORT_RUN)["saved"]
        assert saved > 0
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        wait_until(lambda: not cluster.queue().strip())
        time.sleep(1)
        cluster.submit(out, *LONG)
        newest = sorted(out.glob(f"slurm/*/{TASK}.jsonl"))[-1]
        wait_until(lambda: names(newest)[-1] == "finished", 240)
        assert journal.events(newest, "start")[0]["progress"] == [0, saved]
        same = same_metrics(out / SHORT_RUN, short)
    finally:
        subprocess.run(["umount", disk], check=True)
    print(f"\nfull disk at a save: 1 time, fails for good, resumes from the save before, {'identical' if same else 'NOT identical'}")
    assert same


@on_cluster
@pytest.mark.faults
def test_a_port_in_use_is_said_and_the_next_start_takes_another_and_old_submissions_are_not_read(cluster, tmp_path, short):
    """Also: the folder of an older submission has the same job id and a finished journal."""
    cluster.submit(tmp_path, *LONG, slurm=[*SMALL, "--sbatch", "begin=now+20"])
    number = job(tmp_path, TASK)
    (folder,) = tmp_path.glob("slurm/*")
    shutil.copytree(folder, tmp_path / "slurm" / "2020-01-01T00:00:00")
    journal.note(tmp_path / "slurm" / "2020-01-01T00:00:00" / f"{TASK}.jsonl", "finished")
    (tmp_path / "slurm" / "2020-01-01T00:00:00" / number / f"{number}_0_result.pkl").write_bytes(b"stale")
    waiting = cluster.status(tmp_path).splitlines()[1]
    assert number in waiting and " finished " not in waiting
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": number, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    port = int(launcher_variables(slurm | {"SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1"})["MASTER_PORT"])
    path = folder / f"{TASK}.jsonl"
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        wait_until(lambda: "requeued" in names(path))
    wait_until(lambda: names(path)[-1] == "finished", 240)
    assert f"port {port} of node n1 is in use" in path.read_text() and same_metrics(tmp_path / SHORT_RUN, short)
    print("\nport in use, and a stale folder with the same job id: 1 time, the next start takes another port, identical")


@on_cluster
@pytest.mark.faults
def test_a_node_that_does_not_see_the_folder_is_reported_by_status(cluster, tmp_path):
    out = tmp_path / "out"
    cluster.submit(out, *LONG, slurm=[*SMALL, "--sbatch", "begin=now+4"])
    number = job(out, TASK)
    out.rename(tmp_path / "elsewhere")
    wait_until(lambda: number not in cluster.run("squeue", "-h", "-o", "%i", "-t", "PENDING,RUNNING").split())
    (tmp_path / "elsewhere").rename(out)
    training, table = cluster.status(out).splitlines()[1:]
    assert "does the node see OUT?" in training and " cancelled " in table
    print("\nOUT is not there on the node: 1 time, the dependents are cancelled, status says why")
