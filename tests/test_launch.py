"""Several processes on one machine: exit codes arrive, signals reach all processes, and none is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.launch import launch, side_by_side
from benchmarks.reproduce import main
from common.environment import ROOT

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# Each process writes a file named after its process id, and ends as its rank and the argument say.
PROGRAM = """
import os, pathlib, signal, sys, time
from common.stopping import stop_on_signals, stop_with_parent

stop_with_parent()
rank, here = int(os.environ["RANK"]), pathlib.Path(__file__).parent
with stop_on_signals(exiting=True):
    try:
        (here / f"{os.getpid()}.pid").touch()
        while len([*here.glob("*.pid")]) < 2:  # a process that fails ends the others, which may not have started yet
            time.sleep(0.01)
        if sys.argv[1] == "fail":
            sys.exit(3 * rank)
        if sys.argv[1] == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] != "done":
            time.sleep(600)
    finally:
        if sys.argv[1] == "sleep":
            (here / f"{rank}.saved").touch()
"""


def start(folder: Path, argument: str) -> subprocess.Popen:
    """Two processes of PROGRAM under our launcher, in a session of their own."""
    (folder / "program.py").write_text(PROGRAM)
    code = f"import sys; from benchmarks.launch import launch; sys.exit(launch(2, 'program', ['{argument}']))"
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{folder}"}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


def processes(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def none_left(folder: Path) -> None:
    assert len(processes(folder)) == 2
    wait_until(lambda: not any(map(running, processes(folder))))


@pytest.mark.parametrize(("argument", "code"), [("done", 0), ("fail", 3), ("killed", 128 + signal.SIGKILL)])
def test_the_exit_code_is_that_of_the_first_process_that_fails(tmp_path, argument, code):
    process = start(tmp_path, argument)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and not errors
    none_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_the_launcher_stops_all_processes_with_75(tmp_path, number):
    process = start(tmp_path, "sleep")
    wait_until(lambda: len(processes(tmp_path)) == 2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75 and len([*tmp_path.glob("*.saved")]) == 2
    none_left(tmp_path)


def test_a_signal_to_one_process_stops_the_others_with_75(tmp_path):
    process = start(tmp_path, "sleep")
    wait_until(lambda: len(processes(tmp_path)) == 2)
    os.kill(processes(tmp_path)[0], signal.SIGUSR2)
    process.communicate(timeout=60)
    assert process.returncode == 75 and len([*tmp_path.glob("*.saved")]) == 2
    none_left(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell a process that its parent has ended")
def test_a_launcher_that_is_killed_leaves_no_process(tmp_path):
    process = start(tmp_path, "sleep")
    wait_until(lambda: len(processes(tmp_path)) == 2)
    process.kill()
    process.communicate(timeout=60)
    none_left(tmp_path)
    assert len([*tmp_path.glob("*.saved")]) == 2


def test_more_gpus_than_there_are_is_refused_before_any_process_starts(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("benchmarks.reproduce.launch", None)
    with pytest.raises(SystemExit) as stopped:
        main(["droppos", "--gpus", "8"])
    assert stopped.value.code == 2 and "GPUS=8, but torch finds 1; use GPUS=1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_make_starts_one_process_per_gpu_and_a_user_error_is_printed_once(tmp_path):
    arguments = ["--device", "cpu", "--gpus", "2", "--out", str(tmp_path), "--set", "linear.stage.batch_size=101"]
    command = [sys.executable, "-m", "benchmarks.reproduce", "droppos", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.count("a batch of 101 cannot be divided among 2 devices") == 1 and not done.stderr
    make = subprocess.run(["make", "-n", "reproduce", "PAPER=mae", "GPUS=8"], cwd=ROOT, capture_output=True, text=True)
    assert "-m benchmarks.reproduce 'mae'" in make.stdout and "--gpus '8'" in make.stdout


DIFFERING = """
import os, sys
from benchmarks import reproduce
from common.stopping import stop_on_signals

rank = int(os.environ["RANK"])
reproduce.code = lambda: f"commit {rank}"
with stop_on_signals(exiting=True):
    sys.exit(reproduce.main(["droppos", "--device", "cpu", "--gpus", "2", "--set", f"pretrain.base_lr={rank + 1}", *sys.argv[1:]]))
"""


def test_processes_with_different_code_or_recipe_are_refused_with_the_difference(tmp_path):
    (tmp_path / "differing.py").write_text(DIFFERING)
    code = f"import sys; from benchmarks.launch import launch; sys.exit(launch(2, 'differing', ['--out', '{tmp_path}/out']))"
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout.count("error") == 1, done.stdout
    assert "code: commit 0 in process 0, commit 1 in process 1" in done.stdout
    assert "recipe.pretrain.base_lr: 1.0 in process 0, 2.0 in process 1" in done.stdout and not (tmp_path / "out").exists()


def test_the_handlers_of_signals_are_as_before_after_a_launch(tmp_path, monkeypatch):
    (tmp_path / "nothing.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = signal.getsignal(signal.SIGUSR1)
    assert launch(1, "nothing", []) == 0 and signal.getsignal(signal.SIGUSR1) is before


def test_the_ends_of_programs_are_reported_one_at_a_time(tmp_path):
    busy, ended = threading.Lock(), []

    def done(log, code):
        assert busy.acquire(blocking=False), "called twice at the same time"
        time.sleep(0.2)
        ended.append(code)
        busy.release()

    side_by_side({tmp_path / f"{number}.txt": ["true"] for number in range(4)}, 4, done, tmp_path)
    assert ended == [0] * 4
