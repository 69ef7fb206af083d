"""How a training command ends: with a message and an exit status, never with a traceback."""

import sys
from collections.abc import Callable

from kdnet.errors import UserError, printable
from kdnet.errors import explained
from privdistill import PrivDistillError
from kdnet.runs.stopping import StoppedError, leave_with_parent, stoppable
from kdnet.training.runtime import TrainingStoppedError

_LINES = "\n"


def exit_status(action: Callable[[], int | None]) -> int:
    """Carry out a command."""
    try:
        with stoppable(), explained("The run"):
            leave_with_parent()
            return action() or 0
    except (UserError, PrivDistillError) as error:
        # Messages hold names from files, which may hold what a terminal obeys.
        sys.stderr.write(f"{printable(str(error), keep=_LINES)}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"The run stopped: {error}. Give the same command to go on.\n")
        return 2
    except TrainingStoppedError as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_status
    except StoppedError as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. Give the same command to go on.\n")
        return 130
