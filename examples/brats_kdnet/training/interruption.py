"""Stop between two steps when the process is asked to."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class TrainingStoppedError(Exception):
    """The training was asked to stop; its checkpoints are complete.

    Args:
        number: The signal that asked for it.
        message: What was kept and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class Interruption:
    """Turn SIGTERM and Ctrl-C into a request that is honoured after the current step.

    A second signal acts as it would without this class.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread alone and lets no other one set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
