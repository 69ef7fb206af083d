"""The networks that a configuration describes."""

import torch

from kdnet.config import Config
from kdnet.data.description import Description
from kdnet.data.targets import number_of_outputs
from kdnet.runs.views import view_of
from kdnet.models import build_network, check_axes, in_two_dimensions
from kdnet.recipes.synthesis import privileged_modalities
from kdnet.training.checkpoint import ModelMetadata


def describe_network(
    role: str, config: Config, description: Description, name: str = ""
) -> ModelMetadata:
    """Describe the network of a role."""
    data, network = config.data, config.network
    view = view_of(role, data, description)
    backbone, arguments = network.of(role)
    if backbone == "synthesis":
        arguments = _synthesised(view, view_of("teacher", data, description)) | arguments
    if data.slices is not None:
        arguments = in_two_dimensions(backbone, arguments)
    return ModelMetadata(
        role=name or role,
        backbone=backbone,
        backbone_arguments=arguments,
        in_channels=len(view),
        out_channels=number_of_outputs(description, network.activation),
        modalities=view,
        activation=network.activation,
        description=description,
        # Patches are cut from whole volumes, unless a crop is asked for.
        crop=data.crop or (description.crop if data.patch is None else None),
        grid=None if data.patch is not None else data.grid or description.grid,
        patch=data.patch,
        slices=data.slices,
        normalise=data.normalise,
        resample=data.resample,
        phantom=description.phantom,
    )


def _synthesised(view: tuple[str, ...], teacher_view: tuple[str, ...]) -> dict[str, int]:
    """How many modalities a synthesis makes; where there are none, the recipe says so."""
    more = {*teacher_view} - {*view}
    return {"synthesised": len(privileged_modalities(view, teacher_view))} if more else {}


def build(metadata: ModelMetadata) -> torch.nn.Module:
    """Build the untrained network that metadata describe."""
    network = build_network(
        metadata.backbone,
        metadata.backbone_arguments,
        in_channels=metadata.in_channels,
        out_channels=metadata.out_channels,
    )
    check_axes(metadata.backbone, network, len(metadata.input_size))
    return network
