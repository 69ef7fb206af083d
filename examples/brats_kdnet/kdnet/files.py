"""Files that anybody may have written or damaged, and files that are complete or not there.

Everything that the application keeps is written here: beside its place, flushed to the disk, and
then renamed, so that neither a kill nor a full disk harms what was there before.
"""

import csv
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kdnet.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

#: File systems allow 255 bytes for a name, to which endings are added.
LONGEST = 100
#: Spreadsheets take what begins with one of them for a formula, and carry it out.
_FORMULAS = ("=", "+", "-", "@")
# Parsers of damaged text raise all of these: PyYAML lets a conversion's own error through, and
# brackets in brackets exhaust the stack.
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError),
    *(RecursionError, csv.Error, yaml.YAMLError),
)
_SHOWN = 200
_ABANDONED = 3600.0  # seconds after which an unfinished file belongs to a killed process


class _Loader(yaml.SafeLoader):
    """Plain values, and no key twice, of which PyYAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{twice[0]} stands twice in what begins in line {line}")
        return super().construct_mapping(node, deep)


class UnreadableError(Exception):
    """A file is missing, or not of the form that it should have; the message says why."""


class WriteError(UserError):
    """A file cannot be written; what was there before is still there."""


def is_name(text: object) -> bool:
    r"""Say whether something may name a file or a folder inside another one.

    >>> [is_name(text) for text in ("kdnet", "case 1", "../x", "/etc", "a\\nb", "", 3)]
    [True, True, False, False, False, False, False]
    """
    return (
        isinstance(text, str)
        and text.isprintable()
        and bool(text)
        and not text.startswith((".", *_FORMULAS))
        and len(text.encode()) <= LONGEST
        and not {*text} & {"/", "\\"}
    )


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return _read(path, json.loads)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values."""
    return _read(path, lambda text: _Loader(text).get_single_data())


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file of keys and values."""
    try:
        content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    except UnreadableError as error:
        raise UserError(f"{path} is damaged, or cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is damaged, or of another form: expected keys and values, as in 'epochs: 9'."
        )
    return content


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Read a CSV file whose rows are all as long as its header."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows: list[dict[str, str]] = list(reader)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
    except _DAMAGE as error:
        raise UnreadableError(said(error)) from error
    if missing:
        raise UnreadableError(f"it has no column {', '.join(missing)}")
    for number, row in enumerate(rows, start=1):
        # The module puts None where a row is too short or too long.
        if None in row or None in row.values():
            raise UnreadableError(f"row {number} is not as long as the header")
    return rows


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except _DAMAGE as error:
        raise UnreadableError(said(error)) from error


def said(error: BaseException) -> str:
    """Return what is wrong in one short line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def first_line(error: BaseException) -> str:
    """Return what an error says without its traceback, which torch adds in further lines."""
    return str(error).split("\n", 1)[0]


def file_digest(path: Path) -> str:
    """Return SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Say of what cannot be written in the block which file it is, and what to do."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written ({error.strerror or error}). What was there before is "
            "untouched. Make room or restore the folder, then give the same command to go on."
        ) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file, or a folder of files, so that it is either complete or not there."""
    partial = path.with_name(f".{uuid.uuid4().hex[:12]}.partial.{path.name}")
    with written(path):
        path.parent.mkdir(exist_ok=True)
        try:
            yield partial
            # Before it gets its name: a power cut must not leave the name of an empty file.
            for file in partial.iterdir() if partial.is_dir() else ():
                _flush(file)
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        finally:
            _remove(partial)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder like a file; of two processes that make the same one, the first's stays."""
    try:
        with atomic(path) as partial:
            partial.mkdir()
            yield partial
    except WriteError:
        if not path.is_dir():
            raise


def write_tensors(
    path: Path, tensors: dict[str, "Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Write a file of tensors, and of text beside them, atomically."""
    # Only now, as --help does not wait for PyTorch.
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    with atomic(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:
            # So its writer reports a full disk.
            raise OSError(first_line(error)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


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
