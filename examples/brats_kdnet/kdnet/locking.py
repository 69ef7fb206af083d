"""One run in one folder at a time."""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning_fabric import Fabric

from kdnet.errors import UserError
from kdnet.reading import UnreadableError, read_json
from kdnet.writing import write_text


class FolderLock:
    """Hold the folder of a run; the operating system gives it back when the process dies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._holder = root / ".lock.json"
        self._new = not root.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(root / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"--out: {root} is in use by {_described(self._holder)}. Two runs in one folder "
                "would mix their files. Wait for it, stop it, or choose another --out."
            ) from error
        except OSError as error:
            raise UserError(f"--out: {root} cannot be written: {error}") from error
        now = datetime.now(tz=UTC).isoformat(timespec="seconds")
        content = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
        write_text(self._holder, json.dumps(content))

    def release(self) -> None:
        """Give the folder back; one that was made for nothing is removed."""
        if not self._lock.is_locked:
            return
        # filelock sees a removed file and makes a new one.
        self._holder.unlink(missing_ok=True)
        if self._new and not any(self.root.glob("[!.]*")):
            Path(self._lock.lock_file).unlink(missing_ok=True)
            # Something hidden in it is somebody else's.
            if not any(self.root.iterdir()):
                self.root.rmdir()
        self._lock.release()


def lock_for_all(root: Path, fabric: Fabric) -> FolderLock | None:
    """Let the first process hold the folder of a run, and all of them leave if it cannot."""
    lock, refusal = None, None
    if fabric.is_global_zero:
        try:
            lock = FolderLock(root)
        except UserError as error:
            refusal = str(error)
    refusal = fabric.broadcast(refusal)
    if refusal is not None:
        raise UserError(refusal)
    return lock


def _described(holder: Path) -> str:
    """Who holds a folder; it may be just beginning, or just leaving."""
    try:
        found: dict[str, Any] = read_json(holder)
        return f"process {found['process']} on {found['host']} since {found['since']}"
    except (UnreadableError, KeyError, TypeError):
        return "another process"
