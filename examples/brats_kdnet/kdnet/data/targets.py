"""Class indices to training targets, and logits back to class indices and regions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdnet.data.description import Description
from kdnet.errors import UserError


def number_of_outputs(description: Description, activation: str) -> int:
    """Channels of a network's logits."""
    if activation == "softmax":
        return len(description.classes)
    # Refused now, not after the training, if regions cannot be told apart.
    _painting(description)
    return len(description.regions)


def to_target(label: Tensor, description: Description, activation: str) -> Tensor:
    """Turn class indices into what the losses compare with."""
    if activation == "softmax":
        one_hot = F.one_hot(label[:, 0].long(), len(description.classes))
        return one_hot.movedim(-1, 1).float()
    regions = [_joined(label, indices) for indices in description.regions.values()]
    return torch.cat(regions, dim=1).float()


def predict_classes(logits: Tensor, description: Description, activation: str) -> Tensor:
    """Decide the class of every voxel."""
    if activation == "softmax":
        return logits.argmax(dim=1)
    classes = torch.zeros_like(logits[:, 0], dtype=torch.int64)
    # From the largest region to the smallest, which is painted over it.
    for channel, index in _painting(description):
        classes[logits[:, channel] > 0] = index
    return classes


def _joined(label: Tensor, indices: tuple[int, ...]) -> Tensor:
    return torch.isin(label, torch.tensor(indices, device=label.device, dtype=label.dtype))


def _painting(description: Description) -> list[tuple[int, int]]:
    """Channel and class of every region, largest region first."""
    regions = list(enumerate(description.regions.values()))
    painting = []
    for channel, indices in sorted(regions, key=lambda item: -len(item[1])):
        # What is left of a region without those inside it must be one class.
        smaller = [set(other) for _, other in regions if set(other) < set(indices)]
        own = set(indices).difference(*smaller)
        if len(own) != 1:
            name = list(description.regions)[channel]
            raise UserError(
                f"Data set '{description.name}': with activation 'sigmoid', region '{name}' must "
                f"hold exactly one class that no smaller region inside it holds; found "
                f"{sorted(own) or 'none'}. Use activation 'softmax' or nested regions."
            )
        painting.append((channel, own.pop()))
    return painting
