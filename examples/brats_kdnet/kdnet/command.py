"""How a command ends: with a message and an exit status, never with a traceback."""

import argparse
import sys
from collections.abc import Callable

from rich.console import Console

from kdnet.errors import UserError, explain, printable
from kdnet.stopping import StoppedError, leave_with_parent, stoppable


def exit_status(action: Callable[[], int | None]) -> int:
    """Carry out a command."""
    try:
        with stoppable():
            leave_with_parent()
            return action() or 0
    except StoppedError as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_status
    except Exception as error:
        text = _explained(error)
        if text is None:
            raise
        # Messages hold names from files, which may hold what a terminal obeys.
        sys.stderr.write(f"{printable(text, keep=chr(10))}\n")
        return 2


def console(*, stderr: bool = False) -> Console:
    """Return what shows names of cases and files as they are, whatever they hold."""
    return Console(markup=False, highlight=False, emoji=False, stderr=stderr)


def documented(text: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help begins with a text as it stands."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=kind)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Let the user name classes that model files may ask for."""
    parser.add_argument(
        *("--trust-backbone", "--trust_backbone"),
        action="extend",
        nargs="+",
        default=[],
        metavar="IMPORT.PATH",
        help="a class that a model file may have imported, which runs its module; not needed for "
        "networks of this application and the usual ones of MONAI",
    )


def _explained(error: Exception) -> str | None:
    """What an error means to a user, or on a machine that is too small; None for a fault."""
    if isinstance(error, UserError):
        return str(error)
    # Only now, as --help does not wait for PyTorch.
    from privdistill import PrivDistillError  # noqa: PLC0415

    if isinstance(error, PrivDistillError):
        return str(error)
    cause = explain(error)
    if cause is None and isinstance(error, OSError):
        cause = f"{error}. Give the same command to go on."
    return None if cause is None else f"The run stopped. {cause}"
