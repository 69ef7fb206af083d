"""Files of tensors that torch writes, read without trusting their form."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdnet.files import atomic, first_line


def write_tensors(path: Path, content: Any) -> None:
    """Write what `torch.load` reads with `weights_only=True`, atomically."""
    with atomic(path) as partial, partial.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # What torch's writer makes of a full disk says nothing of one.
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(first_line(error)) from error


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
