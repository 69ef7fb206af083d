"""`DistillationWrapper`: teacher and student as one trainable module."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from privdistill import dry_run
from privdistill.checks import (
    check_batch,
    check_gradients,
    check_logits,
    check_networks,
    check_single_head,
    input_views,
    tap_table,
)
from privdistill.exceptions import LayerNotFoundError, LifecycleError, ObjectiveError
from privdistill.inputs import Image, InputViews, plain
from privdistill.losses import Objective, Term, as_objective
from privdistill.losses.base import check_choice
from privdistill.losses.functional import Activation
from privdistill.output import Output, Step, TapPair, first_logits
from privdistill.taps import Recorder, Tap, build_adapter, check_equal, short
from privdistill.teachers import FrozenTeacher

Validation = Literal["first", "always", "never"]


class DistillationWrapper(nn.Module):
    """Train a student with the logits and features of a teacher that may see more.

    Hooks capture one or more layer pairs of two networks that know nothing of each other; the
    objective turns them, the logits and the target into a loss. The student stays the very module
    that was passed in, and `close()` gives both networks back as they came.

    Args:
        teacher: A trained network; frozen and put into eval mode. None is allowed where the
            objective reads nothing of a teacher, so that a baseline trains through the same code.
        student: The network to train.
        objective: A term or a weighted sum of terms.
        inputs: Which modalities each network sees, a `PrivilegedInput` or any object with its two
            methods; the whole input for both unless given.
        taps: Layer pairs by name. A tap that a term reads and that is not given here is located
            by the dry run, if it is called "bottleneck".
        activation: "softmax" for exclusive classes, "sigmoid" for overlapping regions; every term
            inherits it.
        example: A full input for the dry run, `(B, C, *spatial)` or a mapping by modality; only
            its shape matters. Needed to locate bottlenecks and to build adapters.
        validate: When target values are checked: "first" step, "always" or "never". On a GPU each
            check waits for the device.
        select_logits: Function from a network's output to its logits; by default tensors, tuples,
            lists, mappings with "out" and objects with `.logits` are understood.

    Raises:
        LayerNotFoundError: If a tap's layer does not exist or no bottleneck can be told.
        ShapeMismatchError: If features or logits of the two networks do not fit.
        ModalityError: If the example does not carry the modalities named.
        ObjectiveError: If the objective or an option has no meaning.
        LifecycleError: If a network is wrapped in DataParallel, is given twice, or a tap does
            not fire.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from privdistill import DistillationWrapper, GroundTruth, LatentKL, PrivilegedInput
        >>> def network(channels):
        ...     down = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        ...     return nn.Sequential(down, nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 1))
        >>> kd = DistillationWrapper(
        ...     network(2), network(1),
        ...     objective=GroundTruth() + 10 * LatentKL(),
        ...     inputs=PrivilegedInput(("rgb", "depth"), student=("rgb",)),
        ...     example=torch.zeros(1, 2, 8, 8))
        >>> out = kd(torch.rand(3, 2, 8, 8), torch.zeros(3, 8, 8, dtype=torch.long))
        >>> out.loss.backward()
        >>> sorted(out.terms)
        ['ground_truth', 'latent_kl']

    Source:
        Hu et al. 2020, arXiv:2106.09564; generalized distillation: Lopez-Paz et al. 2016,
        arXiv:1511.03643.
    """

    student: nn.Module
    adapters: nn.ModuleDict
    steps: Tensor

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        *,
        objective: Term | Objective,
        inputs: InputViews | None = None,
        taps: Mapping[str, Tap] | None = None,
        activation: Activation = "softmax",
        example: Image | None = None,
        validate: Validation = "first",
        select_logits: Callable[[Any], Tensor] = first_logits,
    ) -> None:
        super().__init__()
        check_choice("DistillationWrapper", "activation", activation, ("softmax", "sigmoid"))
        check_choice("DistillationWrapper", "validate", validate, ("first", "always", "never"))
        self.objective = as_objective(objective)
        self.activation: Activation = activation
        self.validate = validate
        self.inputs = input_views(inputs)
        self.select_logits = select_logits
        # A tensor, since a number would be a new constant for torch.compile in every step.
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._validated = False
        self._closed = False
        check_networks(teacher, student, self.objective)
        self.taps = tap_table(taps or {}, self.objective.taps)
        self._build(teacher, student, example)

    def _build(self, teacher: nn.Module | None, student: nn.Module, example: Image | None) -> None:
        self.student = student
        self.adapters = nn.ModuleDict()
        self._teachers: list[FrozenTeacher] = []
        self._recorders: dict[str, Recorder] = {}
        self._notes: dict[str, dict[str, str]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        # Also at the end of the wrapper's life: a notebook cell run twice must not pile up hooks.
        self._leave = weakref.finalize(self, _give_back, self._recorders, self._teachers)
        # A build that fails half-way must leave no hook and no frozen teacher behind.
        try:
            self._attach("student", student, example)
            if teacher is not None:
                self._attach("teacher", teacher, example)
                self._teachers.append(FrozenTeacher(teacher))
            self._try_out(teacher, example)
        except BaseException:
            self.close()
            raise

    def _attach(self, role: str, model: nn.Module, example: Image | None) -> None:
        wanted = {name: getattr(tap, role) for name, tap in self.taps.items()}
        located = [tap for tap, layer in wanted.items() if layer is None]
        if located and example is None:
            raise LayerNotFoundError(
                f"Tap '{located[0]}': no layer of the {role} is named, and without an example the "
                "bottleneck cannot be located. Pass example=torch.zeros(1, C, *spatial) to the "
                "wrapper, or name the layers."
            )
        image = None if example is None else self._view(role, example)
        names, self._notes[role] = dry_run.layer_names(model, wanted, image, role)
        for tap, name in names.items():
            # by name from here on: a layer kept here would drag its network into every copy
            old = self.taps[tap]
            self.taps[tap] = (
                replace(old, student=name) if role == "student" else replace(old, teacher=name)
            )
        self._recorders[role] = Recorder(model, names, role=role)
        if example is None:
            # Without a dry run nothing tells which layers are overwritten in place.
            self._recorders[role].cloned.update(names)

    def _view(self, role: str, image: Image) -> Tensor:
        views = self.inputs
        return plain(views.for_teacher(image) if role == "teacher" else views.for_student(image))

    def _try_out(self, teacher: nn.Module | None, example: Image | None) -> None:
        """Run both networks once; build adapters and compare shapes."""
        if example is None:
            self._demand_plain_taps()
            return
        view = self._view("student", example)
        recorder = self._recorders["student"]
        mine = dry_run.run(self.student, view, recorder, self.select_logits)
        # Train mode may take other paths than eval mode: auxiliary heads, in-place dropout.
        training = dry_run.run(self.student, view, recorder, self.select_logits, training=True)
        if self.select_logits is first_logits:
            check_single_head(training, mine)
        if teacher is None:
            return
        compared = self.objective.needs_teacher_logits
        select = self.select_logits if compared else None
        seen = self._view("teacher", example)
        theirs = dry_run.run(teacher, seen, self._recorders["teacher"], select)
        for tap in self.taps:
            self._fit(tap, mine.features[tap], theirs.features[tap])
        if compared:
            check_logits(mine.logits, theirs.logits)

    def _demand_plain_taps(self) -> None:
        for name, tap in self.taps.items():
            if tap.adapter == "auto":
                raise ObjectiveError(
                    f"Tap '{name}': whether an adapter is needed cannot be told without an "
                    "example. Pass example=torch.zeros(1, C, *spatial) to the wrapper, or "
                    "Tap(..., adapter=None) where both layers have the same shape."
                )
            if isinstance(tap.adapter, nn.Module) and name in self.objective.taps:
                self.adapters[name] = tap.adapter

    def _fit(self, name: str, student: Tensor, teacher: Tensor) -> None:
        self._shapes[name] = {"student": tuple(student.shape), "teacher": tuple(teacher.shape)}
        if name not in self.objective.taps:
            # Recorded for the user's own eyes; an adapter that no term trains would stall DDP.
            return
        adapter = self.taps[name].adapter
        if adapter == "auto":
            adapter = build_adapter(name, student.shape, teacher.shape)
        if adapter is not None:
            adapter.to(student.device, student.dtype)
        # An identity is kept out of the tree, so that equal networks add no key to checkpoints.
        if adapter is not None and not isinstance(adapter, nn.Identity):
            self.adapters[name] = adapter
            with torch.no_grad(), dry_run.restored(adapter):
                student = adapter(student)
        check_equal(name, student.shape, teacher.shape, adapter)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, or None."""
        return self._teachers[0].module if self._teachers else None

    def forward(self, image: Image, target: Tensor | None = None) -> Output:
        """Run both networks and compute the objective.

        Args:
            image: The full input: `(B, C, *spatial)` with every modality, or a mapping by name.
            target: Reference, one-hot or regions `(B, C, *spatial)`, or a label map
                `(B, *spatial)`; may be None where no term reads it.

        Returns:
            Loss, terms, logits and taps of this step.

        Raises:
            LifecycleError: After `close()`, or if a tap did not fire or carries no gradient.
            ShapeMismatchError: If features, logits or target do not fit.
            ModalityError: If the input does not carry the modalities named.
            ObjectiveError: If a term misses what it reads.
        """
        if self._closed:
            raise LifecycleError(
                "Cannot run a distillation step, as the wrapper has been closed. Build a new one; "
                "predict() still works."
            )
        # Taken before the teacher runs, which might edit its input in place.
        view = self._view("student", image)
        teacher_output, teacher_features = self._run_teacher(image)
        with self._recorders["student"].recording() as features:
            logits = self.select_logits(self.student(view))
        self._check_captures("student", features)
        check_batch(logits)
        step = Step(
            student=logits,
            teacher=teacher_output,
            target=None if target is None else plain(target),
            taps=self._pair(features, teacher_features),
            activation=self.activation,
            index=self.steps.clone(),
            validate=self._must_validate(),
        )
        loss, terms = self.objective(step)
        self._validated = True
        # Validation passes must not move schedules that follow the step.
        if self.training:
            self.steps += 1
        return Output(loss, terms, logits, teacher_output, step.taps)

    def _run_teacher(self, image: Image) -> tuple[Tensor | None, dict[str, Tensor]]:
        wanted = self.objective.needs_teacher_logits
        if not self._teachers or not (wanted or self.taps):
            return None, {}
        with torch.no_grad(), self._recorders["teacher"].recording() as features:
            output = self._teachers[0](self._view("teacher", image))
        self._check_captures("teacher", features)
        # Without a term that reads them, the logits may have another form or number of classes.
        return (self.select_logits(output) if wanted else None), features

    def _check_captures(self, role: str, features: dict[str, Tensor]) -> None:
        recorder = self._recorders[role]
        recorder.check(features)
        for tap in recorder.corrupted(features):
            raise LifecycleError(
                f"Tap '{tap}': a layer behind '{recorder.names[tap]}' of the {role} changed its "
                "output in place after it was captured, which the dry run did not show. Pass an "
                "example of the training size to the wrapper, or set inplace=False there."
            )
        if role == "student" and self.training and torch.is_grad_enabled():
            check_gradients(recorder, features)

    def _pair(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, TapPair]:
        pairs = {}
        for tap, wanted in teacher.items():
            features = student[tap]
            adapter = self.adapters[tap] if tap in self.adapters else None  # noqa: SIM401
            if adapter is not None:
                features = adapter(features)
            if tap in self.objective.taps:
                check_equal(tap, features.shape, wanted.shape, adapter)
            pairs[tap] = TapPair(features, wanted)
        return pairs

    def _must_validate(self) -> bool:
        return self.validate == "always" or (self.validate == "first" and not self._validated)

    def predict(self, image: Image) -> Tensor:
        """Run the student alone, in eval mode.

        Works without the teacher and after `close()`; follows the caller's grad mode; training
        flags are restored.

        Args:
            image: The full input, the student's view alone, or a mapping by modality name.

        Returns:
            Logits, `(B, C, *spatial)`.

        Raises:
            ModalityError: If the input carries other modalities.
        """
        view = self._view("student", image)
        # Flags are kept module by module: a user may have frozen some batch norms in eval mode.
        modes = {module: module.training for module in self.student.modules()}
        self.student.eval()
        try:
            return self.select_logits(self.student(view))
        finally:
            for module, mode in modes.items():
                module.training = mode

    def close(self) -> None:
        """Remove every hook and give both networks back as they came; safe to call twice."""
        self._leave()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .half() and .cuda() end here; the teacher is no submodule but must come along
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for teacher in self._teachers:
            teacher.apply(fn, recurse=recurse)
        return self

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """Move the student to a device without copying values; the teacher keeps its weights.

        Args:
            device: Where to.
            recurse: Whether submodules are moved too.

        Returns:
            The wrapper.
        """
        super()._apply(lambda t: torch.empty_like(t, device=device), recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistillationWrapper":
        """Copy the student with hooks of its own; the teacher is shared, not copied."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        apart = {"_recorders", "_teachers", "_leave"}
        for name in self.__dict__.keys() - apart:
            twin.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        recorders = {"student": copy.deepcopy(self._recorders["student"], memo)}
        teachers = []
        if self._teachers and not self._closed:
            # Another holder, which must not move the teacher under the original.
            teachers = [FrozenTeacher(self._teachers[0].module, moves=False)]
            recorders["teacher"] = self._recorders["teacher"].twin(teachers[0].module)
        twin.__dict__ |= {"_recorders": recorders, "_teachers": teachers}
        twin.__dict__["_leave"] = weakref.finalize(twin, _give_back, recorders, teachers)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_leave"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._leave = weakref.finalize(self, _give_back, self._recorders, self._teachers)

    def _replicate_for_data_parallel(self) -> Self:
        raise LifecycleError(
            "DataParallel copies the student for every batch, which no hook survives. Use "
            "DistributedDataParallel, one process per device."
        )

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}{' (closed)' * self._closed}", f"  inputs: {self.inputs}"]
        lines += [f"  activation: {self.activation}", f"  objective: {self.objective}"]
        rows: list[tuple[str, ...]] = [("tap", "network", "layer", "shape", "adapter")]
        for tap in self.taps:
            rows += self._tap_rows(tap)
        return "\n".join(lines + columns(rows) * (len(rows) > 1) + self._remarks())

    def _tap_rows(self, tap: str) -> list[tuple[str, ...]]:
        adapter = short(self.adapters[tap]) if tap in self.adapters else "none"
        shapes = self._shapes.get(tap, {})
        return [
            (
                tap if role == "student" else "",
                role,
                recorder.names[tap],
                " x ".join(map(str, shapes[role][1:])) if role in shapes else "not run yet",
                adapter if role == "student" else "",
            )
            for role, recorder in self._recorders.items()
        ]

    def _remarks(self) -> list[str]:
        return [
            f"  {role} {tap}: {note}"
            for role, notes in self._notes.items()
            for tap, note in notes.items()
        ]


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay rows out in columns of equal width.

    Args:
        rows: Cells; the first row is the heading.

    Returns:
        One indented line per row.

    Example:
        >>> columns([("tap", "layer"), ("bottleneck", "down4")])
        ['  tap         layer', '  bottleneck  down4']
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [f"  {line.rstrip()}" for line in padded]


def _give_back(recorders: Mapping[str, Recorder], teachers: Sequence[FrozenTeacher]) -> None:
    for recorder in recorders.values():
        recorder.remove()
    for teacher in teachers:
        teacher.release()
