"""Start a program in a process of its own that kills itself at a chosen moment.

A moment is a call of one of the functions that write files or take a step: half of the file is
written, or it is complete but not yet renamed, or it has just been renamed. Nothing in the
application knows of it.
"""

import contextlib
import csv
import io
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import nibabel
import safetensors.torch
import torch

import kdnet.training.loop
import train


def is_wanted(pattern, moment):
    """Say whether a moment counts."""
    return re.search(pattern, moment) is not None


class Moments:
    """Count calls, write each into a log, and die in the chosen one.

    Args:
        log: A file that outlives the process.
        at: Number of the call, from 1; None lets the process live.
        wanted: Only calls count whose description holds this regular expression.
    """

    def __init__(self, log, at=None, wanted=""):
        self.file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.at, self.wanted, self.count, self.lock = at, wanted, 0, threading.Lock()
        self.dying = False

    def due(self, name, detail=""):
        words = f"{name} {detail}".strip()
        with self.lock:
            self.count += is_wanted(self.wanted, words)
            due = is_wanted(self.wanted, words) and self.count == self.at
            # Other threads may run while the file is cut; the last moment is the one of death.
            if not self.dying:
                os.write(self.file, f"{words}\n".encode())
            self.dying |= due
        return due

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name, function):
        """Die before or after the call."""

        def called(*arguments, **options):
            places = [Path(a).name for a in arguments[-1:] if isinstance(a, (str, Path))]
            if self.due(f"before {name}", " ".join(places)):
                self.die()
            result = function(*arguments, **options)
            if self.due(f"after {name}", " ".join(places)):
                self.die()
            return result

        return called

    def half(self, name, function, target):
        """Die when half of the file is written; `target` says which argument is the file."""

        def called(*arguments, **options):
            where = arguments[target]
            path = where if isinstance(where, (str, Path)) else where.name
            if not self.due(f"half {name}", Path(str(path)).name):
                return function(*arguments, **options)
            function(*arguments, **options)
            with contextlib.suppress(AttributeError):
                where.flush()
            os.truncate(path, Path(path).stat().st_size // 2)
            return self.die()

        return called


def arm(moments):
    """Put the moments in place, in a process that is made for it."""
    torch.save = moments.half("torch.save", torch.save, 1)
    safetensors.torch.save_file = moments.half("save_file", safetensors.torch.save_file, 1)
    Path.write_text = moments.half("write_text", Path.write_text, 0)
    nibabel.save = moments.half("nib.save", nibabel.save, 1)
    writerows = csv.DictWriter.writerows

    def rows(writer, content):
        content = list(content)
        if moments.due("half writerows"):
            writerows(writer, content[: len(content) // 2])
            moments.die()
        writerows(writer, content)

    csv.DictWriter.writerows = rows
    os.fsync = moments.around("fsync", os.fsync)
    Path.replace = moments.around("replace", Path.replace)
    Path.rename = moments.around("rename", Path.rename)
    kdnet.training.loop.take_step = moments.around("take_step", kdnet.training.loop.take_step)


def start(arguments, log, *, program=train, at=None, wanted="", after=None):
    """Run a program.

    Args:
        arguments: Its command line.
        log: Where the moments are written.
        program: Its module.
        at: In which moment it dies; None for none.
        wanted: Which moments count.
        after: Seconds after which it is killed from outside.

    Returns:
        Exit status, negative for a signal; the last moment; and what it printed.
    """
    printed = log.with_suffix(".out")
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            stream = printed.open("w")
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
            arm(Moments(log, at, wanted))
            code = program.main(arguments)
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    lines, text = (p.read_text() if p.is_file() else "" for p in (log, printed))
    return os.waitstatus_to_exitcode(status), lines.splitlines(), text
