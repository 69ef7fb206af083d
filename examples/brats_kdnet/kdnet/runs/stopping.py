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
    """A signal asked the command to stop where no training could keep its step.

    As with Ctrl-C nothing but the end of the command catches it; what is half written is removed
    on the way.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(
            f"Stopped by {signal.Signals(number).name}. What is finished is kept; give the same "
            "command to go on."
        )
        self.exit_status = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into `StoppedError` within the block.

    Trainings and pools of units put handlers of their own in place, and these back afterwards.
    After the first signal further ones change nothing, so that what is being removed is removed.
    """
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
    """Ask for SIGTERM when the pool that started this process dies, however it dies.

    Only where the pool asked for it, as a command in the background may outlive its shell. Linux
    alone has such a signal; elsewhere a unit goes on to its end.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, int(signal.SIGTERM))
    if str(os.getppid()) != parent:
        # It died before it was asked for.
        os.kill(os.getpid(), signal.SIGTERM)
