"""A data set of nnU-Net as its teacher sees it, whole, and its cases as the student sees them."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from privdistill.exceptions import LifecycleError


class Whole(NamedTuple):
    """Plans and description of a data set with all of its channels.

    Attributes:
        plans: What the plans' file holds.
        configuration: The one in use.
        dataset: What `dataset.json` holds.
    """

    plans: Mapping[str, Any]
    configuration: ConfigurationManager
    dataset: Mapping[str, Any]


def whole_data(plans: Mapping[str, Any], configuration: str, dataset: Mapping[str, Any]) -> Whole:
    """Look up a configuration that can be distilled.

    Args:
        plans: What the plans' file holds.
        configuration: Name of the one to use.
        dataset: What `dataset.json` holds.

    Returns:
        All three, the configuration with what it inherits.

    Raises:
        LifecycleError: If it needs what another stage of a cascade predicted.
    """
    whole = PlansManager(deepcopy(dict(plans))).get_configuration(configuration)
    if whole.previous_stage_name is not None:
        raise LifecycleError(
            f"{configuration} is the second stage of a cascade, whose input holds what the "
            "first one predicted. Distil 2d, 3d_lowres or 3d_fullres."
        )
    return Whole(plans, whole, dataset)


def student_cases(every: type, channels: Sequence[int]) -> type:
    """Return a class of nnU-Net's cases that have some of the channels.

    Args:
        every: nnU-Net's class of those with all channels.
        channels: Positions of those to keep.

    Returns:
        A subclass, to be used in place of it.
    """

    class StudentCases(every):  # type: ignore[misc, valid-type, unused-ignore]
        def load_case(self, identifier: str) -> tuple[Any, ...]:
            data, *rest = super().load_case(identifier)
            return data[:][channels], *rest

    return StudentCases
