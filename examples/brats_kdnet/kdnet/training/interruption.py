"""Stop between two steps when one of the processes is asked to."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import torch
from lightning_fabric import Fabric

# SLURM sends the last one some time before the end of a job: sbatch --signal=USR1@120.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_KEYS = 3  # Ctrl-C as often as this leaves at once


class TrainingStoppedError(Exception):
    """The training was asked to stop; its checkpoints are complete."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class Interruption:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a request that is honoured after the current step."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._keys = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread alone and lets no other one set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def agreed(self, fabric: Fabric) -> int | None:
        """Return the signal that any process has received; all must ask, and get one answer."""
        if fabric.world_size == 1:
            return self.received
        mine = torch.tensor(self.received or 0, device=fabric.device)
        return int(torch.as_tensor(fabric.all_reduce(mine, reduce_op="max"))) or None

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received = self.received or number
        self._keys += number == signal.SIGINT
        if self._keys == _KEYS - 1 and signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))  # type: ignore[arg-type]

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
