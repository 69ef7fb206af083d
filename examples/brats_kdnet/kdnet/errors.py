"""What the application tells a person whose input, or whose machine, does not do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Input that cannot be used; the message says what was expected, what was found, what to do."""


_RESUME = "Finished epochs are kept: the same command goes on after the last of them."
_SMALLER = (
    "lower --batch-size, choose a smaller --patch or --grid, or --precision bf16-mixed where the "
    "device has it. These make another experiment: choose a new --out"
)
_GPU = (
    "The GPU's memory was not enough. If another process uses it (nvidia-smi), wait or choose "
    "another GPU with CUDA_VISIBLE_DEVICES, and start with fewer --jobs if there are several. "
    f"Otherwise {_SMALLER}. {_RESUME}"
)
_CPU = (
    "Main memory was not enough. Lower --workers, keep the teacher's outputs in files with "
    "--teacher-cache disk, or in less room with --teacher-cache-gib, and start with fewer --jobs "
    f"if there are several. Otherwise {_SMALLER}. {_RESUME}"
)
_LOADING = (
    "A process that loads data was lost, or gave nothing for so long that it must hang. The kernel "
    "kills the largest process when memory runs out (dmesg tells), and a container without room in "
    "shared memory does too (docker run --shm-size 8g): lower --workers. A network drive may have "
    "gone: look whether --data-root and --cache-dir can be read. If it happens again, "
    f"check_data.py reads every file once and names those that cannot be read. {_RESUME}"
)
_SHOWN = 300


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Raise what the machine causes as an error that says so."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        reason = explain(error)
        if reason is None:
            raise
        raise UserError(f"{doing} stopped. {reason}") from error


def explain(error: BaseException) -> str | None:
    """Say what an error means for the run, if the machine is its cause."""
    kind = _kind(error)
    if kind is None:
        return None
    # What a loading process raised arrives with its traceback, of which the last line is the error.
    words = (_text(error).strip().splitlines() or [type(error).__name__])[-1]
    return f"{kind}\nReported: {words[:_SHOWN]}"


def _kind(error: BaseException) -> str | None:
    # torch's class, by name: this module is read before torch is.
    if type(error).__name__ == "OutOfMemoryError":
        return _GPU
    text = _text(error) if isinstance(error, RuntimeError) else ""
    # NumPy's class of it cannot be made again in the main process, where torch tells its name.
    out_of_memory = isinstance(error, MemoryError) or "MemoryError in DataLoader worker" in text
    if out_of_memory or getattr(error, "errno", None) == errno.ENOMEM:
        return _CPU
    lost = "DataLoader worker (pid" in text or "DataLoader timed out" in text
    return _LOADING if lost else None


def _text(error: BaseException) -> str:
    """The error's words, with those of its cause: a lost process is told of in both."""
    cause = error.__cause__
    return f"{error} ({cause})" if isinstance(cause, RuntimeError) else str(error)


def printable(text: str, *, keep: str = "") -> str:
    r"""Write out what a terminal would obey instead of showing.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\\nb'
    """
    return "".join(
        letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text
    )
