"""Where entries lie: in memory, in files that several processes share, or with the user."""

import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import PickleError
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from privdistill.cache.fingerprint import hashed
from privdistill.exceptions import CacheError, CacheWarning

Entry = Mapping[str, Tensor]

# Suffixes of our own, so that no other file of a folder is ever counted or removed.
_SUFFIX, _UNFINISHED, _EITHER = ".entry.pt", ".entry.part", "*/*.entry.p*t"
_OVERHEAD = 4096  # bytes of a file around its tensors, at most
_LOOK = 60.0  # seconds between two looks at what all processes have stored
_RECENT = 6 * 3600.0  # seconds for which what was written belongs to a run that may go on
_STALE = 14 * 86_400.0  # seconds after which another teacher's entries are not waited for
_OPEN = 16_384  # files kept mapped; Linux allows a process about 65,000

# What a file that was cut short, overwritten or written by somebody else can raise.
_DAMAGE = (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, PickleError)


@runtime_checkable
class CacheStore(Protocol):
    """What a `TeacherCache` asks of the place where its entries lie.

    An entry is what the teacher said of one sample: a mapping of names to tensors on the CPU, each
    `(1, ...)`. Entries lie under two texts of letters and digits, one for the teacher and one for
    the sample, and come back as they were, names in their order.

    Example:
        >>> class Unlimited:
        ...     def __init__(self):
        ...         self.entries, self.bytes = {}, 0
        ...     def get(self, teacher, name):
        ...         return self.entries.get((teacher, name))
        ...     def put(self, teacher, name, entry):
        ...         self.entries[teacher, name] = entry
        ...         self.bytes += sum(tensor.nbytes for tensor in entry.values())
        ...         return True
        >>> from privdistill import TeacherCache
        >>> cache = TeacherCache(store=Unlimited())
    """

    @property
    def bytes(self) -> int:
        """Size of all entries, for the statistics."""

    def get(self, teacher: str, name: str) -> Entry | None:
        """Return an entry, or None where there is none.

        Args:
            teacher: 64 hexadecimal digits.
            name: 64 hexadecimal digits.

        Returns:
            What was put there; its tensors are not changed.
        """

    def put(self, teacher: str, name: str, entry: Entry) -> bool | None:
        """Keep an entry.

        Args:
            teacher: As in `get`.
            name: As in `get`.
            entry: Tensors that nobody else holds.

        Returns:
            False if it is not kept, which costs the teacher's next run on this sample alone.
        """


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
        """Keep an entry if there is room."""
        more = _size(entry) - _size(self._entries.get((teacher, name), {}))
        if self.max_bytes is not None and self.bytes + more > self.max_bytes:
            return False
        self._entries[teacher, name] = entry
        self.bytes += more
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle leaves the entries behind."""
        return MemoryStore, (self.max_bytes,)


class DiskStore:
    """Entries as files, one each, mapped into memory when they are read.

    A file is written beside its place and renamed, so that other processes and a later run see all
    of it or nothing, whenever this one is killed.

    Args:
        folder: Made if it does not exist.
        max_bytes: Limit for all entries in it, or None.

    Raises:
        CacheError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"TeacherCache: {folder} cannot be made ({error}).") from error
        self._open: dict[Path, Entry] = {}
        self._held = 0
        self._next_look = 0.0

    @property
    def bytes(self) -> int:
        """Size of all entries, of every teacher and process."""
        return sum(size for _, size, _ in self._files())

    def get(self, teacher: str, name: str) -> Entry | None:
        """Return an entry; None if there is none, or a damaged one, which is removed."""
        path = self.folder / teacher / f"{name}{_SUFFIX}"
        entry = self._open.get(path) or _read(path)
        if entry is not None and len(self._open) < _OPEN:
            self._open[path] = entry
        return entry

    def put(self, teacher: str, name: str, entry: Entry) -> bool:
        """Write an entry if there is room; what cannot be written is left out, with a warning."""
        size = _size(entry) + _OVERHEAD
        # Listing thousands of files for each entry would cost more than the teacher.
        if time.monotonic() >= self._next_look:
            self._make_room(teacher, size)
            self._next_look = time.monotonic() + _LOOK
        if self._is_full(size):
            return False
        path = self.folder / teacher / f"{name}{_SUFFIX}"
        unfinished = path.with_name(f"{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            path.parent.mkdir(exist_ok=True)
            torch.save({"entry": dict(entry), "hash": hashed(entry)}, unfinished)
            unfinished.replace(path)
        # A full disk is a RuntimeError of torch's writer.
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            _warn(f"entries cannot be written to {self.folder} ({reason})")
            return False
        finally:
            _remove(unfinished)
        self._held += size
        return True

    def _is_full(self, wanted: int) -> bool:
        return self.max_bytes is not None and self._held + wanted > self.max_bytes

    def _make_room(self, teacher: str, wanted: int) -> None:
        """Count what all processes hold, and remove what no run seems to use, the oldest first."""
        files = sorted(self._files())
        self._held = sum(size for _, size, _ in files)
        for written, size, path in files:
            age = time.time() - written
            foreign = path.parent.name != teacher or path.name.endswith(_UNFINISHED)
            # Two runs that need more than there is room for would otherwise evict each other.
            if foreign and age > (_RECENT if self._is_full(wanted) else _STALE):
                _remove(path)
                self._held -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was written, how large it is, and its place."""
        for path in self.folder.glob(_EITHER):
            # Another process may have made room.
            with suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime, status.st_size, path

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle opens the folder again."""
        return DiskStore, (self.folder, self.max_bytes)


def _size(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _warn(problem: str) -> None:
    text = f"TeacherCache: {problem}. The teacher runs again where an entry is missing."
    warnings.warn(text, CacheWarning, stacklevel=3)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _read(path: Path) -> Entry | None:
    try:
        # Memory mapping refuses compressed parts, but no tensor that repeats its numbers.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        entry: Entry = content["entry"]
        whole = all(t.nbytes <= t.untyped_storage().nbytes() for t in entry.values())
        if whole and hashed(entry) == content["hash"]:
            return entry
        reason = "its numbers have changed"
    except FileNotFoundError:
        return None
    except OSError as error:
        # Too many open files, a lost server: no fault of the file.
        _warn(f"{path} cannot be read ({error})")
        return None
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0]
    _warn(f"{path} is damaged ({reason}) and is removed")
    _remove(path)
    return None
