"""Files that are complete or not there, whenever a process is killed or a disk is full.

Everything that the application keeps is written here: beside its place, flushed to the disk, and
then renamed.
"""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kdnet.errors import UserError

_ABANDONED = 3600.0  # seconds after which an unfinished file belongs to a killed process


class WriteError(UserError):
    """A file cannot be written; what was there before is still there."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file so that it is either complete or not there."""
    partial = _partial(path)
    with _named(path):
        path.parent.mkdir(exist_ok=True)
        try:
            yield partial
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        finally:
            _remove(partial)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder of files so that it is either complete or not there."""
    partial = _partial(path)
    with _named(path):
        partial.mkdir()
        try:
            yield partial
            for file in partial.iterdir():
                _flush(file)
            _flush(partial)
            _rename_folder(partial, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(path: Path, content: Any) -> None:
    """Write what `torch.load` reads with `weights_only=True`, atomically."""
    with atomic(path) as partial, partial.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # What torch's writer makes of a full disk says nothing of one.
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """Return what an error says without its traceback, which torch adds in further lines."""
    return str(error).split("\n", 1)[0]


def remove_abandoned(*folders: Path) -> None:
    """Remove what killed processes left half written, an hour ago or earlier."""
    for folder in folders:
        for path in folder.glob(".*.partial*"):
            try:
                old = time.time() - path.stat().st_mtime > _ABANDONED
            except OSError:
                continue  # its process has just finished it
            if old:
                _remove(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex[:12]}.partial.{path.name}")


def _rename_folder(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError as error:
        # Another process has made the same one meanwhile.
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError:
        # Its folder is gone or closed; what led to this is being reported.
        return


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written ({error.strerror or error}). What was there before is "
            "untouched. Make room or restore the folder, then give the same command to go on."
        ) from error
