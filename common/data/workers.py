"""Processes that load or write images: stop signals do not end them, and they end with the process that started them."""

import functools
import mmap
import os
import signal
from collections.abc import Iterator
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from common.data.paths import DataError
from common.environment import available_cores
from common.stopping import STOP_SIGNALS, finish_first


def default_workers(processes: int | None = None) -> int:
    """Number of workers for each of `processes` on this machine: available cores / processes, at least 1 and at most 8.

    By default, `processes` is torchrun's LOCAL_WORLD_SIZE, or 1 without torchrun.
    """
    return max(1, min(8, available_cores() // (processes or int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))


def make_workers(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """A DataLoader with `workers` processes, not started yet; 0: this process. Read it with `worker_batches`."""
    ending = mmap.mmap(-1, 1)  # shared with the workers: nonzero if SIGTERM comes from this process, to end them
    loader: DataLoader = DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=functools.partial(_start_worker, ending, os.getpid()),
        # the split, which may have a million paths, is shared and not copied
        multiprocessing_context="fork" if workers else None,
        # torch seeds its workers from this; by default it would draw from the caller's global generator
        generator=torch.Generator(),
        **options,
    )
    # runs before multiprocessing ends its children and waits for them, or when the workers are no longer used
    Finalize(loader, ending.write, (b"1",), exitpriority=100)
    return loader


def worker_batches(loader: DataLoader) -> Iterator:
    """Yield the batches of `make_workers`. A DataError of a worker is raised with its own message."""
    try:
        # A signal would end a worker that does not ignore it yet. Workers inherit the blocked signals until `_start_worker`.
        with finish_first():
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                found = iter(loader)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        yield from found
    except DataError as error:
        # torch uses the whole traceback of the worker as the message: its last sentence is ours
        raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None


def _start_worker(ending: mmap.mmap, parent: int, worker: int) -> None:
    """Make a worker ignore stop signals. Terminals, torchrun, Slurm and `timeout` send them to all processes of a run. Only the training
    process can save, and it needs its workers for that; the workers end when it ends. torch watches for that only from now on."""
    if os.getppid() != parent:
        os._exit(1)
    os.setpgrp()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending[0] else None)
    signal.siginterrupt(signal.SIGTERM, False)  # otherwise reading a file may fail
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
