"""The teacher of an nnU-Net student: a plain nnU-Net, from its model folder."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from privdistill.exceptions import LifecycleError
from privdistill.integrations.nnunet_data import Whole
from privdistill.integrations.nnunet_plans import INTENSITIES, channel_names, differences
from privdistill.integrations.nnunet_reading import load_checkpoint, read_json

#: Where the classes of a network may come from that a stranger's plans name.
TRUSTED = ("dynamic_network_architectures.", "torch.nn.")
_ALIKE = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")


def load_teacher(folder: Path, student: Whole, fold: int | str) -> nn.Module:
    """Build a trained nnU-Net and load the weights of one fold.

    It returns its finest head alone: coarser heads are trained with little weight or none, and the
    library brings its logits to each resolution of the student's.

    Args:
        folder: Model folder, `TRAINER__PLANS__CONFIGURATION`.
        student: The student's data, which the teacher must have been trained on.
        fold: Fold whose `checkpoint_final.pth` is read.

    Returns:
        The network, on the CPU.

    Raises:
        LifecycleError: If a file is missing or cannot be trusted, or the teacher does not fit.
    """
    given, described = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    checkpoint = load_checkpoint(folder / f"fold_{fold}" / "checkpoint_final.pth")
    manager = PlansManager(given)
    own = manager.get_configuration(checkpoint["init_args"]["configuration"])
    _check_alike(folder, _facts(Whole(given, own, described)), _facts(student))
    _check_classes(folder, own)
    trainer = recursive_find_trainer_class_by_name(checkpoint["trainer_name"])
    heads = manager.get_label_manager(described).num_segmentation_heads
    network: nn.Module = trainer.build_network_architecture(
        manager, own, len(channel_names(described)), heads, enable_deep_supervision=False
    )
    network.load_state_dict(checkpoint["network_weights"])
    return network


def digest(teacher: nn.Module) -> str:
    """Return what tells a teacher's weights from others.

    Args:
        teacher: The network.

    Returns:
        The first 16 digits of SHA-256 over the names and bytes of its state.
    """
    whole = hashlib.sha256()
    for name, value in teacher.state_dict().items():
        whole.update(name.encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def _facts(data: Whole) -> dict[str, Any]:
    """What teacher and student must have in common to see the same patches and say the same."""
    plans, configuration, dataset = data
    facts = {name: configuration.configuration[name] for name in _ALIKE}
    facts |= {"channels": channel_names(dataset), "labels": dataset["labels"]}
    facts["regions_class_order"] = dataset.get("regions_class_order")
    facts["transpose_forward"] = plans["transpose_forward"]
    # Other schemes look at the image alone.
    if "CTNormalization" in facts["normalization_schemes"]:
        facts[INTENSITIES] = plans[INTENSITIES]
    return facts


def _check_alike(folder: Path, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    unlike = differences(teacher, student)
    if unlike:
        raise LifecycleError(
            f"The teacher in {folder} was trained on other patches than the student gets. They "
            f"differ in (teacher's and student's) {unlike}. Train both with the same plans: "
            "nnUNetv2_train DATASET CONFIGURATION FOLD -p PLANS, on the data set of all channels."
        )


def _check_classes(folder: Path, configuration: ConfigurationManager) -> None:
    """Refuse plans of a stranger that would import and call anything but a network."""
    foreign = [name for name in _classes(configuration) if not name.startswith(TRUSTED)]
    if foreign:
        raise LifecycleError(
            f"The plans in {folder} build the network from {', '.join(foreign)}, outside of "
            f"{' and '.join(part.rstrip('.') for part in TRUSTED)}. nnU-Net imports and calls what "
            "plans name. If you trust who made them, add the package: "
            "privdistill.integrations.nnunet_teacher.TRUSTED += ('my_package.',)."
        )


def _classes(configuration: ConfigurationManager) -> Iterator[str]:
    yield configuration.network_arch_class_name
    arguments = configuration.network_arch_init_kwargs
    for name in configuration.network_arch_init_kwargs_req_import:
        if arguments[name] is not None:
            yield str(arguments[name])
