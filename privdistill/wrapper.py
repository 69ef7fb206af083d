"""`DistillationWrapper`: teacher and student as one trainable module."""

import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from privdistill import dry_run
from privdistill.checks import (
    check_gradients,
    check_heads,
    check_networks,
    check_same_views,
    check_view,
    feature_map,
    input_views,
    tap_table,
)
from privdistill.exceptions import (
    LayerNotFoundError,
    LifecycleError,
    ModalityError,
    ObjectiveError,
    ShapeMismatchError,
)
from privdistill.inputs import Image, InputViews, PrivilegedInput, plain
from privdistill.losses import Objective, Term, as_objective
from privdistill.losses.base import check_choice
from privdistill.losses.functional import Activation
from privdistill.losses.heads import check_head_weights, head_weights, steps_by_head
from privdistill.output import Output, Step, TapPair, find_heads
from privdistill.taps import (
    Layer,
    Recorder,
    Tap,
    as_layer,
    brief,
    build_adapter,
    check_equal,
    short,
)
from privdistill.teachers import (
    FrozenTeacher,
    MovingAverage,
    Teacher,
    hold,
    members,
    several_processes,
    shares,
)
from privdistill.text import columns

Validation = Literal["first", "always", "never"]


class DistillationWrapper(nn.Module):
    """Train a student with the logits and features of a teacher that may see more.

    Hooks capture one or more layer pairs of two networks that know nothing of each other; the
    objective turns them, the logits and the target into a loss. The student stays the very module
    that was passed in, and `close()` gives both networks back as they came.

    Args:
        teacher: A trained network; frozen and put into eval mode. Several as a list or `Ensemble`;
            a `MovingAverage` of the student; a `JointTeacher` that is trained too. None is allowed
            where the objective reads nothing of a teacher, so that a baseline trains through the
            same code.
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
        select_logits: Function from a network's output to its logits, or to a list of them; by
            default tensors, tuples, lists, mappings with "out" and objects with `.logits` are
            understood.
        head_weights: Under deep supervision, the weight of each head, finest first, scaled to sum
            to one; by default each weighs half of the one before it. Each head is compared with
            the teacher at its own resolution, and with the target at the target's.

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
        teacher: Teacher | None,
        student: nn.Module,
        *,
        objective: Term | Objective,
        inputs: InputViews | None = None,
        taps: Mapping[str, Tap] | None = None,
        activation: Activation = "softmax",
        example: Image | None = None,
        validate: Validation = "first",
        select_logits: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
        head_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice("DistillationWrapper", "activation", activation, ("softmax", "sigmoid"))
        check_choice("DistillationWrapper", "validate", validate, ("first", "always", "never"))
        self.objective = as_objective(objective)
        self.activation: Activation = activation
        self.validate = validate
        self.inputs = input_views(inputs)
        self.select_logits = select_logits
        self.head_weights = head_weights
        self._validated = False
        self._closed = False
        #: Whether a pickle of the wrapper holds the teacher too.
        self.pickles_teacher = True
        if isinstance(teacher, MovingAverage):
            check_same_views(self.inputs)
        teachers = members(teacher, student)
        check_networks(teachers, student, self.objective)
        self.taps = tap_table(taps or {}, self.objective.taps, len(teachers))
        self._shares = shares(teacher, len(teachers))
        self._build(teacher, teachers, student, example)

    def _build(
        self,
        declared: Teacher | None,
        teachers: list[nn.Module],
        student: nn.Module,
        example: Image | None,
    ) -> None:
        self.student = student
        weight = next(student.parameters(), None)
        # A tensor, since a number would be a new constant for torch.compile in every step; with the
        # student, since NCCL synchronises no buffer on the CPU.
        steps = torch.zeros((), dtype=torch.long, device=None if weight is None else weight.device)
        self.register_buffer("steps", steps)
        self.adapters = nn.ModuleDict()
        self._teachers: list[FrozenTeacher] = []
        self._recorders: dict[str, Recorder] = {}
        self._notes: dict[str, dict[str, str]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._heads: tuple[tuple[int, ...], ...] = ()
        self._seen: dict[str, tuple[int, ...]] = {}
        # Also at the end of the wrapper's life: a notebook cell run twice must not pile up hooks.
        self._leave = weakref.finalize(self, _give_back, self._recorders, self._teachers)
        # A build that fails half-way must leave no hook and no frozen teacher behind.
        try:
            self._attach("student", student, example, None)
            for index, teacher in enumerate(teachers):
                self._attach(_role(index), teacher, example, index)
                self._teachers.append(hold(cast("Teacher", declared), teacher))
                self._teachers[-1].train(self.training)
            self._try_out(example)
        except BaseException:
            self.close()
            raise

    def _attach(
        self, role: str, model: nn.Module, example: Image | None, network: int | None
    ) -> None:
        wanted = self._places(network)
        located = [tap for tap, place in wanted.items() if place.layer is None]
        if located and example is None:
            raise LayerNotFoundError(
                f"Tap '{located[0]}': no layer of the {role} is named, and without an example the "
                "bottleneck cannot be located. Pass example=torch.zeros(1, C, *spatial) to the "
                "wrapper, or name the layers."
            )
        image = None if example is None else self._view(role, example)
        if image is not None:
            check_view(image, role, None)
            self._seen[role] = tuple(image.shape)
        places, self._notes[role] = dry_run.find_places(model, wanted, image, role)
        for tap, place in places.items():
            # by name from here on: a layer kept here would drag its network into every copy
            old, kept = self.taps[tap], brief(place)
            self.taps[tap] = (
                replace(old, student=kept) if network is None else replace(old, teacher=kept)
            )
        self._recorders[role] = Recorder(model, places, role=role)
        if example is None:
            # Without a dry run nothing tells which layers are overwritten in place.
            self._recorders[role].cloned.update(places)
            self._recorders[role].edits_input = True

    def _places(self, network: int | None) -> dict[str, Layer]:
        """Layers of the student (None) or of one teacher, by tap name."""
        if network is None:
            return {name: as_layer(tap.student) for name, tap in self.taps.items()}
        teachers = {name: as_layer(tap.teacher) for name, tap in self.taps.items()}
        return {name: place for name, place in teachers.items() if place.network == network}

    def _view(self, role: str, image: Image, present: Tensor | None = None) -> Tensor:
        if present is not None and not isinstance(self.inputs, PrivilegedInput):
            raise ModalityError(
                "`present` says which modalities each sample has, but the wrapper knows none. Pass "
                "`inputs=PrivilegedInput(modalities=..., student=...)` to it."
            )
        views: Any = self.inputs
        view = views.for_student if role == "student" else views.for_teacher
        # Views of the user's own need not know of masks.
        return plain(view(image) if present is None else view(image, present))

    def _student_view(self, image: Image, present: Tensor | None) -> Tensor:
        if self.training and isinstance(self.inputs, PrivilegedInput) and self.inputs.dropout:
            return self.inputs.for_training(image, present)
        return self._view("student", image, present)

    def _select(self, output: Any, axes: int) -> list[Tensor]:
        if self.select_logits is None:
            return find_heads(output, axes)
        chosen = self.select_logits(output)
        heads = [chosen] if isinstance(chosen, Tensor) else list(chosen or ())
        if not heads or not all(isinstance(head, Tensor) and head.ndim > 2 for head in heads):
            raise ShapeMismatchError(
                f"`select_logits` gave {_shown(chosen)}; expected logits (B, C, *spatial), or a "
                "list of them, finest first."
            )
        return heads

    def _try_out(self, example: Image | None) -> None:
        """Run all networks once; build adapters and compare shapes."""
        if example is None:
            self._demand_plain_taps()
            return
        view = self._view("student", example)
        recorder = self._recorders["student"]
        mine = dry_run.run(self.student, view, recorder, self._select)
        # Train mode may take other paths than eval mode: auxiliary heads, in-place dropout.
        training = dry_run.run(self.student, view, recorder, self._select, training=True)
        self._heads = training.heads
        check_head_weights(self.head_weights, len(training.heads))
        compared = self.objective.needs_teacher_logits
        theirs = [
            dry_run.run(
                teacher.module,
                self._view(role, example),
                self._recorders[role],
                self._select if compared else None,
            )
            for role, teacher in self._roles()
        ]
        for tap in self.taps:
            if theirs:
                index = as_layer(self.taps[tap].teacher).network
                self._fit(
                    tap,
                    self._map("student", tap, mine),
                    self._map(_role(index), tap, theirs[index]),
                )
        if compared:
            check_heads(mine.heads, [trial.heads for trial in theirs])

    def _roles(self) -> Iterator[tuple[str, FrozenTeacher]]:
        for index, teacher in enumerate(self._teachers):
            yield _role(index), teacher

    def _map(self, role: str, tap: str, trial: dry_run.Trial) -> Tensor:
        if tap not in self.objective.taps:
            return trial.features[tap]
        layer = self._recorders[role].places[tap]
        return feature_map(trial.features[tap], trial.spatial, tap=tap, layer=layer)

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
        """The teacher, the first of several, or None."""
        return self._teachers[0].module if self._teachers else None

    def teacher_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of a teacher that was declared to change.

        Returns:
            Those of a `JointTeacher`, for an optimizer, or of a `MovingAverage`.

        Raises:
            LifecycleError: If the teacher is frozen, or there is none.

        Example:
            >>> from torch import nn
            >>> from privdistill import DistillationWrapper, GroundTruth, JointTeacher
            >>> objective = GroundTruth() + GroundTruth(of="teacher").named("teacher")
            >>> teacher = JointTeacher(nn.Conv2d(1, 2, 1))
            >>> kd = DistillationWrapper(teacher, nn.Conv2d(1, 2, 1), objective=objective)
            >>> parameters = [*kd.parameters(), *kd.teacher_parameters()]
        """
        owned = [teacher for teacher in self._teachers if teacher.owned]
        if not owned:
            raise LifecycleError(
                "The teacher is frozen and has nothing to train. A teacher that learns is declared "
                "as such: DistillationWrapper(JointTeacher(network), student, ...)."
            )
        return (parameter for teacher in owned for parameter in teacher.module.parameters())

    def forward(
        self, image: Image, target: Tensor | None = None, *, present: Tensor | None = None
    ) -> Output:
        """Run all networks and compute the objective.

        Args:
            image: The full input: `(B, C, *spatial)` with every modality, or a mapping by name.
            target: Reference, one-hot or regions `(B, C, *spatial)`, or a label map
                `(B, *spatial)`; may be None where no term reads it.
            present: Which of the modalities each sample has, boolean `(B, modalities)`; the others
                are filled as `PrivilegedInput(fill=...)` says. All of them unless given.

        Returns:
            Loss, terms, logits and taps of this step.

        Raises:
            LifecycleError: After `close()`, or if a tap did not fire or carries no gradient.
            ShapeMismatchError: If features, logits or target do not fit.
            ModalityError: If the input does not carry the modalities named.
            ObjectiveError: If a term misses what it reads.
        """
        self._check_ready()
        if several_processes() and not self._validated:
            _check_synchronised(self.student, self.adapters)
        # Taken before the teacher runs, which might edit its input in place.
        view = self._student_view(image, present)
        check_view(view, "student", self._seen.get("student"))
        if self._counts():
            for teacher in self._teachers:
                teacher.follow(self.student, self.steps)
        taught, features = self._run_teachers(image, present)
        with self._recorders["student"].recording() as captured:
            editing = self._recorders["student"].edits_input
            output = self.student(view.clone() if editing else view)
            heads = self._select(output, view.ndim - 2)
        mine = self._check_captures("student", captured, view)
        pairs = self._pair(mine, features)
        common = Step(
            student=heads[0],
            target=None if target is None else plain(target),
            taps=pairs,
            activation=self.activation,
            index=self.steps.clone(),
            validate=self._must_validate(),
        )
        shared = list(zip(taught, self._shares, strict=True)) if taught else []
        steps = steps_by_head(common, heads, shared, self.activation)
        loss, terms = self.objective(steps[0], self._weighted(steps))
        self._validated = True
        if self._counts():
            self.steps += 1
        if len(steps) == 1:
            return Output(loss, terms, heads[0], steps[0].teacher, pairs)
        teachers = [step.teacher for step in steps if step.teacher is not None]
        return Output(loss, terms, heads, teachers or None, pairs)

    def _counts(self) -> bool:
        """Whether this is a training step; validation must not move schedules and averages."""
        return self.training and torch.is_grad_enabled()

    def _weighted(self, steps: list[Step]) -> list[tuple[float, Step]]:
        if len(steps) == 1:
            return []
        return list(zip(head_weights(self.head_weights, len(steps)), steps, strict=True))

    def _check_ready(self) -> None:
        if self._closed:
            raise LifecycleError(
                "Cannot run a distillation step, as the wrapper has been closed. Build a new one; "
                "predict() still works."
            )
        if len(self._teachers) < len(self._shares):
            raise LifecycleError(
                "Cannot run a distillation step, as the wrapper was pickled without its teacher. "
                "Build a new one with the teacher and this one's student; predict() still works."
            )

    def _run_teachers(
        self, image: Image, present: Tensor | None
    ) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
        """Heads of each teacher whose logits are read, and the features of all."""
        wanted = self.objective.needs_teacher_logits
        taught: list[list[Tensor]] = []
        features: dict[str, Tensor] = {}
        for role, teacher in self._roles():
            recorder = self._recorders[role]
            if not (wanted or recorder.places):
                continue
            with teacher.grad_mode(), recorder.recording() as captured:
                view = self._view(role, image, present)
                check_view(view, role, self._seen.get(role))
                output = teacher(view.clone() if recorder.edits_input else view)
            features |= self._check_captures(role, captured, view)
            # Without a term that reads them, the logits may have another form or class count.
            if wanted:
                taught.append(self._select(output, view.ndim - 2))
            if wanted and teacher.learns and len(taught[-1]) > 1:
                raise ObjectiveError(
                    f"The JointTeacher returns {len(taught[-1])} heads, of which only the first "
                    "would be trained. Switch its deep supervision off, or choose a head with "
                    "`select_logits=`."
                )
        return taught, features

    def _check_captures(
        self, role: str, features: dict[str, Tensor], view: Tensor
    ) -> dict[str, Tensor]:
        """Check what was captured, and read as maps what terms compare."""
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
        read = self.objective.taps
        spatial = view.shape[2:]
        return {
            tap: feature_map(value, spatial, tap=tap, layer=recorder.places[tap])
            if tap in read
            else value
            for tap, value in features.items()
        }

    def _pair(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, TapPair]:
        pairs = {}
        for tap, wanted in teacher.items():
            features = student[tap]
            adapter = self.adapters[tap] if tap in self.adapters else None  # noqa: SIM401
            if adapter is not None:
                features = adapter(features)
            if tap in self.objective.taps:
                check_equal(tap, features.shape, wanted.shape, adapter)
            # A teacher that learns does so from terms that ask for it, never from a distance.
            pairs[tap] = TapPair(features, wanted.detach())
        return pairs

    def _must_validate(self) -> bool:
        return self.validate == "always" or (self.validate == "first" and not self._validated)

    def predict(self, image: Image, *, present: Tensor | None = None) -> Tensor:
        """Run the student alone, in eval mode.

        Works without the teacher and after `close()`; follows the caller's grad mode; training
        flags are restored.

        Args:
            image: The full input, the student's view alone, or a mapping by modality name.
            present: Which of the modalities each sample has, as in the step.

        Returns:
            Logits, `(B, C, *spatial)`; of several heads the finest.

        Raises:
            ModalityError: If the input carries other modalities.
            ShapeMismatchError: If the view is no image, or not like the example.
            LifecycleError: If the wrapper is sharded and FSDP was not told of this method.
        """
        self._check_gathered()
        view = self._view("student", image, present)
        check_view(view, "student", self._seen.get("student"))
        # Flags are kept module by module: a user may have frozen some batch norms in eval mode.
        modes = {module: module.training for module in self.student.modules()}
        self.student.eval()
        try:
            return self._select(self.student(view), view.ndim - 2)[0]
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _check_gathered(self) -> None:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        # Registering a method replaces it on the instance.
        if fsdp and isinstance(self, fsdp.FSDPModule) and "predict" not in vars(self):
            raise LifecycleError(
                "The wrapper is sharded by FSDP, which gathers weights for forward() alone. Call "
                "torch.distributed.fsdp.register_fsdp_forward_method(kd, 'predict') right after "
                "fully_shard(kd)."
            )

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
        teachers: list[FrozenTeacher] = []
        for role, teacher in self._roles() if not self._closed else ():
            if teacher.owned:
                teachers.append(copy.deepcopy(teacher, memo))
                recorders[role] = copy.deepcopy(self._recorders[role], memo)
            else:
                # Another holder, which must not move the teacher under the original.
                teachers.append(FrozenTeacher(teacher.module, moves=False))
                recorders[role] = self._recorders[role].twin(teacher.module)
        twin.__dict__ |= {"_recorders": recorders, "_teachers": teachers}
        twin.__dict__["_leave"] = weakref.finalize(twin, _give_back, recorders, teachers)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_leave"}
        if not self.pickles_teacher:
            state |= {"_teachers": [], "_recorders": {"student": self._recorders["student"]}}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._leave = weakref.finalize(self, _give_back, self._recorders, self._teachers)

    def train(self, mode: bool = True) -> Self:
        """Set the student's and the adapters' mode; a frozen teacher stays in eval mode.

        Args:
            mode: Train mode, or eval mode.

        Returns:
            The wrapper.
        """
        super().train(mode)
        for teacher in self._teachers:
            teacher.train(mode)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for teacher in self._teachers:
            if teacher.owned:
                inner = f"{prefix}teacher."
                teacher.module.state_dict(
                    destination=destination, prefix=inner, keep_vars=keep_vars
                )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for teacher in self._teachers:
            if teacher.owned:
                inner = f"{prefix}teacher."
                keys = [key for key in state_dict if key.startswith(inner)]
                own = {key.removeprefix(inner): state_dict.pop(key) for key in keys}
                *_, missing, unexpected, _errors = rest
                loaded = teacher.module.load_state_dict(own, strict=False)
                missing += [inner + key for key in loaded.missing_keys]
                unexpected += [inner + key for key in loaded.unexpected_keys]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _replicate_for_data_parallel(self) -> Self:
        raise LifecycleError(
            "DataParallel copies the student for every batch, which no hook survives. Use "
            "DistributedDataParallel, one process per device."
        )

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}{' (closed)' * self._closed}", f"  inputs: {self.inputs}"]
        lines += [f"  activation: {self.activation}", f"  objective: {self.objective}"]
        lines += self._head_rows()
        rows: list[tuple[str, ...]] = [("tap", "network", "layer", "shape", "adapter")]
        for tap in self.taps:
            rows += self._tap_rows(tap)
        return "\n".join(lines + columns(rows) * (len(rows) > 1) + self._remarks())

    def _head_rows(self) -> list[str]:
        if len(self._heads) < 2:
            return []
        weights = head_weights(self.head_weights, len(self._heads))
        sizes = [" x ".join(map(str, head[2:])) for head in self._heads]
        listed = ", ".join(f"{w:.3g} ({size})" for w, size in zip(weights, sizes, strict=True))
        return [f"  deep supervision, weight of each head: {listed}"]

    def _tap_rows(self, tap: str) -> list[tuple[str, ...]]:
        adapter = short(self.adapters[tap]) if tap in self.adapters else "none"
        shapes = self._shapes.get(tap, {})
        return [
            (
                tap if role == "student" else "",
                role,
                str(recorder.places[tap]),
                " x ".join(map(str, shape[1:]))
                if (shape := shapes.get(role.split()[0]))
                else "not run yet",
                adapter if role == "student" else "",
            )
            for role, recorder in self._recorders.items()
            if tap in recorder.places
        ]

    def _remarks(self) -> list[str]:
        return [
            f"  {role} {tap}: {note}"
            for role, notes in self._notes.items()
            for tap, note in notes.items()
        ]


def _give_back(recorders: Mapping[str, Recorder], teachers: Sequence[FrozenTeacher]) -> None:
    for recorder in recorders.values():
        recorder.remove()
    # Backwards, so that of teachers that share a layer the first remembers how it came.
    for teacher in reversed(teachers):
        teacher.release()


def _check_synchronised(student: nn.Module, adapters: nn.ModuleDict) -> None:
    """Refuse adapters that each process would train on its own, in silence."""
    mark = "_is_fsdp_managed_module"
    ddp = nn.parallel.DistributedDataParallel
    apart = any(isinstance(module, ddp) or hasattr(module, mark) for module in student.modules())
    trained = [m for m in adapters.modules() if next(m.parameters(recurse=False), None) is not None]
    if apart and not all(hasattr(module, mark) for module in trained):
        raise LifecycleError(
            f"Only the student was given to DistributedDataParallel or FSDP, so the adapters "
            f"{list(adapters)} would differ between processes. Build the wrapper from the plain "
            "student, then call DistributedDataParallel(kd) or fully_shard(kd)."
        )


def _role(index: int) -> str:
    return "teacher" if index == 0 else f"teacher {index + 1}"


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
