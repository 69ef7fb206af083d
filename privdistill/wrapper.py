"""`DistillationWrapper`: teacher and student as one trainable module."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from privdistill import checks, dry_run
from privdistill.apart import load_apart
from privdistill.cache import TeacherCache
from privdistill.cache.fingerprint import Fingerprint, written
from privdistill.exceptions import LifecycleError, ModalityError, ObjectiveError
from privdistill.inputs import Image, InputViews, PrivilegedInput, plain
from privdistill.losses import Objective, Term, as_objective
from privdistill.losses.base import check_choice
from privdistill.losses.functional import Activation
from privdistill.network import Features, Network, TeacherNetwork
from privdistill.step import (
    Output,
    Step,
    TapPair,
    check_head_weights,
    chosen_heads,
    head_weights,
    steps_by_head,
)
from privdistill.taps.pairing import build_adapter, check_equal, resample, short
from privdistill.taps.tap import Tap, as_layer, brief
from privdistill.teachers import (
    Holder,
    MovingAverage,
    Teacher,
    members,
    several_processes,
    shares,
    teacher_shares,
)
from privdistill.text import columns, sizes

Validation = Literal["first", "always", "never"]
Heads = list[Tensor]


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
        cache: Keeps what a frozen teacher returns for the samples that steps name by `key=`.

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
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        check_choice("DistillationWrapper", "activation", activation, ("softmax", "sigmoid"))
        check_choice("DistillationWrapper", "validate", validate, ("first", "always", "never"))
        self.objective = as_objective(objective)
        self.activation: Activation = activation
        self.validate = validate
        self.inputs = checks.input_views(inputs)
        self.select_logits = select_logits
        self.head_weights = head_weights
        self._validated = False
        self._closed = False
        #: Whether a pickle of the wrapper holds the teacher too.
        self.pickles_teacher = True
        if isinstance(teacher, MovingAverage):
            checks.check_same_views(self.inputs)
        teachers = members(teacher, student)
        checks.check_cache(cache, teacher, teachers)
        self.cache = cache
        self._fingerprint: Fingerprint | None = None
        checks.check_networks(teachers, student, self.objective)
        self.taps = checks.tap_table(taps or {}, self.objective.taps, len(teachers))
        self._shares = shares(teacher, len(teachers))
        self.student = student
        weight = next(student.parameters(), None)
        # A tensor, since a number would be a new constant for torch.compile in every step; with the
        # student, since NCCL synchronises no buffer on the CPU.
        steps = torch.zeros((), dtype=torch.long, device=None if weight is None else weight.device)
        self.register_buffer("steps", steps)
        self.adapters = nn.ModuleDict()
        self._head_sizes: list[str] = []
        # The student, then the teachers.
        self._networks: list[Network] = []
        # Also at the end of the wrapper's life: a notebook cell run twice must not pile up hooks.
        self._leave = weakref.finalize(self, _give_back, self._networks)
        # A build that fails half-way must leave no hook and no frozen teacher behind.
        try:
            self._attach(teacher, teachers, example)
        except BaseException:
            self.close()
            raise

    def _attach(
        self, declared: Teacher | None, teachers: list[nn.Module], example: Image | None
    ) -> None:
        sides = ("student", "teacher") if teachers else ("student",)
        views = {} if example is None else {side: self._view(side, example) for side in sides}
        own = {name: as_layer(tap.student) for name, tap in self.taps.items()}
        select = None if self.select_logits is None else partial(chosen_heads, self.select_logits)
        self._networks.append(Network(self.student, own, views.get("student"), select=select))
        places = {name: as_layer(tap.teacher) for name, tap in self.taps.items()}
        for index, teacher in enumerate(teachers):
            layers = {name: place for name, place in places.items() if place.network == index}
            held = TeacherNetwork(
                declared, teacher, layers, views.get("teacher"), index, select=select
            )
            held.holder.train(self.training)
            self._networks.append(held)
        for network in self._networks:
            for tap, place in network.recorder.places.items():
                # by name from here on: a layer kept here would drag its network into every copy
                kept: dict[str, Any] = {network.side: brief(place)}
                self.taps[tap] = replace(self.taps[tap], **kept)
        if views:
            self._try_out(views)
        else:
            self._fit({}, {})

    @property
    def _student(self) -> Network:
        return self._networks[0]

    @property
    def _teachers(self) -> list[TeacherNetwork]:
        return [network for network in self._networks if isinstance(network, TeacherNetwork)]

    def _view(
        self, side: str, image: Image, present: Tensor | None = None, *, training: bool = False
    ) -> Tensor:
        views: Any = self.inputs
        named = isinstance(views, PrivilegedInput)
        if present is not None and not named:
            raise ModalityError(
                "`present` says which modalities each sample has, but the wrapper knows none. Pass "
                "`inputs=PrivilegedInput(modalities=..., student=...)` to it."
            )
        view = views.for_student if side == "student" else views.for_teacher
        if training and named:
            view = views.for_training
        # Views of the user's own need not know of masks.
        return plain(view(image) if present is None else view(image, present))

    def _try_out(self, views: Mapping[str, Tensor]) -> None:
        """Run all networks once; build adapters and what terms need, and compare shapes."""
        read, student = self.objective.taps, self._student
        asked = len(self.head_weights or ()) > 1
        mine = student.try_out(self.student, views["student"], read, asked=asked)
        # Train mode may take other paths than eval mode: auxiliary heads, in-place dropout.
        training = student.try_out(self.student, views["student"], read, training=True, asked=asked)
        check_head_weights(self.head_weights, len(training.heads))
        self._head_sizes = [sizes(head.shape[2:]) for head in training.heads]
        wanted = self.objective.needs_teacher_logits
        theirs = [
            teacher.try_out(teacher.holder.module, views["teacher"], read, heads=wanted)
            for teacher in self._teachers
        ]
        features = {tap: value for trial in theirs for tap, value in trial.features.items()}
        pairs = self._fit(mine.features, features)
        taught = [trial.heads for trial in theirs if trial.heads]
        checks.check_heads(mine.heads[0], [heads[0] for heads in taught])
        # Branches that exist only in training are what a term may want to build upon.
        given = {"student_output": training.output}
        weighed = list(zip(taught, self._shares, strict=True)) if taught else []
        step = self._steps(mine.heads[:1], weighed, mine.image, pairs, given)[0]
        # A term under two names is one module.
        for term in dict.fromkeys(term for _, term in self.objective.named_terms.values()):
            term.build(step)
            term.to(step.student.device)

    def _fit(self, student: Features, teacher: Features) -> dict[str, TapPair]:
        """Add adapters where terms compare features, and pair what the dry run captured."""
        # Other taps are for the user's own eyes; an adapter that no term trains would stall DDP.
        for name in self.objective.taps:
            adapter = self.taps[name].adapter
            if adapter == "auto" and name not in teacher:
                raise ObjectiveError(
                    f"Tap '{name}': whether an adapter is needed cannot be told without an "
                    "example. Pass example=torch.zeros(1, C, *spatial) to the wrapper, or "
                    "Tap(..., adapter=None) where both layers have the same shape."
                )
            if adapter == "auto":
                shapes = student[name].shape, teacher[name].shape
                adapter = build_adapter(name, *shapes, channels=self._equal_channels(name))
            # An identity is kept out of the tree, so that equal networks add no key to checkpoints.
            if adapter is not None and not isinstance(adapter, nn.Identity):
                self.adapters[name] = adapter
                if name in student:
                    adapter.to(student[name].device, student[name].dtype)
        with torch.no_grad(), dry_run.restored(self.adapters):
            return self._pair(student, teacher)

    def _equal_channels(self, tap: str) -> bool:
        """Whether any term that reads a tap compares its features channel by channel."""
        terms = [term for _, term in self.objective.named_terms.values()]
        return any(term.equal_channels for term in terms if tap in term.taps)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, the first of several, or None."""
        return self._teachers[0].holder.module if self._teachers else None

    @property
    def _changing(self) -> Holder | None:
        """Holder of a teacher that changes; of several none does."""
        return next((t.holder for t in self._teachers if t.holder.owned), None)

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
        changing = self._changing
        if changing is None:
            raise LifecycleError(
                "The teacher is frozen and has nothing to train. A teacher that learns is declared "
                "as such: DistillationWrapper(JointTeacher(network), student, ...)."
            )
        return changing.module.parameters()

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the critics that terms bring along.

        Returns:
            Those of every `HolisticAdversarial`, for an optimizer of their own.

        Raises:
            LifecycleError: If no term has a critic, or in several processes.
        """
        return iter(dict.fromkeys(p for term in self._critics() for p in term.critic_parameters()))

    def critic_loss(self, image: Image, out: Output, *, present: Tensor | None = None) -> Tensor:
        """Compute the loss that trains the critics, after the student's own step.

        Args:
            image: The full input, as in the step. The critic sees the student's view of it, whole
                even where modality dropout took a part from the student.
            out: What the step returned; of several heads the finest count.
            present: Which of the modalities each sample has, as in the step.

        Returns:
            A scalar; only critics get gradients from it.

        Raises:
            LifecycleError: If no term has a critic, or in several processes.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from privdistill import DistillationWrapper
            >>> from privdistill.losses import HolisticAdversarial
            >>> term = HolisticAdversarial(nn.Conv2d(2, 1, 1), conditional=False)
            >>> kd = DistillationWrapper(nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), objective=term)
            >>> optimizer = torch.optim.Adam(kd.parameters())
            >>> critic_optimizer = torch.optim.Adam(kd.critic_parameters())
            >>> image = torch.rand(2, 1, 4, 4)
            >>> out = kd(image)
            >>> out.loss.backward(); optimizer.step()
            >>> critic_optimizer.zero_grad()
            >>> kd.critic_loss(image, out).backward(); critic_optimizer.step()
        """
        student, teacher = (
            logits[0] if isinstance(logits, list) else logits
            for logits in (out.student, out.teacher)
        )
        view = self._view("student", image, present)
        losses = [t.critic_loss(student, teacher, view, self.activation) for t in self._critics()]
        return torch.stack(losses).sum()

    def _critics(self) -> list[Any]:
        terms = [term for _, term in self.objective.named_terms.values()]
        # A term under two names has one critic.
        found = [term for term in terms if hasattr(term, "critic_loss")]
        critics = list({id(getattr(term, "critic", term)): term for term in found}.values())
        if not critics:
            raise LifecycleError(
                "No term of the objective has a critic to train. HolisticAdversarial() brings one."
            )
        if several_processes():
            raise LifecycleError(
                "A critic lies outside of what DistributedDataParallel synchronises, so each "
                "process would train another one. Train with HolisticAdversarial in one process."
            )
        return critics

    def forward(
        self,
        image: Image,
        target: Tensor | None = None,
        *,
        present: Tensor | None = None,
        labelled: Tensor | None = None,
        sample_weights: Tensor | None = None,
        teacher_weights: Tensor | None = None,
        key: Sequence[str] | None = None,
    ) -> Output:
        """Run all networks and compute the objective.

        Args:
            image: The full input: `(B, C, *spatial)` with every modality, or a mapping by name.
            target: Reference, one-hot or regions `(B, C, *spatial)`, or a label map
                `(B, *spatial)`. Without one, terms that read it are left out, and the others teach.
            present: Which of the modalities each sample has, boolean `(B, modalities)`; the others
                are filled as `PrivilegedInput(fill=...)` says. All of them unless given.
            labelled: Which samples have a reference, boolean `(B,)`; what `target` holds for the
                others is not read. All of them unless given.
            sample_weights: Weight of each sample in terms that read the target, `(B,)`, >= 0.
            teacher_weights: With several teachers, the weight of each one for each sample,
                `(B, teachers)`, >= 0, scaled to sum to one; those of the `Ensemble` unless given.
                Zeros leave a teacher out, such as one that was trained on the sample and says no
                more than the target does.
            key: One text per sample that names it and its augmentation, for the cache; without
                keys, or without a cache, the teacher runs.

        Returns:
            Loss, terms, logits and taps of this step.

        Raises:
            LifecycleError: After `close()`, or if a tap did not fire or carries no gradient.
            ShapeMismatchError: If features, logits or target do not fit.
            ModalityError: If the input does not carry the modalities named.
            ObjectiveError: If a term misses what it reads.
            CacheError: If a key comes back with another input.
        """
        self._check_ready()
        if several_processes() and not self._validated:
            terms = [(name, term) for name, (_, term) in self.objective.named_terms.items()]
            checks.check_synchronised(self.student, [*self.adapters.items(), *terms])
        # Taken before the teacher runs, which might edit its input in place.
        view = self._view("student", image, present, training=self.training)
        self._student.check(view)
        if self._counts():
            for teacher in self._teachers:
                teacher.holder.follow(self.student, self.steps)
        taught, features = self.teacher_outputs(image, key=key, present=present)
        output, mine = self._student.run(self.student, view, self.objective.taps)
        if self._counts():
            checks.check_gradients(self._student.recorder, mine)
        heads, pairs = self._student.select(output, view.ndim - 2), self._pair(mine, features)
        target = None if target is None else plain(target)
        given = {"target": target, "labelled": labelled, "sample_weights": sample_weights}
        given["student_output"] = output
        shares = teacher_shares(teacher_weights, self._shares, view, check=self._checks_values())
        weighed = list(zip(taught, shares, strict=True)) if taught else []
        steps = self._steps(heads, weighed, view, pairs, given)
        weighted = zip(head_weights(self.head_weights, len(steps)), steps, strict=True)
        loss, terms = self.objective(steps[0], list(weighted) if len(steps) > 1 else [])
        # Read only where it is needed: the compiler would make a new graph when it changes.
        self._validated = self.validate != "first" or self._checked(target, labelled)
        if self._counts():
            self.steps.add_(1)
        if len(steps) == 1:
            return Output(loss, terms, heads[0], steps[0].teacher, pairs)
        teachers = [step.teacher for step in steps if step.teacher is not None]
        return Output(loss, terms, heads, teachers or None, pairs)

    def _steps(
        self,
        heads: Sequence[Tensor],
        taught: Sequence[tuple[Sequence[Tensor], float | Tensor]],
        image: Tensor,
        pairs: dict[str, TapPair],
        given: Mapping[str, Any],
    ) -> list[Step]:
        """One step for each head of the student."""
        common = {
            "image": image,
            "taps": pairs,
            "activation": self.activation,
            "index": self.steps.clone(),
            "validate": self._checks_values(),
            **given,
        }
        return steps_by_head(common, heads, taught, self.activation)

    def _checks_values(self) -> bool:
        """Whether values are checked in this step, for which a GPU waits."""
        return self.validate == "always" or (self.validate == "first" and not self._validated)

    def _checked(self, target: Tensor | None, labelled: Tensor | None) -> bool:
        """Whether this or an earlier step had a target to check."""
        if self._validated or not self.objective.needs_target:
            return True
        return target is not None and (labelled is None or bool(labelled.any()))

    def _counts(self) -> bool:
        """Whether this is a training step; validation must not move schedules and averages."""
        return self.training and torch.is_grad_enabled()

    def _check_ready(self) -> None:
        if self._closed or len(self._teachers) < len(self._shares):
            why = "has been closed" if self._closed else "was pickled without its teacher"
            raise LifecycleError(
                f"Cannot run a distillation step, as the wrapper {why}. Build a new one with the "
                "teacher and this one's student; predict() still works."
            )

    def teacher_outputs(
        self, image: Image, *, key: Sequence[str] | None = None, present: Tensor | None = None
    ) -> tuple[list[Heads], Features]:
        """Return what the teachers say of an input, from the cache where it is known.

        Args:
            image: The full input, as in the step.
            key: One text per sample, as in the step.
            present: Which of the modalities each sample has, as in the step.

        Returns:
            Heads of each teacher whose logits are read, and the features of all by tap name.

        Raises:
            LifecycleError: After `close()`, or if a tap did not fire.
            CacheError: If a key comes back with another input.
        """
        self._check_ready()
        if not self._teachers:
            return [], {}
        view = self._view("teacher", image, present)
        read = self.objective.needs_teacher_logits or self.taps
        if self.cache is None or key is None or not read:
            return self._run_teachers(view)
        # Files, digests and locks are nothing to compile. Imported here as it imports the compiler.
        from privdistill.cache.apart import uncompiled  # noqa: PLC0415

        return uncompiled(self._from_cache, self.cache, view, key)

    def _from_cache(
        self, cache: TeacherCache, view: Tensor, key: Sequence[str]
    ) -> tuple[list[Heads], Features]:
        if self._fingerprint is None:
            self._fingerprint = Fingerprint([t.holder.module for t in self._teachers])
        teacher = self._fingerprint.current(self._asked())
        return _parted(cache.fetch(teacher, key, view, lambda: _named(*self._run_teachers(view))))

    def _asked(self) -> str:
        """What else than its weights decides what a teacher's outputs are."""
        views = self.inputs
        seen = views.teacher if isinstance(views, PrivilegedInput) else type(views).__qualname__
        places = [
            (n.role, tap, str(p)) for n in self._teachers for tap, p in n.recorder.places.items()
        ]
        select = [written(self.select_logits)]
        select += [written(p.select) for n in self._teachers for p in n.recorder.places.values()]
        return repr(
            (seen, places, self.objective.needs_teacher_logits, self.objective.taps, select)
        )

    def _run_teachers(self, view: Tensor) -> tuple[list[Heads], Features]:
        wanted = self.objective.needs_teacher_logits
        taught: list[Heads] = []
        features: Features = {}
        for teacher in self._teachers:
            if not (wanted or teacher.recorder.places):
                continue
            teacher.check(view)
            output, captured = teacher.run(
                teacher.holder, view, self.objective.taps, leave_early=self._stops(teacher)
            )
            features |= captured
            # Without a term that reads them, the logits may have another form or class count.
            if wanted:
                taught.append(teacher.select(output, view.ndim - 2))
            if wanted and teacher.holder.learns and len(taught[-1]) > 1:
                raise ObjectiveError(
                    f"The JointTeacher returns {len(taught[-1])} heads, of which only the first "
                    "would be trained. Switch its deep supervision off, or choose a head with "
                    "`select_logits=`."
                )
        return taught, features

    def _stops(self, teacher: TeacherNetwork) -> bool:
        """Whether nothing behind a teacher's last tap is read."""
        if self.objective.needs_teacher_logits or torch.compiler.is_compiling():
            return False
        return not teacher.runs_on()

    def _pair(self, student: Features, teacher: Features) -> dict[str, TapPair]:
        pairs = {}
        for tap, wanted in teacher.items():
            features = student[tap]
            adapter = self.adapters[tap] if tap in self.adapters else None  # noqa: SIM401
            if adapter is not None:
                features = adapter(features)
            if tap in self.objective.taps and self.taps[tap].adapter == "auto":
                features = resample(features, wanted.shape[2:])
            if tap in self.objective.taps and features.shape != wanted.shape:
                equal = self._equal_channels(tap)
                check_equal(tap, features.shape, wanted.shape, adapter, channels=equal)
            # A teacher that learns does so from terms that ask for it, never from a distance.
            pairs[tap] = TapPair(features, wanted.detach())
        return pairs

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
            LifecycleError: If the wrapper is sharded, FSDP was not told of this method, and the
                weights are not gathered now.
        """
        checks.check_gathered(self)
        view = self._view("student", image, present)
        self._student.check(view)
        with dry_run.modes_kept(self.student):
            self.student.eval()
            return self._student.select(self.student(view), view.ndim - 2)[0]

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
            teacher.holder.apply(fn, recurse=recurse)
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
        """Copy the student with hooks of its own; a frozen teacher is shared, not copied."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self._state(), memo))
        return twin

    def _state(self) -> dict[str, Any]:
        # Hashing the teacher's weights anew costs less than keeping two copies in step.
        kept = {name: value for name, value in self.__dict__.items() if name != "_leave"}
        return kept | {"_fingerprint": None}

    def __getstate__(self) -> dict[str, Any]:
        kept = {} if self.pickles_teacher else {"_networks": [self._student]}
        return self._state() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._leave = weakref.finalize(self, _give_back, self._networks)

    def train(self, mode: bool = True) -> Self:
        """Set the student's and the adapters' mode; a frozen teacher stays in eval mode.

        Args:
            mode: Train mode, or eval mode.

        Returns:
            The wrapper.
        """
        super().train(mode)
        for teacher in self._teachers:
            teacher.holder.train(mode)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._changing is not None:
            module, inner = self._changing.module, f"{prefix}teacher."
            module.state_dict(destination=destination, prefix=inner, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self._changing is not None:
            load_apart(self._changing.module, f"{prefix}teacher.", state_dict, *rest)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _replicate_for_data_parallel(self) -> Self:
        raise LifecycleError(
            "DataParallel copies the student for every batch, which no hook survives. Use "
            "DistributedDataParallel, one process per device."
        )

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}{' (closed)' * self._closed}", f"  inputs: {self.inputs}"]
        lines += [f"  activation: {self.activation}", f"  objective: {self.objective}"]
        if len(self._head_sizes) > 1:
            weights = head_weights(self.head_weights, len(self._head_sizes))
            heads = zip(weights, self._head_sizes, strict=True)
            listed = ", ".join(f"{weight:.3g} ({size})" for weight, size in heads)
            lines.append(f"  deep supervision, weight of each head: {listed}")
        rows = [("tap", "network", "layer", "shape", "adapter")] if self.taps else []
        for tap in self.taps:
            adapter = self._adapter_text(tap)
            student, *teachers = [n.cells(tap) for n in self._networks if tap in n.recorder.places]
            rows.append((tap, *student, adapter))
            rows += [("", *teacher, "") for teacher in teachers]
        notes = [
            f"  {network.role} {tap}: {note}"
            for network in self._networks
            for tap, note in network.notes.items()
        ]
        return "\n".join([*lines, *columns(rows), *notes, *self._on_teachers()])

    def _adapter_text(self, tap: str) -> str:
        """The adapter of a tap, and whether it resamples."""
        adapter = self.adapters[tap] if tap in self.adapters else None  # noqa: SIM401
        if tap not in self.objective.taps or self.taps[tap].adapter != "auto":
            return short(adapter)
        student, teacher = (
            n.shapes.get(tap, ()) for n in self._networks if tap in n.recorder.places
        )
        return short(adapter, student, teacher)

    def _on_teachers(self) -> list[str]:
        """How often and how far the teachers run."""
        lines = [f"  cache: {self.cache!r}, {self.cache.statistics}"] if self.cache else []
        if self.objective.needs_teacher_logits:
            return lines
        for teacher in self._teachers:
            if teacher.recorder.places:
                stops = "stops at its last tap, as no term reads its logits"
                why = teacher.runs_on()
                if self._compiled_call_impl is not None:
                    why = "the wrapper is compiled, and a graph cannot be left half-way"
                lines.append(f"  {teacher.role}: {f'runs to its end, as {why}' if why else stops}")
        return lines


def _give_back(networks: Sequence[Network]) -> None:
    # Backwards, so that of teachers that share a layer the first remembers how it came.
    for network in reversed(networks):
        network.release()


def _named(taught: list[Heads], features: Features) -> dict[str, Tensor]:
    heads = {f"logits.{i}.{j}": h for i, own in enumerate(taught) for j, h in enumerate(own)}
    return heads | {f"tap.{tap}": value for tap, value in features.items()}


def _parted(outputs: Mapping[str, Tensor]) -> tuple[list[Heads], Features]:
    """The inverse of `_named`."""
    taught: list[Heads] = []
    for name, value in outputs.items():
        if name.startswith("logits."):
            index = int(name.split(".")[1])
            taught += [[]] * (index == len(taught))
            taught[index].append(value)
    return taught, {n.removeprefix("tap."): v for n, v in outputs.items() if n.startswith("tap.")}
