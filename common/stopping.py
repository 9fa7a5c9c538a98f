"""Signals that stop a run: it saves a checkpoint and exits with EXIT_STOPPED, and the same command resumes it."""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: try again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_received: list[int] = []
_deferred = 0


class Stopped(SystemExit):
    """Raised after one of STOP_SIGNALS. A process that does not catch it exits with EXIT_STOPPED."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


def stop_requested() -> bool:
    """Whether a signal has arrived since the handlers were installed."""
    return bool(_received)


def stop_if_requested() -> None:
    """Raise Stopped if a signal has arrived. Needed if the exception of the handler was suppressed, for example in a destructor."""
    if _received and not _deferred:
        raise Stopped


def stop_with_parent() -> None:
    """On Linux, get SIGTERM when the process that started this one ends. A launcher that is killed then leaves no process behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def stop_on_signals(exiting: bool = False) -> Iterator[None]:
    """Within the block STOP_SIGNALS raise Stopped, immediately or at the end of `finish_first`. Nested calls and other threads do nothing.

    exiting: the process ends after the block, so later signals are ignored: torchrun sends SIGTERM to all processes as soon as the
    first one has ended, and this would kill a process that is about to exit with EXIT_STOPPED.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(STOP_SIGNALS[0]) is _handle:
        yield
        return
    _received.clear()
    previous = {number: signal.signal(number, _handle) for number in STOP_SIGNALS}
    try:
        yield
        stop_if_requested()
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if exiting else handler)
        _received.clear()  # it stopped this block: later work in the same process, as in a notebook, is not stopped


@contextmanager
def finish_first() -> Iterator[None]:
    """Within the block signals only set `stop_requested`; Stopped is raised at the end of the block."""
    global _deferred
    with stop_on_signals():
        _deferred += 1
        try:
            yield
        finally:
            _deferred -= 1
        stop_if_requested()


def _handle(number: int, frame: object) -> None:
    _received.append(number)
    stop_if_requested()
