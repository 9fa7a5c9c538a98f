"""Start processes on this machine: those of one training, or several programs side by side.

`launch` uses torchrun's launcher as a library. The command torchrun exits with 1 whatever its processes return, and it dies of SIGUSR1
and SIGUSR2 without its processes.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from common.environment import available_cores
from common.stopping import EXIT_STOPPED, STOP_SIGNALS

SAVE_SECONDS = 600  # after a signal the processes may take this long to save a checkpoint; then they are killed


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` in this many processes, with the environment variables of torchrun. Return the exit code.

    The exit code is that of the first process that fails; the others are then stopped. STOP_SIGNALS are passed on to all processes, and
    the exit code is EXIT_STOPPED.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in STOP_SIGNALS),
        shutdown_timeout=SAVE_SECONDS,
    )
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}  # the launcher does not restore them
    logging.disable(logging.ERROR)  # the processes print their own errors
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException:
        return EXIT_STOPPED
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # killed by a signal, as in a shell
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def side_by_side(commands: Mapping[Path, Sequence[str]], parallel: int | None, done: Callable[[Path, int], None], directory: Path) -> None:
    """Run programs, by their log files, in a directory: several at a time, each with its share of the cores, and one GPU if there are any.

    parallel: programs at the same time; by default one for each GPU or core. Calls `done` with the log and exit code of each that has
    ended by itself, never twice at the same time. If this process is interrupted, SIGTERM is sent to the running programs, and their end
    is awaited.
    """
    gpus, cores = torch.cuda.device_count(), available_cores()
    count = max(1, min(parallel or gpus or cores, len(commands)))
    free, running, one_at_a_time = SimpleQueue[int](), set[subprocess.Popen](), threading.Lock()
    for place in range(count):
        free.put(place)

    def run(log: Path, command: Sequence[str]) -> None:
        place = free.get()
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // count))}
        environment |= {"CUDA_VISIBLE_DEVICES": str(place % gpus)} if gpus else {}
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=directory)
        running.add(process)
        code = process.wait()
        running.discard(process)
        free.put(place)
        if code not in (EXIT_STOPPED, -signal.SIGTERM):
            with one_at_a_time:
                done(log, code)

    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(run, log, command) for log, command in commands.items()]
        try:
            for one in waiting:
                one.result()
        except BaseException:
            for one in waiting:
                one.cancel()
            for process in list(running):
                process.send_signal(signal.SIGTERM)
            raise
