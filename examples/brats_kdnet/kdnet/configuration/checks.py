"""What the types of the options allow and a run does not."""

from collections.abc import Callable
from typing import Any, TypeAlias

from kdnet.configuration.config import Config
from kdnet.configuration.data import DataConfig
from kdnet.configuration.network import NetworkConfig
from kdnet.configuration.objective import ObjectiveConfig
from kdnet.configuration.training import TrainingConfig
from kdnet.errors import UserError

# Group and name of an option, whether its group is fine, and what is expected, where {0} is the
# group.
_Demand: TypeAlias = tuple[str, str, Callable[[Any], bool], str]
_DEMANDS: tuple[_Demand, ...] = (
    ("data", "folds", lambda data: data.folds >= 2, "2 or more"),
    ("data", "fold", lambda data: 0 <= data.fold < data.folds, "0 to {0.last_fold}"),
    (
        "data",
        "validation_fraction",
        lambda data: 0 <= data.validation_fraction < 1,
        "0 or more, below 1",
    ),
    ("data", "student_modalities", lambda data: bool(data.student_modalities), "one or more"),
    ("data", "workers", lambda data: data.workers >= 0, "0 or more"),
    ("data", "phantoms", lambda data: data.phantoms >= max(6, data.folds), "6 or more, and folds"),
    ("data", "phantom_size", lambda data: data.phantom_size >= 16, "16 or more"),
    ("training", "weight_decay", lambda training: training.weight_decay >= 0, "0 or more"),
    ("training", "plateau_factor", lambda training: 0 < training.plateau_factor < 1, "0 to 1"),
    ("training", "plateau_patience", lambda training: training.plateau_patience >= 1, "1 or more"),
    ("training", "seed", lambda training: 0 <= training.seed < 2**32, "0 to 2^32 - 1"),
    ("data", "crop", lambda data: min(data.crop or (1,)) > 0, "positive"),
    ("data", "grid", lambda data: min(data.grid or (1,)) > 0, "positive"),
    ("data", "patch", lambda data: min(data.patch or (1,)) > 0, "positive"),
    ("data", "patches_per_case", lambda data: data.patches_per_case >= 0, "0 or more"),
    ("data", "empty_slices", lambda data: 0 <= data.empty_slices <= 1, "0 to 1"),
    ("objective", "imitation", lambda objective: 0 <= objective.imitation <= 1, "0 to 1"),
    (
        "objective",
        "imitation_start",
        lambda objective: 0 <= (objective.imitation_start or 0) <= 1,
        "0 to 1",
    ),
    ("objective", "imitation_steps", lambda objective: objective.imitation_steps >= 1, "1 or more"),
    ("objective", "out_of_fold", lambda objective: objective.out_of_fold >= 1, "1 or more"),
    ("objective", "temperature", lambda objective: objective.temperature > 0, "above 0"),
    ("objective", "latent_weight", lambda objective: objective.latent_weight >= 0, "0 or more"),
    ("data", "labelled", lambda data: data.labelled is None or data.labelled >= 1, "1 or more"),
    ("data", "unlabelled", lambda data: (data.unlabelled or 0) >= 0, "0 or more"),
    (
        "data",
        "leave_out",
        lambda data: data.leave_out is None or 0 <= data.leave_out[0] < data.leave_out[1] > 1,
        "a part from 0, and the number of parts, 2 or more",
    ),
    ("training", "epochs", lambda training: training.epochs >= 1, "1 or more"),
    (
        "training",
        "samples_per_epoch",
        lambda training: training.samples_per_epoch >= 0,
        "0 or more",
    ),
    ("training", "batch_size", lambda training: training.batch_size >= 1, "1 or more"),
    ("training", "learning_rate", lambda training: training.learning_rate > 0, "above 0"),
    ("training", "gradient_clip", lambda training: training.gradient_clip >= 0, "0 or more"),
    ("training", "threads", lambda training: training.threads >= 0, "0 or more"),
    ("training", "teacher_cache_gib", lambda training: training.teacher_cache_gib > 0, "above 0"),
)


def check_config(config: Config) -> None:
    """Refuse what the types allow and the run does not."""
    wrong = [
        *_out_of_range(config),
        *_contradictions(config.data),
        *_contradictory_teachers(config.network, config.objective),
        *_contradictory_validation(config.data, config.objective, config.training),
    ]
    if wrong:
        raise UserError("\n".join(wrong))


def _out_of_range(config: Config) -> list[str]:
    """Which options have a value that no run can use, one sentence each."""
    groups = ((getattr(config, name), *demand) for name, *demand in _DEMANDS)
    return [
        f"{name} is {getattr(group, name)}; expected {wanted.format(group)}."
        for group, name, fine, wanted in groups
        if not fine(group)
    ]


def _contradictory_validation(
    data: DataConfig, objective: ObjectiveConfig, training: TrainingConfig
) -> list[str]:
    """What needs validation subjects or a term that there are none of, one sentence each."""
    found = []
    if data.validation_fraction == 0 and (
        training.selection == "best" or training.schedule == "plateau"
    ):
        found.append(
            "validation_fraction is 0, but selection best and schedule plateau need validation "
            "subjects. Set --selection last and --schedule onecycle, or a larger fraction."
        )
    if training.validation_loss == "ground_truth" and objective.imitation == 1:
        found.append("validation_loss is ground_truth, but imitation 1 leaves no such term.")
    return found


def _contradictory_teachers(network: NetworkConfig, objective: ObjectiveConfig) -> list[str]:
    """What cannot be had of several teachers, one sentence each."""
    found = []
    if objective.out_of_fold > 1 and network.teacher_model is not None:
        found.append(
            f"out_of_fold is {objective.out_of_fold}, but teacher_model gives a teacher that was "
            "trained already. Leave either out."
        )
    if objective.out_of_fold > 1 and objective.objective == "kdnet" and objective.latent_weight:
        found.append(
            f"out_of_fold is {objective.out_of_fold} and latent_weight {objective.latent_weight}: "
            "bottlenecks come from one teacher, which was trained on a part of the subjects that "
            "it would teach. Set --latent_weight 0."
        )
    return found


def _contradictions(data: DataConfig) -> list[str]:
    """What of patches, slices and grid excludes one another, one sentence each."""
    found = []
    if data.patch is not None and data.grid is not None:
        found.append(
            f"patch is {data.patch} and grid is {data.grid}: patches are cut from volumes at their "
            "own resolution, which a grid would change. Leave one out: --grid null or --patch null."
        )
    if data.patch is not None and data.slices is not None:
        found.append(
            f"patch is {data.patch} and slices is {data.slices}: networks see either patches or "
            "whole slices. Leave one out: --patch null or --slices null."
        )
    if data.patch is None and data.patches_per_case:
        found.append(
            f"patches_per_case is {data.patches_per_case}, but there are no patches. Give their "
            "size, for example --patch 128,128,128."
        )
    if data.slices is None and data.empty_slices < 1:
        found.append(
            f"empty_slices is {data.empty_slices}, but there are no slices. Give their plane, for "
            "example --slices axial."
        )
    return found
