"""A student that starts from the teacher's weights."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, ModalityError, ShapeMismatchError
from privdistill.inputs import InputViews, PrivilegedInput
from privdistill.losses.options import SHARE, check
from privdistill.taps.names import clean, layers
from privdistill.text import sizes

# What layers call the number of channels that they read, or normalise.
_CHANNELS = ("in_channels", "in_features", "num_features", "num_channels", "num_parameters")


@dataclass(frozen=True)
class Inheritance:
    """What a student took from its teacher; `print` shows it.

    Attributes:
        copied: Names of parameters and buffers that were copied as they are.
        cut: Names of those that were cut to the student's modalities.
        left: Those that stayed as they were, and why.
        stale: Normalisations whose statistics were those of all of the teacher's modalities: kept
            ones behind a layer that was cut, or those of groups of modalities.
        share: Share of the student's parameters, in numbers, that come from the teacher.
    """

    copied: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    stale: tuple[str, ...] = ()
    share: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.share:.1%} of the student's parameters come from the teacher"]
        lines += [f"  copied  {len(self.copied)} tensors"] * bool(self.copied)
        lines += [f"  cut     {name}" for name in self.cut]
        lines += [f"  left    {name}: {reason}" for name, reason in self.left.items()]
        seen = "its statistics were those of all of the teacher's modalities"
        lines += [f"  stale   {name}: {seen}; train first" for name in self.stale]
        return "\n".join(lines)


def inherit(
    student: nn.Module,
    teacher: nn.Module,
    inputs: InputViews | None = None,
    *,
    minimum: float = 0.5,
) -> Inheritance:
    """Let a student start from the weights of a teacher of the same architecture.

    Every parameter and buffer whose name and shape agree is copied. One that differs in a single
    axis, which has the teacher's channels there and the student's here, is cut to the student's
    modalities, in the student's order: the first convolution, a patch embedding, a normalisation of
    the input. The cut is plain, without rescaling: the first layer then gives what the teacher's
    would, were all other modalities zero (not one that standardises its weight as it runs). Where a
    weight is computed from parameters, as by `weight_norm`, those that differ are left.

    Args:
        student: The network to fill, in place; modes and `requires_grad` stay as they are.
        teacher: The trained network. The prefixes of `torch.compile` and DDP are seen through.
        inputs: Which modalities each network sees, as for the wrapper. Without a
            `PrivilegedInput` nothing is cut.
        minimum: Share of the student's parameters, in numbers, that must find a partner, in [0, 1];
            0 takes what there is.

    Returns:
        What was copied, cut and left.

    Raises:
        ShapeMismatchError: If fewer parameters find a partner.
        LayerNotFoundError: If shapes do not tell which layers read what the student sees: all of
            the teacher's modalities in another order, with several layers that could be the first,
            or some of them, with a numbered branch of the network for each.
        ModalityError: If the student sees a modality that the teacher does not.
        ObjectiveError: If `minimum` is no share. In none of these cases has anything been written.

    Example:
        >>> from privdistill import PrivilegedInput
        >>> inputs = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",))
        >>> def network(channels):
        ...     return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> teacher, student = network(4), network(1)
        >>> print(inherit(student, teacher, inputs))
        100.0% of the student's parameters come from the teacher
          copied  3 tensors
          cut     0.weight
        >>> torch.equal(student[0].weight, teacher[0].weight[:, 2:3])
        True

    Source:
        Ours. Hu et al. 2020, arXiv:2106.09564, shared the deepest layers of both networks and kept
        them fixed, without a gain; here all are inherited and then trained.
    """
    check("inherit", SHARE, minimum=minimum)
    views = _views(inputs)
    own, given = _tensors(student), _tensors(teacher)
    _check_branches(own, given, inputs)
    axes, left = _plan(own, given, views, _misgrouped(student, teacher, views))
    axes |= {name: 1 for name in _reordered(teacher, views) if name in axes}
    # Before anything is written, so that an error leaves the student as it was.
    share = _share(student, {own[name] for name in axes})
    if share < minimum:
        raise ShapeMismatchError(
            f"inherit: {share:.0%} of the student's parameters have a partner of the same name and "
            f"shape in the teacher, less than minimum={minimum:g}; nothing was written. Without "
            f"one: {list(left)[:5]}. Build both networks from one class, or pass minimum=0 to take "
            "what there is."
        )
    with torch.no_grad():
        for name, axis in axes.items():
            value, tensor = given[name], own[name]
            # Plain, without rescaling: the layer answers as if the other modalities were zero.
            channels = torch.tensor(views.channels, device=value.device)
            tensor.copy_(value if axis is None else value.index_select(axis, channels))
    cut = tuple(name for name, axis in axes.items() if axis is not None)
    copied = tuple(name for name in axes if name not in cut)
    # All modalities in another order are still all of them.
    stale = _stale(student, teacher, cut) if len(views.channels) < views.total else ()
    return Inheritance(copied, cut, left, stale, share)


class _Views(NamedTuple):
    """Where the student's channels lie among the teacher's, and how many the teacher has."""

    channels: list[int]
    total: int


def _views(inputs: InputViews | None) -> _Views:
    if not isinstance(inputs, PrivilegedInput):
        return _Views([], 0)
    unseen = [name for name in inputs.student if name not in inputs.teacher]
    if unseen:
        raise ModalityError(
            f"inherit: the student sees {unseen}, the teacher only {inputs.teacher}, so that no "
            "weights fit the student's first layer. Leave `inputs` out to copy all other layers."
        )
    teacher, student = (
        [(name, index) for name in names for index in range(inputs.channels[name])]
        for names in (inputs.teacher, inputs.student)
    )
    return _Views([teacher.index(channel) for channel in student], len(teacher))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names they have in the user's own network."""
    # Tied weights under all of their names: the teacher's need not be tied.
    parameters = network.named_parameters(remove_duplicate=False)
    buffers = network.named_buffers(remove_duplicate=False)
    return {clean(name): tensor for name, tensor in chain(parameters, buffers)}


def _check_branches(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], inputs: InputViews | None
) -> None:
    """Refuse branches for single modalities that have the same numbers in both networks."""
    if not isinstance(inputs, PrivilegedInput):
        return
    mine, theirs = _numbered(own), _numbered(given)
    fewer, more = len(inputs.student), len(inputs.teacher)
    sizes_read = {(inputs.channels[name],) for name in inputs.teacher}
    # Layers of another depth are no branches: not each of them reads a modality.
    branches = [
        name.rstrip(".")
        for name, members in theirs.items()
        if (len(mine.get(name, ())), len(members)) == (fewer, more)
        and all(any(t.shape[1:2] in sizes_read for t in member) for member in members.values())
    ]
    # Of the teacher's first modalities the numbers are right.
    if fewer < more and branches and inputs.student != inputs.teacher[:fewer]:
        raise LayerNotFoundError(
            f"inherit: {branches} of the teacher hold a branch for each of {inputs.teacher}, and "
            f"the student's, for {inputs.student}, have the numbers of other modalities. Copy them "
            "by hand, or let the teacher see the student's modalities first."
        )


def _numbered(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, list[Tensor]]]:
    """By what stands before a number in their names, and by that number."""
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in tensors.items():
        for number in re.finditer(r"\d+", name):
            found[name[: number.start()]][number[0]].append(tensor)
    return found


def _plan(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    views: _Views,
    misgrouped: Collection[str],
) -> tuple[dict[str, int | None], dict[str, str]]:
    """Along which axis each tensor is cut, None for none; and why others are left."""
    axes: dict[str, int | None] = {}
    left: dict[str, str] = {}
    for name, tensor in own.items():
        if name not in given:
            left[name] = "the teacher has none of this name"
        # Before shapes, which may agree where the channels that are read do not.
        elif name in misgrouped:
            left[name] = "its groups read other modalities than the teacher's"
        elif tensor.shape == given[name].shape:
            axes[name] = None
        elif _is_factor(name, given):
            left[name] = "cut, it would not make the teacher's weight, cut"
        elif (axis := _cut_axis(tensor, given[name], views)) is not None:
            axes[name] = axis
        else:
            left[name] = f"{sizes(tensor.shape)}, the teacher's {sizes(given[name].shape)}"
    return axes, left


def _is_factor(name: str, given: Collection[str]) -> bool:
    """Whether a weight is computed from this tensor and others, which a cut would not follow."""
    # The older forms, by hooks: of weight_norm `weight_g` and `_v`, of spectral_norm `_orig`, `_u`.
    base = name.rpartition("_")[0]
    return "parametrizations." in name or f"{base}_g" in given or f"{base}_u" in given


def _cut_axis(own: Tensor, given: Tensor, views: _Views) -> int | None:
    """The one axis in which two tensors differ, if it holds the channels of the inputs."""
    pairs = list(zip(own.shape, given.shape, strict=False))
    # Two axes that differ are another architecture, not another input.
    unequal = [axis for axis, (here, there) in enumerate(pairs) if here != there]
    if own.ndim != given.ndim or len(unequal) != 1:
        return None
    return unequal[0] if pairs[unequal[0]] == (len(views.channels), views.total) else None


def _misgrouped(student: nn.Module, teacher: nn.Module, views: _Views) -> list[str]:
    """Weights of grouped convolutions whose shapes may agree, but not the channels they read."""
    partners, found = layers(teacher), []
    for name, layer in layers(student).items():
        sides = (layer, partners.get(name))
        groups, outputs = (
            [getattr(side, option, 1) for side in sides] for option in ("groups", "out_channels")
        )
        # One filter per modality: the filters are cut, and each still reads its own.
        depthwise = groups == outputs == [len(views.channels), views.total]
        if groups[0] != groups[1] and not depthwise:
            found.append(f"{name}.weight")
    return found


def _reordered(teacher: nn.Module, views: _Views) -> list[str]:
    """The first weight, where the student sees all modalities but in another order."""
    if len(views.channels) < views.total or views.channels == sorted(views.channels):
        return []
    found, known = _tensors(teacher), layers(teacher)
    owners: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in found.items():
        owners[name.rpartition(".")[0]].append(tensor)
    readers = []
    for name, tensors in owners.items():
        channels = [n for n in (getattr(known.get(name), key, 0) for key in _CHANNELS) if n]
        # A layer that says nothing of channels may hold a number for each, as a mean and a scale.
        if views.total in (channels or (tensor.numel() for tensor in tensors)):
            readers.append(f"{name}.weight")
    readers.sort()
    if [found[name].shape[1:2] if name in found else () for name in readers] != [(views.total,)]:
        raise LayerNotFoundError(
            "inherit: the student sees the teacher's modalities in another order, and shapes do "
            f"not tell which layer reads them: {readers}. Give the student the order of the "
            "teacher."
        )
    return readers


def _share(student: nn.Module, found: Collection[Tensor]) -> float:
    # In numbers, not in tensors: dozens of norms weigh less than one convolution.
    total = sum(p.numel() for p in student.parameters())
    return sum(p.numel() for p in student.parameters() if p in found) / max(total, 1)


def _stale(student: nn.Module, teacher: nn.Module, cut: Collection[str]) -> tuple[str, ...]:
    """The first normalisation with running statistics behind each layer that was cut.

    And those that were cut themselves, and normalise modalities together.
    """
    stale, behind, partners = [], False, layers(teacher)
    for name, layer in layers(student).items():
        # Only the first behind the cut: deeper ones see what it has normalised.
        keeps = getattr(layer, "running_mean", None) is not None
        mixed = keeps and behind and f"{name}.running_mean" not in cut
        if mixed or (f"{name}.weight" in cut and _normalises_together(partners.get(name))):
            stale.append(name)
        behind = (behind or f"{name}.weight" in cut) and not keeps
    return tuple(stale)


def _normalises_together(layer: nn.Module | None) -> bool:
    """Whether a layer normalises several channels by one mean."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups < layer.num_channels
    return isinstance(layer, nn.LayerNorm)
