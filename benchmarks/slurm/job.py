"""What each process of a job does. srun starts one process for each GPU; submitit calls `run` in it."""

import errno
import gc
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from submitit.slurm.slurm import _parse_node_list

from benchmarks.reproduce import USER_ERRORS, parse, reproduce
from benchmarks.slurm import journal
from common import keep_freed_memory
from common.run import RunError, console
from common.stopping import stop_on_signals, stop_with_parent

FAULTS_OF_STORAGE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO)
PORTS = range(20_000, 32_000)  # below those that Linux gives to outgoing connections


def run(arguments: list[str], log: Path) -> None:
    """Run `benchmarks.reproduce` with these arguments as one process of a job, and end the process. Errors are noted in the journal `log`.

    Exit codes: 0, 2 for an error that a restart does not fix, 75 after a signal, 1 for other errors.
    """
    rank = int(os.environ["SLURM_PROCID"])
    try:
        with stop_on_signals(exiting=True):  # in place of submitit's handlers
            stop_with_parent()
            keep_freed_memory()
            os.environ.update(launcher_variables(os.environ))
            if rank == 0:
                _start(log)
            reproduce(parse(arguments))
    except USER_ERRORS as error:
        journal.note(log, "error", rank=rank, text=str(error))
        console.print(f"error in process {rank}: {error}", style="bold red", markup=False)
        sys.exit(1 if may_pass(error) else journal.FOR_GOOD)
    except Exception as error:
        journal.note(log, "error", rank=rank, text=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        traceback.print_exc()
        sys.exit(1)
    finally:
        gc.freeze()  # at exit Python would look for garbage for seconds, while Slurm waits to kill the job
    sys.exit(0)  # without a return value, which submitit would pickle


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is a fault of a network file system that a later start may not meet."""
    if error is None:
        return False
    return (isinstance(error, OSError) and error.errno in FAULTS_OF_STORAGE) or may_pass(error.__cause__)


def launcher_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun, for this process, from those of Slurm."""
    nodes, tasks = int(slurm["SLURM_JOB_NUM_NODES"]), int(slurm["SLURM_NTASKS"])
    number = int(slurm["SLURM_JOB_ID"]) + 997 * int(slurm.get("SLURM_RESTART_COUNT", 0))  # another port after each start
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "GROUP_RANK": slurm["SLURM_NODEID"],
        "MASTER_ADDR": _parse_node_list(slurm["SLURM_JOB_NODELIST"])[0] if nodes > 1 else "localhost",
        "MASTER_PORT": str(PORTS[number % len(PORTS)]),
        "TORCHELASTIC_RUN_ID": slurm["SLURM_JOB_ID"],  # Lightning then reads these variables and not Slurm's
    }


def _start(log: Path) -> None:
    """Note the start. Raises RunError if the last starts gained nothing, and OSError if the port is in use."""
    fault = journal.stuck(log)
    if fault:
        raise RunError(f"{fault}: see the logs beside {log}")
    node, count = os.environ["SLURMD_NODENAME"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
    journal.note(log, "start", node=node, job=journal.job_id(), restart=count, progress=journal.progress(log))
    port = int(os.environ["MASTER_PORT"])
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            connection.bind(("", port))
        except OSError as error:
            raise RuntimeError(f"port {port} of node {node} is in use ({error.strerror}); the next start takes another one") from None
