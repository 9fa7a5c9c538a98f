"""Start several processes of a program on this machine, with torchrun's launcher as a library.

The command torchrun exits with 1 whatever its processes return, and it dies of SIGUSR1 and SIGUSR2 without its processes.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

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
