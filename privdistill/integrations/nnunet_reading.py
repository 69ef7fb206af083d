"""Files of nnU-Net, read with care: no program is run, and what is wrong with one is said."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch

from privdistill.exceptions import LifecycleError

# What nnU-Net's own checkpoints hold besides tensors and plain values: the numbers of its logs,
# also under the name that numpy 1 gave them.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE: list[Any] = [_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
_SAFE += [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
_ENTRIES = {"network_weights", "trainer_name", "init_args"}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net without running what a pickle may hold.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        LifecycleError: If it is not there, is damaged or no checkpoint of nnU-Net, or holds more
            than tensors, plain values and numbers.
    """
    if not path.is_file():
        beside = sorted(
            str(p.relative_to(path.parents[1])) for p in path.parents[1].glob("fold_*/*.pth")
        )
        raise LifecycleError(
            f"{path} does not exist; beside it are {', '.join(beside) or 'no checkpoints'}. "
            "Train that fold to its end first, with the same fold for teacher and student: a "
            "teacher of another fold has seen the student's validation cases."
        )
    damaged = (
        f"{path} is damaged, or no checkpoint of nnU-Net. Copy it again, or train that fold anew."
    )
    if not is_zipfile(path):
        raise LifecycleError(damaged)
    try:
        with torch.serialization.safe_globals(_SAFE):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise LifecycleError(
            f"{path} holds more than tensors and plain values: {str(error).splitlines()[0]} A "
            "checkpoint can run any program when it is read, so this one is not. If you trust who "
            "made it, read it with torch.load(path, weights_only=False) and save its entries "
            "network_weights, trainer_name, init_args and inference_allowed_mirroring_axes anew."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise LifecycleError(damaged) from error
    if not isinstance(found, dict) or not set(found) >= _ENTRIES:
        raise LifecycleError(damaged)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of nnU-Net's.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        LifecycleError: If there is none, or it is damaged.
    """
    if not path.is_file():
        raise LifecycleError(
            f"{path} does not exist. Expected a model folder of nnU-Net with dataset.json, "
            "plans.json and fold_*/, as nnUNetv2_train leaves it: "
            "nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION."
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise LifecycleError(
            f"{path} is damaged: it is no JSON object ({error}). Copy it again."
        ) from error
