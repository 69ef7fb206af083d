"""Where entries lie: in memory, or in files that several processes share."""

import os
import pickle
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from privdistill.cache.entries import Entry
from privdistill.exceptions import CacheError, CacheWarning

_OVERHEAD = 4096  # bytes of a file around its tensors, at most
_RECOUNT = 64  # entries stored between two looks at what other processes have stored
_RECENT = 6 * 3600.0  # seconds for which a teacher's entries belong to a run that may go on
_PATIENCE = 60.0  # seconds after which a full folder is looked at again
_OPEN = 16_384  # files kept mapped; Linux allows a process about 65,000
_ABANDONED = 3600.0  # seconds after which an unfinished file belongs to a killed process

# What a file that was cut short, overwritten or written by somebody else can raise.
_DAMAGE = (RuntimeError, ValueError, TypeError, LookupError, EOFError, pickle.UnpicklingError)


class MemoryStore:
    """Entries in this process's memory.

    Args:
        max_bytes: Limit, or None.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: dict[tuple[str, str], Entry] = {}

    def get(self, teacher: str, name: str) -> Entry | None:
        """Return an entry, or None."""
        return self._entries.get((teacher, name))

    def put(self, teacher: str, name: str, entry: Entry) -> bool:
        """Keep an entry if there is room; those of other teachers go first.

        Args:
            teacher: The teacher's fingerprint.
            name: The entry's.
            entry: What to keep.

        Returns:
            Whether it is kept.
        """
        replaced = self._entries.pop((teacher, name), None)
        self.bytes -= 0 if replaced is None else replaced.bytes
        others = iter([key for key in self._entries if key[0] != teacher])
        while self.max_bytes is not None and self.bytes + entry.bytes > self.max_bytes:
            oldest = next(others, None)
            if oldest is None:
                return False
            self.bytes -= self._entries.pop(oldest).bytes
        self._entries[teacher, name] = entry
        self.bytes += entry.bytes
        return True


class DiskStore:
    """Entries as files, one each, mapped into memory when they are read.

    A file is written beside its place and renamed, so that other processes and a later run see all
    of it or nothing, whenever this one is killed.

    Args:
        folder: Made if it does not exist.
        max_bytes: Limit for all files in it, or None.

    Raises:
        CacheError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"TeacherCache: the folder {folder} cannot be made ({error}). Choose one that can "
                "be written, or leave it out to keep the entries in memory."
            ) from error
        self._open: dict[tuple[str, str], Entry] = {}
        self._held = 0
        self._puts = 0
        self._failed = False
        self._full_until = 0.0
        _remove_abandoned(folder)

    @property
    def bytes(self) -> int:
        """Size of all files, of every teacher and process."""
        return sum(size for _, size, _ in self._files())

    def get(self, teacher: str, name: str) -> Entry | None:
        """Return an entry; None if there is none, or a damaged one, which is removed."""
        entry = self._open.get((teacher, name))
        if entry is None:
            entry = _read(self._path(teacher, name))
            if entry is not None and len(self._open) < _OPEN:
                self._open[teacher, name] = entry
        return entry

    def put(self, teacher: str, name: str, entry: Entry) -> bool:
        """Write an entry if there is room; files of other teachers go first, the oldest first.

        Args:
            teacher: The teacher's fingerprint.
            name: The entry's.
            entry: What to keep.

        Returns:
            Whether it is kept. What cannot be written is left out, with one warning.
        """
        if not self._make_room(teacher, entry.bytes + _OVERHEAD):
            return False
        content = {"digest": entry.digest, "parts": entry.parts, "checksum": entry.checksum()}
        try:
            self._held += _write(self._path(teacher, name), content)
        # A full disk is a RuntimeError of torch's writer.
        except (OSError, RuntimeError) as error:
            self._warn_once(error)
            return False
        return True

    def _make_room(self, teacher: str, wanted: int) -> bool:
        if self.max_bytes is None:
            return True
        if time.monotonic() < self._full_until:
            # Listing thousands of files at each refusal would cost more than the teacher.
            return False
        if self._puts % _RECOUNT == 0:
            self._held = self.bytes
        self._puts += 1
        if self._held + wanted <= self.max_bytes:
            return True
        for path, size, _ in self._removable(teacher):
            path.unlink(missing_ok=True)
            self._held -= size
            if self._held + wanted <= self.max_bytes:
                return True
        self._full_until = time.monotonic() + _PATIENCE
        return False

    def _removable(self, teacher: str) -> list[tuple[Path, int, float]]:
        """Files of teachers that no run seems to use, the oldest first."""
        files = list(self._files())
        newest: dict[str, float] = {}
        for path, _, written in files:
            newest[path.parent.name] = max(written, newest.get(path.parent.name, 0.0))
        # Two runs that need more than there is room for would otherwise evict each other for ever.
        old = {kind for kind, written in newest.items() if time.time() - written > _RECENT}
        kept = [file for file in files if file[0].parent.name in old - {teacher}]
        return sorted(kept, key=lambda file: file[2])

    def _path(self, teacher: str, name: str) -> Path:
        return self.folder / teacher / f"{name}.pt"

    def _files(self) -> Iterator[tuple[Path, int, float]]:
        for path in self.folder.glob("*/*.pt"):
            try:
                status = path.stat()
            except FileNotFoundError:
                # Another process has made room.
                continue
            yield path, status.st_size, status.st_mtime

    def _warn_once(self, error: Exception) -> None:
        if not self._failed:
            warnings.warn(
                f"TeacherCache: entries cannot be written to {self.folder} ({error}). Training "
                "goes on; the teacher runs again for what is missing.",
                CacheWarning,
                stacklevel=2,
            )
        self._failed = True


def _write(path: Path, content: dict[str, Any]) -> int:
    """Write a file beside its place, bring it to the disk and rename it.

    Args:
        path: Its place.
        content: What `torch.load` reads with `weights_only=True`.

    Returns:
        By how many bytes the folder has grown.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        torch.save(content, partial)
        _flush(partial)
        replaced = path.stat().st_size if path.is_file() else 0
        size = partial.stat().st_size
        partial.replace(path)
        _flush(path.parent)
    finally:
        # Where the folder is gone or closed there is nothing to clear away.
        if os.access(path.parent, os.W_OK):
            partial.unlink(missing_ok=True)
    return size - replaced


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a power failure then loses neither."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> Entry | None:
    try:
        # Memory mapping refuses compressed parts, but no tensor that repeats its numbers.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        entry = _entry(content)
        if any(t.nbytes > t.untyped_storage().nbytes() for t in entry.tensors()):
            raise ValueError("a tensor is larger than what is stored of it")
        if entry.checksum() == content["checksum"]:
            return entry
        damage = "its checksum differs"
    except FileNotFoundError:
        return None
    except OSError as error:
        # Too many open files, a lost server: no fault of the file.
        warnings.warn(
            f"TeacherCache: {path} cannot be read ({error}). The teacher runs again.",
            CacheWarning,
            stacklevel=2,
        )
        return None
    except _DAMAGE as error:
        damage = str(error).split("\n", 1)[0]
    warnings.warn(
        f"TeacherCache: the entry {path} is damaged ({damage}). It is removed, and the teacher "
        "runs again.",
        CacheWarning,
        stacklevel=2,
    )
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # In a folder that cannot be written it is met again, and refused again.
        return None
    return None


def _entry(content: Any) -> Entry:
    """The entry in what a file holds, which anybody may have written.

    Raises:
        TypeError: If there is none in it.
    """
    if not isinstance(content, dict):
        raise TypeError("it holds no names")
    digest, parts = content["digest"], content["parts"]
    # One part, or the levels, least values and steps of 8 bits.
    right = isinstance(parts, dict) and all(
        isinstance(name, str) and isinstance(part, tuple) and len(part) in {1, 3}
        for name, part in parts.items()
    )
    if not right or not all(map(_is_plain, (digest, *(t for p in parts.values() for t in p)))):
        raise TypeError("it holds something else than tensors by the names of outputs")
    return Entry(digest, parts)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor with memory for each of its numbers."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob("*/.*.partial"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
        except OSError:
            continue
