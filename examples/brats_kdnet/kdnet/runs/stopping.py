"""How a command leaves when it is asked to, or when the program that started it is gone."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Environment variable that names the process with which a command has to end.
PARENT = "PRIVDISTILL_PARENT"
# SLURM sends the last one some time before the end of a job: sbatch --signal=USR1@120.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class StoppedError(KeyboardInterrupt):
    """A signal asked the command to stop where no training could keep its step."""

    def __init__(self, number: int) -> None:
        super().__init__(
            f"Stopped by {signal.Signals(number).name}. What is finished is kept; give the same "
            "command to go on."
        )
        self.exit_status = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into `StoppedError` within the block."""
    if threading.current_thread() is not threading.main_thread():
        # Python lets no other thread set handlers.
        yield
        return
    stop = _stopper()
    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stopper() -> Callable[[int, FrameType | None], None]:
    process = os.getpid()
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if os.getpid() != process:
            # A copy of this process, which has nothing to keep.
            os._exit(128 + number)
        if not asked:
            asked.append(number)
            raise StoppedError(number)

    return stop


def leave_with_parent() -> None:
    """Ask for SIGTERM when the pool that started this process dies, however it dies."""
    parent = os.environ.pop(PARENT, "")
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, int(signal.SIGTERM))
    if str(os.getppid()) != parent:
        # It died before it was asked for.
        os.kill(os.getpid(), signal.SIGTERM)
