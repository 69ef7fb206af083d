"""How a command leaves when it is asked to: at once, or after what it is doing.

SLURM sends SIGUSR1 some time before the end of a job: sbatch --signal=USR1@120.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Environment variable that names the process with which a command has to end.
PARENT = "PRIVDISTILL_PARENT"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_KEYS = 3  # Ctrl-C as often as this leaves at once
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class StoppedError(KeyboardInterrupt):
    """A signal asked the command to stop; the message says what is kept."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(
            message
            or f"Stopped by {signal.Signals(number).name}. What is finished is kept; give the same "
            "command to go on."
        )
        self.exit_status = 128 + number


class Interruption:
    """A signal that was received in a block, which looks at it when it can leave."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.keys = 0

    def agreed(self, fabric: "Fabric") -> int | None:
        """Return the signal that any process has received; all must ask, and get one answer."""
        if fabric.world_size == 1:
            return self.received
        import torch  # noqa: PLC0415

        mine = torch.tensor(self.received or 0, device=fabric.device)
        return int(torch.as_tensor(fabric.all_reduce(mine, reduce_op="max"))) or None


@contextmanager
def stoppable() -> Iterator[None]:
    """Leave the block at once, by `StoppedError`, when a signal asks for it."""
    process, asked = os.getpid(), list[int]()

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if os.getpid() != process:
            # A copy of this process, which has nothing to keep.
            os._exit(128 + number)
        if not asked:
            asked.append(number)
            raise StoppedError(number)

    with _handling(stop):
        yield


@contextmanager
def deferring() -> Iterator[Interruption]:
    """Let the block finish its step first; the third Ctrl-C leaves at once."""
    interruption, leave = Interruption(), signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        interruption.received = interruption.received or number
        interruption.keys += number == signal.SIGINT
        if interruption.keys == _KEYS and number == signal.SIGINT and callable(leave):
            leave(number, frame)

    with _handling(note):
        yield interruption


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals in the block; Python lets no thread but the main one do so."""
    previous: dict[int, object] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous[number] = signal.signal(number, handler)
        yield
    finally:
        for handled, before in previous.items():
            signal.signal(handled, before)  # type: ignore[arg-type]


def leave_with_parent() -> None:
    """Ask for SIGTERM when the pool that started this process dies, however it dies."""
    parent = os.environ.pop(PARENT, "")
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, int(signal.SIGTERM))
    if str(os.getppid()) != parent:
        # It died before it was asked for.
        os.kill(os.getpid(), signal.SIGTERM)
