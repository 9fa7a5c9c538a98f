"""Tests of loader processes: shared memory, ignored signals, and their end."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import worker

from common.data import Augmentation, Loader, Split, open_data
from common.data.workers import default_workers
from common.stopping import STOP_SIGNALS

ROOT = Path(__file__).parents[1]
CALL = {"env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}


def loader(workers: int = 2) -> Loader:
    """Digits with RandAugment, which needs workers."""
    data, augmentation = open_data("digits"), Augmentation(randaugment="rand-m9")
    settings = {"image_size": (8, 8), "batch_size": 16, "seed": 0, "device": torch.device("cpu"), "workers": workers}
    return Loader(data.train.subset(range(480)), data=data, augmentation=augmentation, **settings)


def pids() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_the_workers_does_not_end_the_epoch(number):
    expected, before = [labels for _, labels in loader(0).epoch(0)], pids()
    ours = loader()
    seen = []
    for _, labels in ours.epoch(0):
        seen.append(labels)
        for pid in pids() - before if len(seen) < 20 else ():
            os.kill(pid, number)
    assert len(seen) == 30 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    for pid in pids() - before:  # also between epochs
        os.kill(pid, number)
    assert len(list(ours.epoch(1))) == 30


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_during_the_start_of_workers_does_not_end_one(monkeypatch, number):
    """One signal comes before the worker runs any code, one after torch has installed its handlers, of which SIGTERM's ends the worker."""
    start, install, begun = multiprocessing.process.BaseProcess.start, worker.signal_handling._set_worker_signal_handlers, []

    def started(process):
        start(process)
        os.kill(process.pid, number)
        begun.append(process.pid)

    def installed():
        install()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", started)
    monkeypatch.setattr(worker.signal_handling, "_set_worker_signal_handlers", installed)
    assert len(list(loader().epoch(0))) == 30 and len(begun) == 2


def begin(end: str) -> str:
    """Return a program that prints its workers' ids in the middle of an epoch, then runs `end`."""
    return f"""
import common, os, sys, time, multiprocessing
from tests.test_workers import loader, pids
kept = loader()
epoch = kept.epoch(0)
next(epoch)
print(*pids(), flush=True)
{end}
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise ValueError", 1)])
def test_workers_end_if_their_process_exits_in_the_middle_of_an_epoch(end, code):
    ended = subprocess.run([sys.executable, "-c", begin(end)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, **CALL)
    assert ended.returncode == code and len(ended.stdout.split()) == 2
    assert not [pid for pid in map(int, ended.stdout.split()) if alive(pid)]


def _use() -> None:
    kept = loader()
    next(kept.epoch(0))


def test_a_child_process_also_ends_its_workers():
    child = multiprocessing.get_context("fork").Process(target=_use)
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_workers_end_if_their_process_is_killed():
    process = subprocess.Popen([sys.executable, "-c", begin("time.sleep(100)")], stdout=subprocess.PIPE, **CALL)
    workers = [*map(int, process.stdout.readline().split())]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(workers) == 2
    deadline = time.monotonic() + 20  # they check for their parent every five seconds
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_the_default_number_of_workers_divides_the_cores_among_processes(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, processes, expected in [(64, 1, 8), (64, 8, 8), (32, 8, 4), (6, 4, 1), (2, 8, 1), (2, 1, 2)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert default_workers(processes) == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 4


# ---- memory

PATHS = 200_000


class Touch(Dataset):
    """Item k reads every fourth path from k // 2 on, and returns the private memory of its process in MiB, written after the fork."""

    def __init__(self, paths) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return 8

    def __getitem__(self, item: int) -> float:
        for index in range(item // 2, len(self.paths), 4):
            assert self.paths[index]
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def private_memory(paths) -> float:
    """Return the private memory of two workers after each has read all paths, in MiB."""
    batches = DataLoader(Touch(paths), batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = [float(size) for size in batches]
    return sum(found[-2:])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's account of memory")
def test_workers_share_the_memory_of_image_paths_with_their_parent():
    """A str per path takes 130 bytes, 25 MiB in total; copies in two workers would take 50 MiB."""
    paths = [f"/datasets/imagenet/a/folder/of/some/depth/train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(PATHS)]
    held = Split(torch.zeros(PATHS, dtype=torch.int64), paths=paths).paths
    few = private_memory(held[:8])
    assert private_memory(held) - few < 8
    assert private_memory(paths) - few > 30  # a list takes this much, so the bound above is meaningful


def test_images_larger_than_pillows_limit_are_cropped_without_a_warning(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name in ("train/a/0", "train/a/1", "val/a/0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numpy.full((80, 80, 3), 90, dtype=numpy.uint8)).save(tmp_path / f"{name}.png")
    data = open_data(str(tmp_path))
    settings = {"image_size": (16, 16), "batch_size": 2, "seed": 0, "device": torch.device("cpu"), "workers": 0}
    for augmentation in (None, Augmentation(scale=(0.9, 1.0))):
        images, _ = next(Loader(data.train, data=data, augmentation=augmentation, **settings).epoch(0))
        torch.testing.assert_close(images[0, 0], torch.full((16, 16), (90 / 255 - data.mean[0]) / data.std[0]), atol=1e-4, rtol=0)
    assert not recwarn.list and Image.MAX_IMAGE_PIXELS == 100


def test_a_worker_whose_process_was_killed_before_it_began_ends():
    """torch takes the process that a worker has at its start for its parent, so such a worker would wait forever."""
    code = "import mmap, os; from common.data.workers import _start_worker; _start_worker(mmap.mmap(-1, 1), os.getppid() + {}, 0); print(1)"
    ended = [subprocess.run([sys.executable, "-c", code.format(more)], stdout=subprocess.PIPE, timeout=60, **CALL) for more in (0, 1)]
    assert [(one.returncode, one.stdout) for one in ended] == [(0, "1\n"), (1, "")]
