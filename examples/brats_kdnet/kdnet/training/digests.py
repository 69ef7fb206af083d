"""Digests that tell a damaged file from a sound one."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """Return SHA-256 over the numbers, texts and tensors of a state."""
    total = hashlib.sha256()
    _add(total, value)
    return total.hexdigest()


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of every entry, so that a damaged one can be named."""
    return {name: digest(value) for name, value in values.items()}


def damaged(values: Mapping[str, Any], expected: Mapping[str, str]) -> list[str]:
    """Return the names of entries that are not what they were, or are not there."""
    found = digests(values)
    return [name for name in {**expected, **found} if found.get(name) != expected.get(name)]


def check_archive(path: Path) -> None:
    """Refuse a file of tensors that unfolds to more than its own size, before it is read."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("a part of it is compressed, which torch.save never does")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts promise more bytes than it has")


def check_tensors(value: Any) -> None:
    """Refuse tensors of more numbers than are stored for them, before any is copied."""
    if isinstance(value, Tensor):
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(value.shape)} repeats its numbers")
    elif isinstance(value, Mapping):
        check_tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            check_tensors(entry)


def _add(total: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        total.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        # Bytes as they lie in memory, of every number format that there is.
        flat = value.detach().cpu().contiguous().flatten()
        total.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)}:".encode())
        for key, entry in value.items():
            _add(total, key)
            _add(total, entry)
    elif isinstance(value, list | tuple):
        total.update(f"{type(value).__name__} {len(value)}:".encode())
        for entry in value:
            _add(total, entry)
    else:
        total.update(f"{type(value).__name__} {value!r}:".encode())
