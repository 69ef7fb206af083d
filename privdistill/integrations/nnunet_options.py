"""Options of the trainer for nnU-Net, which hands none to trainers: attributes or environment."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from privdistill.exceptions import LifecycleError, ObjectiveError
from privdistill.integrations.nnunet_plans import channel_indices


def student_channels(given: Sequence[str], dataset: Mapping[str, Any]) -> list[int]:
    """Return the positions of the student's channels.

    Args:
        given: Names or numbers; those of `PRIVDISTILL_CHANNELS`, with commas, if there are none.
        dataset: What `dataset.json` holds.

    Returns:
        Positions, in the order asked for.

    Raises:
        ModalityError: If they are not those of the data set.
    """
    wanted = given or os.environ.get("PRIVDISTILL_CHANNELS", "").split(",")
    return channel_indices(dataset, [name.strip() for name in wanted if name.strip()])


def teacher_folder(given: str | Path) -> Path:
    """Return the model folder of the teacher.

    Args:
        given: The folder; that of `PRIVDISTILL_TEACHER` if it is empty.

    Returns:
        The folder; whether it is there is not looked at.

    Raises:
        LifecycleError: If none is named.
    """
    named = given or os.environ.get("PRIVDISTILL_TEACHER", "")
    if not named:
        raise LifecycleError(
            "No teacher is given. Set PRIVDISTILL_TEACHER to the folder of a plain nnU-Net of "
            "every channel, nnUNet_results/DATASET/nnUNetTrainer__PLANS__CONFIGURATION, or "
            "PRIVDISTILL_IMITATION=0 to train the baseline without one."
        )
    return Path(named)


def imitation(given: float | None) -> float:
    """Return the teacher's share of the loss.

    Args:
        given: lambda; that of `PRIVDISTILL_IMITATION`, or 0.5, if it is None.

    Returns:
        A number in [0, 1].

    Raises:
        ObjectiveError: If it is none.
    """
    text = os.environ.get("PRIVDISTILL_IMITATION", "0.5") if given is None else given
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ObjectiveError(
            f"PRIVDISTILL_IMITATION is {text!r}; expected the teacher's share in [0, 1], such as "
            "0.5, or 0 for a baseline without one."
        )
    return share
