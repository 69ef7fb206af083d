"""What a wrapper refuses: networks, inputs, taps and outputs that would fail in silence."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from privdistill.dry_run import Trial
from privdistill.exceptions import (
    LayerNotFoundError,
    LifecycleError,
    ModalityError,
    ObjectiveError,
    ShapeMismatchError,
)
from privdistill.inputs import InputViews, SameInput
from privdistill.losses import Objective
from privdistill.taps import Recorder, Tap


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


def check_networks(teacher: nn.Module | None, student: nn.Module, objective: Objective) -> None:
    """Refuse networks that cannot be wrapped together.

    Args:
        teacher: The teacher, or None.
        student: The student.
        objective: Says whether a teacher is needed.

    Raises:
        LifecycleError: If one is in DataParallel or has lazy layers, or they share parameters.
        ObjectiveError: If the objective reads a teacher and there is none.
    """
    for role, network in (("teacher", teacher), ("student", student)):
        if isinstance(network, nn.DataParallel):
            raise LifecycleError(
                f"The {role} is wrapped in DataParallel, whose copies no hook survives. Pass the "
                "network itself and use DistributedDataParallel, one process per device."
            )
        if network is not None and any(map(is_lazy, network.parameters())):
            raise LifecycleError(
                f"The {role} has lazy layers without weights. Run it once on a batch of its own "
                "before the wrapper is built."
            )
    if teacher is None:
        _check_needs_no_teacher(objective)
        return
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise LifecycleError(
            f"Teacher and student share {len(shared)} parameters, and the teacher is frozen. Pass "
            "two networks; copy.deepcopy(network) gives a second one."
        )


def _check_needs_no_teacher(objective: Objective) -> None:
    needy = [
        name for name, (_, term) in objective.named_terms.items() if term.needs_teacher or term.taps
    ]
    if needy:
        raise ObjectiveError(
            f"The objective's {', '.join(needy)} read the teacher, but teacher=None. Pass a "
            "trained teacher, or an objective of GroundTruth() alone."
        )


def tap_table(taps: Mapping[str, Tap], read: tuple[str, ...]) -> dict[str, Tap]:
    """Return the taps given, and the bottleneck where a term reads it and nobody named it.

    Args:
        taps: What the user passed.
        read: Names of the taps that terms read.

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
        if not name.isidentifier():
            raise LayerNotFoundError(
                f"Tap name {name!r} must be a plain word, such as 'bottleneck' or 'stage3'."
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


def check_logits(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Compare the shapes of both networks' logits for the example.

    Args:
        student: `(B, C, *spatial)`.
        teacher: `(B, C, *spatial)`.

    Raises:
        ShapeMismatchError: If they differ.
    """
    if student != teacher:
        raise ShapeMismatchError(
            f"The objective compares logits, but for the example the student gives {student} and "
            f"the teacher {teacher}. Both must predict the same classes at the same resolution; "
            "pass `select_logits=` if another output is the one to compare."
        )


def check_single_head(training: Trial, evaluation: Trial) -> None:
    """Refuse deep supervision, of which only the first head would be taught in silence.

    Args:
        training: What the student gave in train mode.
        evaluation: What it gave in eval mode.

    Raises:
        ShapeMismatchError: If there are several heads, or the logits have another number of axes.
    """
    output = training.output
    heads = output if isinstance(output, tuple | list) else ()
    alike = [h for h in heads if isinstance(h, Tensor) and h.shape[1:2] == heads[0].shape[1:2]]
    if len(alike) > 1 or len(training.logits) != len(evaluation.logits):
        shapes = [tuple(head.shape) for head in alike] or [training.logits]
        raise ShapeMismatchError(
            f"In train mode the student returns several predictions, {shapes}, and only the first "
            f"would be taught; in eval mode it returns {evaluation.logits}. Switch its deep "
            "supervision off, or pass `select_logits=`, for instance lambda output: output[0]."
        )


def check_batch(logits: Tensor) -> None:
    """Refuse an empty batch, whose mean loss is not a number.

    Args:
        logits: `(B, C, *spatial)`.

    Raises:
        ShapeMismatchError: If B is 0.
    """
    if logits.shape[0] == 0:
        raise ShapeMismatchError(
            f"The student's logits are {tuple(logits.shape)}: the batch is empty. Drop empty "
            "batches before the step."
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
                f"Tap '{tap}': the output of layer '{recorder.names[tap]}' carries no gradient in "
                "training, so its terms would teach nothing. Is that part of the student frozen, "
                "or does activation checkpointing run with use_reentrant=True? Use "
                "use_reentrant=False."
            )
