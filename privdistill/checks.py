"""What a wrapper refuses: networks, inputs, taps and outputs that would fail in silence."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from inspect import getattr_static
from itertools import chain

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from privdistill.cache import TeacherCache
from privdistill.exceptions import (
    LayerNotFoundError,
    LifecycleError,
    ModalityError,
    ObjectiveError,
    ShapeMismatchError,
)
from privdistill.inputs import InputViews, PrivilegedInput, SameInput
from privdistill.losses import Objective
from privdistill.taps.layout import as_map
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Layer, Tap, as_layer
from privdistill.teachers import JointTeacher, MovingAverage, Teacher


def input_views(inputs: InputViews | None) -> InputViews:
    """Return how an input is divided among the networks.

    Args:
        inputs: What the user passed, or None for the whole input for both.

    Returns:
        An object with `for_teacher` and `for_student`.

    Raises:
        ModalityError: If it lacks these methods.
    """
    if inputs is None:
        return SameInput()
    if not (hasattr(inputs, "for_teacher") and hasattr(inputs, "for_student")):
        raise ModalityError(
            f"`inputs` is {inputs!r}; expected PrivilegedInput(modalities=..., student=...) or an "
            "object with the methods for_teacher(image) and for_student(image)."
        )
    return inputs


def check_networks(teachers: Sequence[nn.Module], student: nn.Module, objective: Objective) -> None:
    """Refuse networks that cannot be wrapped together.

    Args:
        teachers: The teachers, if any.
        student: The student.
        objective: Says whether a teacher is needed.

    Raises:
        LifecycleError: If one is in DataParallel or has lazy layers, or they share parameters.
        ObjectiveError: If the objective reads a teacher and there is none.
    """
    if not isinstance(student, nn.Module):
        raise LifecycleError(
            f"The student is {student!r}; expected a network, an instance of torch.nn.Module."
        )
    for role, network in [("student", student), *(("teacher", teacher) for teacher in teachers)]:
        if isinstance(network, nn.DataParallel):
            raise LifecycleError(
                f"The {role} is wrapped in DataParallel, whose copies no hook survives. Pass the "
                "network itself and use DistributedDataParallel, one process per device."
            )
        if any(map(is_lazy, network.parameters())):
            raise LifecycleError(
                f"The {role} has lazy layers without weights. Run it once on a batch of its own "
                "before the wrapper is built."
            )
    if any(sharded(module) for module in student.modules()):
        raise LifecycleError(
            "The student is sharded by FSDP already: the dry run would leave its weights gathered, "
            "and the wrapper's adapters would be left out. Build the wrapper from the plain "
            "student, then call fully_shard(kd)."
        )
    if not teachers:
        _check_needs_no_teacher(objective)
    own = {id(part) for part in _parts(student)}
    parts = [part for teacher in teachers for part in _parts(teacher)]
    both = dict.fromkeys(type(part).__name__ for part in parts if id(part) in own)
    if both:
        raise LifecycleError(
            f"Teacher and student share parameters or layers ({', '.join(both)}), which cannot be "
            "frozen in eval mode and be trained at once. Give each network its own; "
            "copy.deepcopy(network) makes a second one."
        )


def _parts(network: nn.Module) -> list[object]:
    return [*network.parameters(), *(part for part in network.modules() if _has_state(part))]


def _has_state(module: nn.Module) -> bool:
    """Whether a module has parameters, buffers or a mode: a ReLU may serve two networks."""
    forward = getattr(getattr_static(module, "forward"), "__code__", None)
    reads_mode = forward is None or "training" in forward.co_names
    return reads_mode or any(True for _ in chain(module.parameters(), module.buffers()))


def _check_needs_no_teacher(objective: Objective) -> None:
    needy = [
        name for name, (_, term) in objective.named_terms.items() if term.needs_teacher or term.taps
    ]
    if needy:
        raise ObjectiveError(
            f"The objective's {', '.join(needy)} read the teacher, but teacher=None. Pass a "
            "trained teacher, or an objective of GroundTruth() alone."
        )


def tap_table(taps: Mapping[str, Tap], read: tuple[str, ...], teachers: int) -> dict[str, Tap]:
    """Return the taps given, and the bottleneck where a term reads it and nobody named it.

    Args:
        taps: What the user passed.
        read: Names of the taps that terms read.
        teachers: Number of teachers.

    Returns:
        Taps by name.

    Raises:
        LayerNotFoundError: If a name or a tap has another form, or a tap that is read is missing.
    """
    table = dict(taps)
    for name, tap in table.items():
        if not isinstance(tap, Tap):
            raise LayerNotFoundError(
                f"Tap '{name}' is {tap!r}; expected Tap(teacher=..., student=...)."
            )
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise LayerNotFoundError(
                f"Tap name {name!r} must be a plain word, such as 'bottleneck' or 'stage3'."
            )
        network = as_layer(tap.teacher).network
        if teachers and network >= teachers:
            raise LayerNotFoundError(
                f"Tap '{name}' reads teacher {network}, but there are {teachers}, counted from 0."
            )
    for name in read:
        if name == "bottleneck":
            table.setdefault(name, Tap())
        elif name not in table:
            raise LayerNotFoundError(
                f"A term reads tap '{name}', but `taps` names {sorted(table) or 'none'}. Add "
                f"taps={{'{name}': Tap(teacher=..., student=...)}}."
            )
    return table


def check_heads(student: Tensor, teachers: Sequence[Tensor]) -> None:
    """Compare the shapes of all networks' logits for the example.

    Args:
        student: Logits of the student, `(B, C, *spatial)`; of several heads the finest.
        teachers: Those of each teacher.

    Raises:
        ShapeMismatchError: If they differ.
    """
    for teacher in teachers:
        if student.shape != teacher.shape:
            raise ShapeMismatchError(
                f"The objective compares logits, but for the example the student gives "
                f"{tuple(student.shape)} and the teacher {tuple(teacher.shape)}. Both must predict "
                "the same classes at the same resolution; pass `select_logits=` if another output "
                "is the one to compare."
            )


def check_same_views(inputs: InputViews) -> None:
    """Refuse a moving average of a student that sees less than its teacher.

    Args:
        inputs: How the input is divided.

    Raises:
        ModalityError: If the two views are known to differ.
    """
    if isinstance(inputs, PrivilegedInput) and inputs.teacher != inputs.student:
        raise ModalityError(
            f"A MovingAverage of the student sees what the student sees, but the views differ: "
            f"{inputs}. Pass teacher={inputs.student} to PrivilegedInput, or a trained teacher."
        )


def check_cache(
    cache: TeacherCache | None, teacher: Teacher | None, networks: Sequence[nn.Module]
) -> None:
    """Refuse to keep the outputs of a teacher that changes in every step.

    Args:
        cache: What the user passed.
        teacher: What the user declared.
        networks: What it consists of.

    Raises:
        LifecycleError: If it is no cache, the teacher changes, or FSDP has sharded it.
    """
    if cache is None:
        return
    if not isinstance(cache, TeacherCache):
        raise LifecycleError(
            f"`cache` is {cache!r}; expected a TeacherCache, such as TeacherCache('runs/teacher')."
        )
    if isinstance(teacher, MovingAverage | JointTeacher):
        raise LifecycleError(
            f"A {type(teacher).__name__} changes in every step, so its outputs cannot be kept. "
            "Leave `cache` out, or pass a frozen teacher."
        )
    if any(sharded(part) for network in networks for part in network.modules()):
        raise LifecycleError(
            "The teacher is sharded by FSDP: where one process finds a sample and another does "
            "not, both would wait for each other for ever. Leave `cache` out, or pass the teacher "
            "unsharded; with a cache it hardly runs."
        )


def feature_map(features: Tensor, spatial: Sequence[int], *, tap: str, layer: Layer) -> Tensor:
    """Read captured features as a map.

    Args:
        features: What the layer gave.
        spatial: Spatial size of the network's view.
        tap: Name of the tap, for the message.
        layer: The layer, for the message.

    Returns:
        `(B, C, *grid)`.

    Raises:
        ShapeMismatchError: If they are no map, tokens or channels-last features of such an image.
    """
    found = as_map(features, spatial)
    if found is None:
        raise ShapeMismatchError(
            f"Tap '{tap}': layer '{layer}' gives {tuple(features.shape)} for an image of size "
            f"{tuple(spatial)}; expected features (B, C, *spatial) or tokens (B, N, C) of a grid "
            "of square patches. Choose another layer, or bring them into that form with "
            "Layer(..., select=function)."
        )
    return found


def check_view(view: Tensor, role: str, like: Sequence[int] | None) -> None:
    """Refuse what no network could run on, or what is not like the example.

    Args:
        view: What a network is about to see.
        role: What messages call the network.
        like: Shape of its view of the example, if there was one.

    Raises:
        ShapeMismatchError: If the batch or an axis is empty, the values are integers, or the
            number of axes or channels is another.
    """
    shape = tuple(view.shape)
    if len(shape) < 3 or 0 in shape:
        raise ShapeMismatchError(
            f"The {role}'s view of the input is {shape}; expected (B, C, *spatial) with at least "
            "one spatial axis and no empty one. If the batch is empty, drop it before the step."
        )
    if not view.is_floating_point():
        raise ShapeMismatchError(
            f"The {role}'s view of the input is {view.dtype}; networks take floating-point images. "
            "Pass image.float()."
        )
    if like is not None and (len(shape) != len(like) or shape[1] != like[1]):
        raise ShapeMismatchError(
            f"The {role}'s view of the input is {shape}, that of the example was {tuple(like)}; "
            "the number of axes and channels must be the same. Check the reader, or build the "
            "wrapper with an example like the batches."
        )


def check_gradients(recorder: Recorder, features: Mapping[str, Tensor]) -> None:
    """Check that student features can teach anything.

    Args:
        recorder: Names the layers.
        features: Student features by tap name, in training.

    Raises:
        LifecycleError: If any carries no gradient.
    """
    for tap, tensor in features.items():
        if not tensor.requires_grad:
            raise LifecycleError(
                f"Tap '{tap}': the output of layer '{recorder.places[tap].layer}' carries no "
                "gradient in training, so its terms would teach nothing. Is that part of the "
                "student frozen, or does activation checkpointing run with use_reentrant=True? "
                "Use use_reentrant=False."
            )


def check_synchronised(student: nn.Module, others: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse to train what each process would train on its own, in silence.

    Args:
        student: The student.
        others: What the wrapper trains besides, with names.

    Raises:
        LifecycleError: If only the student was given to DistributedDataParallel or FSDP.
    """
    mark = "_is_fsdp_managed_module"
    ddp = nn.parallel.DistributedDataParallel
    if not any(isinstance(module, ddp) or hasattr(module, mark) for module in student.modules()):
        return
    apart = [
        name
        for name, other in others
        for module in other.modules()
        if next(module.parameters(recurse=False), None) is not None and not hasattr(module, mark)
    ]
    if apart:
        raise LifecycleError(
            f"Only the student was given to DistributedDataParallel or FSDP, so the adapters or "
            f"terms {list(dict.fromkeys(apart))} would differ between processes. Build the wrapper "
            "from the plain student, then call DistributedDataParallel(kd) or fully_shard(kd)."
        )


def sharded(module: nn.Module) -> bool:
    """Say whether FSDP has sharded a layer.

    Args:
        module: The layer.

    Returns:
        Whether it has.
    """
    # Whoever has sharded a network has imported this; nobody else should wait for the import.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def check_gathered(wrapper: nn.Module) -> None:
    """Refuse to predict with weights of which this process has a part.

    Args:
        wrapper: The wrapper.

    Raises:
        LifecycleError: If it is sharded by FSDP, which was not told of `predict`, and its weights
            are not gathered now.
    """
    # Registering a method replaces it on the instance.
    if not sharded(wrapper) or "predict" in vars(wrapper) or _whole(wrapper):
        return
    raise LifecycleError(
        "The wrapper is sharded by FSDP, which gathers weights for forward() alone. Call "
        "torch.distributed.fsdp.register_fsdp_forward_method(kd, 'predict') right after "
        "fully_shard(kd). Where processes predict at their own pace, shard the wrapper as one unit "
        "and predict between kd.unshard() and kd.reshard()."
    )


def _whole(wrapper: nn.Module) -> bool:
    """Whether a sharded wrapper is one unit, of which this process has all weights now."""
    # Layers sharded on their own gather in their forward, for which FSDP must know the outermost.
    apart = any(sharded(part) for part in wrapper.modules() if part is not wrapper)
    # FSDP swaps the parameters: gathered they are plain tensors, else DTensors.
    return not apart and not any(hasattr(p, "full_tensor") for p in wrapper.parameters())
