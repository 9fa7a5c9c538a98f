"""Jobs on a real Slurm: what is submitted, what status says, and the faults that take seconds. The others: test_faults.py."""

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.slurm import journal
from benchmarks.slurm.__main__ import main
from benchmarks.slurm.cluster import minutes
from benchmarks.slurm.job import launcher_variables, may_pass
from benchmarks.slurm.snapshot import copy_code
from common.data import DataError
from common.recipe import RecipeError
from tests.slurm.cluster import (
    CPU,
    LONG,
    checkout,
    fault,
    job,
    log,
    names,
    on_cluster,
    processes,
    same_metrics,
    undisturbed,
    wait_until,
    without,
)


def test_launcher_variables_are_those_of_slurm():
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "12345", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    slurm |= {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    found = launcher_variables(slurm)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("9", "16", "1", "8")
    assert found["MASTER_ADDR"] == "gpu07" and 20_000 <= int(found["MASTER_PORT"]) < 32_000
    assert launcher_variables(slurm | {"SLURM_RESTART_COUNT": "1"})["MASTER_PORT"] != found["MASTER_PORT"]


def test_time_limits_of_slurm_are_understood():
    assert [minutes(limit) for limit in ("1-00:00:00", "00:05:00", "10-12:30:00", "UNLIMITED")] == [1440, 5, 15150, None]


def test_a_fault_of_the_storage_is_tried_again_and_other_user_errors_are_not():
    try:
        try:
            raise OSError(errno.ESTALE, "Stale file handle")
        except OSError as error:
            raise DataError("a.jpg cannot be opened (Stale file handle)") from error
    except DataError as error:
        assert may_pass(error)
    assert may_pass(OSError(errno.EIO, "x")) and not may_pass(OSError(errno.ENOSPC, "x")) and not may_pass(RecipeError("x"))


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
