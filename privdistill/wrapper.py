"""`DistillationWrapper`: teacher and student as one trainable module."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from privdistill import parallel
from privdistill.cache import TeacherCache
from privdistill.exceptions import LifecycleError, ObjectiveError
from privdistill.inherit import Inheritance, inherit
from privdistill.inputs import Image, InputViews, Presence, as_views, plain, view_of
from privdistill.losses.functional import Activation
from privdistill.losses.objective import Objective, Term, as_objective, copied
from privdistill.losses.options import check, listed, one_of
from privdistill.losses.targets import weights_of_samples
from privdistill.sides import heads, summary, teachers, trial
from privdistill.sides.cached import CachedSide, asked_of, check_cache
from privdistill.sides.frozen import Frozen
from privdistill.sides.restored import modes_kept, set_mode
from privdistill.sides.side import Answer, TeacherSide, check_view
from privdistill.sides.teachers import JointTeacher, MovingAverage, Teacher
from privdistill.step import Output, Step
from privdistill.taps.location import HeadFinder
from privdistill.taps.pairing import Pairing
from privdistill.taps.tap import Tap, TapPairs, tap_table

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
        objective: A term or a weighted sum of terms. It is copied with all that its terms hold:
            a criterion's parameters are trained by an optimizer over `kd.parameters()`.
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
        cache: Keeps what a frozen teacher returns for the samples that steps name by `key=`.
        start: "teacher" lets the student start from the weights of the teacher, the first of
            several, as `inherit` does; `kd.inherited` says what it took.

    Raises:
        LayerNotFoundError: If a tap's layer does not exist or no bottleneck can be told.
        ShapeMismatchError: If features or logits of the two networks do not fit, or the student is
            to start from a teacher of another architecture.
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
    objective: Objective
    steps: Tensor

    def __init__(
        self,
        teacher: Teacher | None,
        student: nn.Module,
        *,
        objective: Term | Objective,
        inputs: InputViews | None = None,
        taps: Mapping[str, Tap | TapPairs] | TapPairs | None = None,
        activation: Activation = "softmax",
        example: Image | None = None,
        validate: Validation = "first",
        select_logits: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
        head_weights: Sequence[float] | None = None,
        cache: TeacherCache | None = None,
        start: Literal["scratch", "teacher"] = "scratch",
    ) -> None:
        super().__init__()
        self.objective = as_objective(objective)
        check("DistillationWrapper", one_of("softmax", "sigmoid"), activation=activation)
        self.activation: Activation = activation
        self.validate = validate
        self.inputs = as_views(inputs)
        self.head_weights = None if head_weights is None else listed(head_weights)
        networks = teachers.networks_of(teacher, student)
        self.cache = check_cache(cache, teacher, networks)
        #: Whether the teacher is trained too.
        self.learns = isinstance(teacher, JointTeacher)
        teachers.check_networks(student, networks, self.learns)
        teachers.check_declared(teacher, self.inputs, self.objective, start)
        self.taps = tap_table(taps, self.objective.taps, networks, student)
        self.student = student
        weight = next(student.parameters(), None)
        # A tensor, since a number would be a new constant for torch.compile in every step; with the
        # student, since NCCL synchronises no buffer on the CPU.
        steps = torch.zeros((), dtype=torch.long, device=None if weight is None else weight.device)
        self.register_buffer("steps", steps)
        self.adapters = nn.ModuleDict()
        self._closed = self._begun = False
        # An average follows the student before the first step, too: weights may have been loaded.
        self._behind = True
        self._decay = teacher.decay if isinstance(teacher, MovingAverage) else None
        # A teacher that changes is an ordinary submodule; only a frozen one hides.
        if isinstance(teacher, MovingAverage | JointTeacher):
            self._modules["teacher"] = networks[0]
        self._shares = teachers.shares_of(teacher, len(networks))
        self._select: HeadFinder = heads.find_heads
        if select_logits is not None:
            self._select = partial(heads.chosen_heads, select_logits)
        views = {}
        if example is not None:
            kinds = ("student", "teacher") if networks else ("student",)
            views = {kind: view_of(self.inputs, kind, example) for kind in kinds}
        #: What the student took from the teacher's weights, if it starts from them.
        self.inherited: Inheritance | None = None
        self._pairing = Pairing(self.taps, self.adapters, trial.channels_of(self.objective))
        # The student, then the teachers.
        self._sides = trial.attach(
            [student, *networks], teacher, self.taps, views,
            objective=self.objective, select=self._select, weights=len(self.head_weights or ()),
        )  # fmt: skip
        self._join()
        try:
            self._head_sizes = trial.try_out(
                self._sides, views, self._pairing, self.objective,
                activation=activation, weights=self.head_weights, shares=self._shares,
            )  # fmt: skip
            if start == "teacher":
                # Last, as it is the one thing that closing could not take back.
                self.inherited = inherit(student, networks[0], self.inputs)
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        """Make two sides of all networks."""
        self._student = self._sides[0]
        self._teacher = TeacherSide(self._sides[1:])
        self._cached = None
        if self.cache is not None:
            asked = asked_of(self.inputs, self._sides[1:], self.objective, self._select)
            self._cached = CachedSide(self._teacher, self.cache, asked)
        self._leave = weakref.finalize(self, trial.give_back, self._sides)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, the first of several, or None."""
        members = self._sides[1:]
        return members[0].network if members else None

    def __setattr__(self, name: str, value: Any) -> None:
        # Until the sides are there, it is the wrapper that is being built.
        built = "_sides" in self.__dict__
        fixed = built and name in ("cache", "taps", "adapters")
        if name == "teacher" or (fixed and value is not getattr(self, name)):
            raise LifecycleError(
                f"The {name} of a wrapper is fixed when the wrapper is built, as are its taps and "
                f"adapters. Build another wrapper with the other {name} and this one's student."
            )
        if name == "inputs":
            value = as_views(value)
        if name == "validate":
            check("DistillationWrapper", one_of("first", "always", "never"), validate=value)
            self._unchecked = value == "first"
        if name == "objective":
            # A copy, so that two wrappers made from one objective never meet.
            value = copied(as_objective(value))
            if built:
                _check_reads(self, value)
        super().__setattr__(name, value)
        if name == "student" and built:
            self._sides[0].run = value

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        """Take a step; see `forward`."""
        if self._behind and self._decay is not None and self.training and torch.is_grad_enabled():
            # Before FSDP gathers any weights, as it forgets what is written to gathered ones.
            if parallel.sharded(self):
                parallel.reshard(self)
            teachers.follow(self.get_submodule("teacher"), self.student, self._decay, self.steps)
            self._behind = False
        output: Output = super().__call__(*args, **kwargs)
        return output

    def forward(
        self,
        image: Image,
        target: Tensor | None = None,
        *,
        present: Presence | None = None,
        labelled: Tensor | Sequence[bool] | None = None,
        sample_weights: Tensor | Sequence[float] | None = None,
        teacher_weights: Tensor | Sequence[Sequence[float]] | None = None,
        key: Sequence[str] | None = None,
        advance: bool = True,
    ) -> Output:
        """Run all networks and compute the objective.

        Args:
            image: The full input: `(B, C, *spatial)` with every modality, or a mapping by name.
            target: Reference, one-hot or regions `(B, C, *spatial)`, or a label map
                `(B, *spatial)`.
            present: Which of the modalities each sample has, boolean `(B, modalities)`; the others
                are filled as `PrivilegedInput(fill=...)` says. All of them unless given.
            labelled: Which samples have a reference, boolean `(B,)`; what `target` holds for the
                others is not read. All of them unless given. Where none has one, `target` may be
                left out: the terms that read it are then, too, and the others teach. Whether that
                is so is looked up in steps that check values, and always where the mask is on the
                CPU, unless `validate` is "never".
            sample_weights: Weight of each sample in terms that read the target, `(B,)`, >= 0.
            teacher_weights: With several teachers, the weight of each one for each sample,
                `(B, teachers)`, >= 0, scaled to sum to one; those of the `Ensemble` unless given.
                Zeros leave a teacher out, such as one that was trained on the sample and says no
                more than the target does.
            key: One text per sample that names it and its augmentation, for the cache; without
                keys, or without a cache, the teacher runs.
            advance: Whether the optimizer takes a step after this call. With accumulated gradients
                the others are micro-batches of the same step: schedules, balanced magnitudes and
                moving averages count steps of the optimizer. Ignored outside of training.

        Returns:
            Loss, terms, logits and taps of this step.

        Raises:
            LifecycleError: After `close()`, or if a tap did not fire or carries no gradient.
            ShapeMismatchError: If features, logits or target do not fit.
            ModalityError: If the input does not carry the modalities named.
            ObjectiveError: If a term misses what it reads.
            CacheError: If a key comes back with another input.

        Example:
            >>> import torch
            >>> from privdistill import GroundTruth
            >>> kd = DistillationWrapper(None, nn.Conv2d(1, 2, 1), objective=GroundTruth())
            >>> optimizer = torch.optim.Adam(kd.parameters())
            >>> batches = [(torch.rand(1, 1, 4, 4), torch.zeros(1, 4, 4).long())] * 8
            >>> for i, (image, target) in enumerate(batches):
            ...     last = i % 4 == 3
            ...     (kd(image, target, advance=last).loss / 4).backward()
            ...     if last:
            ...         optimizer.step()
            ...         optimizer.zero_grad()
            >>> int(kd.steps)
            2
        """
        # In this order, as the compiler would make a new graph when a value that is read changes.
        if parallel.several_processes() and not self._begun:
            self._begun = True
            parallel.check_synchronised(self.student, _beside_the_student(self))
        training = self.training and torch.is_grad_enabled()
        checks = self.validate == "always" or self._unchecked
        # Taken before the teacher runs, which might edit its input in place.
        view = view_of(self.inputs, "student", image, present, training=self.training)
        mask, weights = None, None
        if labelled is not None or sample_weights is not None:
            mask, weights = _of_samples(view, labelled, sample_weights)
        # A mask on the CPU costs nothing to look at.
        if target is None:
            free = self.validate != "never" and mask is not None and mask.is_cpu
            _check_unlabelled(self.objective, mask, checks=checks or free)
        else:
            target = plain(target)
        of_teacher = self.teacher_outputs(image, key=key, present=present)
        answer = self._student(view)
        if training:
            self._student.check_gradients(answer.features)
        pairs = self._pairing(answer.features, of_teacher.features)
        # Fixed when the wrapper was built, unless this step weighs them anew.
        shares: Sequence[float | Tensor] = self._shares
        if teacher_weights is not None:
            weighed = torch.as_tensor(teacher_weights)
            shares = teachers.teacher_shares(weighed, len(shares), view, check=checks)
        common = {
            "image": view,
            "taps": pairs,
            "target": target,
            "labelled": mask,
            "sample_weights": weights,
            "activation": self.activation,
            "student_output": answer.output,
            "index": self.steps.clone(),
            "advance": advance,
            "validate": checks,
        }
        steps = heads.steps_by_head(common, answer.heads[0], of_teacher.heads, shares)
        out = _output(self.objective, self.head_weights, steps)
        if training:
            # Written only where it changes, as the compiler would make a new graph.
            if self._unchecked and _checked(self.objective, target, mask):
                self._unchecked = False
            if advance:
                self.steps.add_(1)
                # Asked first, as the compiler would make a new graph for an attribute that changes.
                if self._decay is not None:
                    self._behind = True
        return out

    def teacher_outputs(
        self, image: Image, *, key: Sequence[str] | None = None, present: Presence | None = None
    ) -> Answer:
        """Return what the teachers say of an input, from the cache where it is known.

        Args:
            image: The full input, as in the step.
            key: One text per sample, as in the step.
            present: Which of the modalities each sample has, as in the step.

        Returns:
            Heads of each teacher whose logits are read, and the features of all by tap name.

        Raises:
            LifecycleError: After `close()`, or if a tap did not fire.
            ModalityError: If the input does not carry the modalities named.
            CacheError: If a key comes back with another input.
        """
        if self._closed:
            raise LifecycleError(
                "Cannot run a distillation step, as the wrapper has been closed. Build a new one "
                "with the teacher and this one's student; predict() still works."
            )
        if not (self._teacher.members and (self.objective.needs_teacher_logits or self.taps)):
            return Answer([], {})
        view = view_of(self.inputs, "teacher", image, present)
        if self._cached is None or key is None:
            return self._teacher(view)
        return self._cached(view, key)

    def predict(self, image: Image, *, present: Presence | None = None) -> Tensor:
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
            LifecycleError: If the wrapper is sharded, FSDP was not told of this method, and the
                weights are not gathered now.
        """
        parallel.check_gathered(self)
        view = view_of(self.inputs, "student", image, present)
        check_view(view, "student", self._student.example)
        # Layers may have been put into eval mode one by one, to be frozen.
        with modes_kept(self.student):
            set_mode(self.student, training=False)
            output = self.student(view.clone() if self._student.recorder.edits_input else view)
            return self._student.select(output, view.ndim - 2)[0]

    def close(self) -> None:
        """Remove every hook and give both networks back as they came; safe to call twice."""
        trial.give_back(self._sides)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .half() and .cuda() end here; a frozen teacher is no submodule but must come along.
        # So does to_empty(), of a module around it too; no file would bring the teacher back.
        empties = getattr(fn, "__qualname__", "").startswith("Module.to_empty")
        from_meta = self.steps.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if empties or from_meta:
            self.steps.zero_()
        for side in self._sides:
            if isinstance(side.run, Frozen) and not empties:
                side.run.apply(fn, recurse=recurse)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all that learns; a frozen teacher and an average stay in eval mode.

        Args:
            mode: Train mode, or eval mode.

        Returns:
            The wrapper.
        """
        self.training = mode
        for child in self.children():
            set_mode(child, training=mode)
        if self._decay is not None:
            self.get_submodule("teacher").eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What `_join` makes anew: a copy, deep or shallow, has hooks of its own.
        joined = ("_leave", "_teacher", "_cached")
        return {name: value for name, value in self.__dict__.items() if name not in joined}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not self._closed:
            self._sides = [side.twin() for side in self._sides]
            self._join()

    def _replicate_for_data_parallel(self) -> Self:
        raise LifecycleError(
            "DataParallel copies the student for every batch, which no hook survives. Use "
            "DistributedDataParallel, one process per device."
        )

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}{' (closed)' * self._closed}", f"  inputs: {self.inputs}"]
        lines += [f"  activation: {self.activation}", f"  objective: {self.objective}"]
        compiled = self._compiled_call_impl is not None
        lines += [summary.network_line(side, compiled=compiled) for side in self._sides]
        if self.inherited is not None:
            lines.append(f"  start: {str(self.inherited).splitlines()[0]}")
        lines += summary.head_lines(self.head_weights, self._head_sizes)
        lines += summary.tap_lines(self.taps, self._sides, self._pairing)
        lines += [f"  cache: {self.cache!r}, {self.cache.statistics}"] if self.cache else []
        return "\n".join(lines)


def _of_samples(
    view: Tensor, labelled: Any, sample_weights: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Which samples are labelled, and their weights, as tensors of one value per sample."""
    given = labelled, sample_weights
    try:
        mask, weights = (None if values is None else torch.as_tensor(values) for values in given)
    except (TypeError, ValueError, RuntimeError) as error:
        wrong = "`labelled` is {!r} and `sample_weights` {!r}; pass one value per sample, or None."
        raise ObjectiveError(wrong.format(*given)) from error
    weights_of_samples(mask, weights, view, "The step", validate=False)
    return mask, weights


def _beside_the_student(kd: DistillationWrapper) -> list[tuple[str, nn.Module]]:
    """What a wrapper trains besides, with names."""
    terms = [(name, term) for name, (_, term) in kd.objective.named_terms.items()]
    teachers = [("teacher", kd.get_submodule("teacher"))] if kd.learns else []
    return [*kd.adapters.items(), *terms, *teachers]


def _output(objective: Objective, given: Sequence[float] | None, steps: Sequence[Step]) -> Output:
    """What a step returns; under deep supervision lists with one entry per head."""
    first = steps[0]
    if len(steps) == 1:
        loss, terms = objective(first)
        return Output(loss, terms, first.student, first.teacher, first.taps)
    weights = heads.head_weights(given, len(steps))
    loss, terms = objective(first, list(zip(weights, steps, strict=True)))
    teachers = [step.teacher for step in steps if step.teacher is not None]
    return Output(loss, terms, [step.student for step in steps], teachers or None, first.taps)


def _check_reads(kd: DistillationWrapper, objective: Objective) -> None:
    """Refuse another objective that reads what the wrapper was not built to give."""
    # By adapters, too: what no term compared got none.
    more = [f"tap '{tap}'" for tap in objective.taps if tap not in kd._pairing.channels]  # noqa: SLF001
    if objective.needs_teacher_logits and not all(side.reads_logits for side in kd._sides):  # noqa: SLF001
        more.append("the teacher's logits")
    if more:
        raise LifecycleError(
            f"The objective, {objective}, reads {', '.join(more)}, and the one that the wrapper "
            "was built with did not. Build another wrapper with this one's networks."
        )


def _check_unlabelled(objective: Objective, labelled: Tensor | None, *, checks: bool) -> None:
    """Refuse a step without a target, unless it is said that no sample has one."""
    if not objective.needs_target:
        return
    if labelled is None or (checks and bool(labelled.any())):
        raise ObjectiveError(
            f"A term of the objective, {objective}, reads the target, and there is none. Pass it, "
            "or say that no sample has one: labelled=torch.zeros(len(image), dtype=torch.bool). In "
            "Lightning or MONAI say where it lies in a batch: names={'target': entry}."
        )


def _checked(objective: Objective, target: Tensor | None, labelled: Tensor | None) -> bool:
    """Whether a step had a target to check."""
    if not objective.needs_target:
        return True
    return target is not None and (labelled is None or bool(labelled.any()))
