"""A loss term, and objectives: weighted sums of terms."""

import copy
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError
from privdistill.losses.functional import resize
from privdistill.losses.options import DECAY, check
from privdistill.losses.schedules import Schedule, Weight
from privdistill.losses.targets import labelled_only, no_target
from privdistill.step import Step, TapPair

# What a term may end in that reads what a step does not hold.
_OF_ABSENCE = (AssertionError, AttributeError, LookupError, StopIteration, TypeError, ValueError)
# What `extra_repr` shows; networks and tensors cannot be typed.
_PLAIN = (int, float, str, tuple, list, type(None))


class Term(nn.Module, ABC):
    """One loss with a name. Weigh terms with `*`, add them with `+`.

    A subclass stores its options, says what it reads, and computes a scalar from a `Step`. Terms
    that compare features or logits have less to do: see `FeatureTerm` and `ResponseTerm`.

    Attributes:
        name: Key in `Output.terms`; by default the class name in snake case.
        taps: Names of the taps it reads.
        needs_teacher: Whether it reads the teacher's logits.
        needs_target: Whether it reads the target. Of a batch in which some samples have none, it
            then sees those that have one, as if there were no others.
        masks_unlabelled: Whether its own `forward` leaves samples without a reference out, as those
            of the library do; it then sees the whole batch, and `Step.labelled`. A subclass that
            writes another `forward` says so anew.
        per_head: Whether it is computed for each head under deep supervision; terms that read
            nothing but taps, or `step.student_output`, need it once.
        equal_channels: Whether the features it compares need the same number of channels.
        function: What `compare` calls, unless a subclass writes it: `class A(FeatureTerm,
            function=a)`.

    Example:
        >>> class Confidence(Term):
        ...     def forward(self, step):
        ...         return step.student.softmax(1).amax(1).mean()
        >>> 0.5 * Confidence() + 2 * Confidence().named("other")
        0.5 * Confidence() + 2 * Confidence().named('other')
    """

    taps: tuple[str, ...] = ()
    needs_teacher: bool = False
    needs_target: bool = False
    masks_unlabelled: ClassVar[bool] = False
    per_head: ClassVar[bool] = True
    equal_channels: ClassVar[bool] = True
    # Options that `extra_repr` shows also where they are the default.
    _shown: ClassVar[tuple[str, ...]] = ()
    function: ClassVar[Callable[..., Tensor] | None] = None

    def __init_subclass__(cls, function: Callable[..., Tensor] | None = None) -> None:
        super().__init_subclass__()
        if function is not None:
            cls.function = staticmethod(function)

    def __init__(self) -> None:
        super().__init__()
        self.name = _snake_case(type(self).__name__)

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """Compute the unweighted term.

        Args:
            step: Outputs, taps and target of the step.

        Returns:
            A scalar tensor, in float32 unless the logits are float64.
        """

    def build(self, step: Step) -> None:
        """Make the term's own networks from the shapes of a dry run; most terms have none.

        Args:
            step: Logits, features and view of the example; only shapes, dtype and device matter.
        """

    def named(self, name: str) -> Self:
        """Return this term under another name; options and parameters are shared.

        Args:
            name: Key in `Output.terms`.

        Returns:
            A shallow copy.

        Raises:
            ObjectiveError: If the name is empty or holds a dot.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise ObjectiveError(f"A term's name must not be empty or hold a dot; got {name!r}.")
        # Shallow, so that networks that `build` makes later are those of both names.
        twin = copy.copy(self)
        twin.name = name
        return twin

    def __mul__(self, weight: float | Schedule) -> "Objective":
        return Objective([(weight, self)])

    __rmul__ = __mul__

    def __add__(self, other: "Term | Objective") -> "Objective":
        return 1.0 * self + other

    def __radd__(self, other: Any) -> "Objective":
        # sum() begins with 0.
        return 1.0 * self if other == 0 else as_objective(other) + self

    def extra_repr(self) -> str:
        """Show the options that differ from their defaults, as they would be typed."""
        options = {n: p.default for n, p in inspect.signature(type(self)).parameters.items()}
        own = vars(self)
        return ", ".join(
            f"{name}={own[name]!r}"
            for name, usual in options.items()
            # Networks and tensors that were passed are no options to be typed.
            if name in own and isinstance(own[name], _PLAIN)
            if name in self._shown or own[name] != usual
        )

    def __repr__(self) -> str:
        call = f"{type(self).__name__}({self.extra_repr()})"
        usual = self.name == _snake_case(type(self).__name__)
        return call if usual else f"{call}.named({self.name!r})"


class Objective(nn.Module):
    """A weighted sum of terms, made with `*` and `+`.

    Args:
        weighted: Pairs of a weight and a term. A weight is a finite number, or a function of the
            number of steps taken, such as `Ramp`.
        balanced: See `balanced()`.

    Raises:
        ObjectiveError: If there is no term, a weight is neither a finite number nor a function, or
            a term's own `__init__` forgot its base's.

    Example:
        >>> from privdistill import GroundTruth, LatentKL
        >>> 2 * (GroundTruth() + 0.5 * LatentKL())
        2 * GroundTruth() + 1 * LatentKL(tap='bottleneck')
    """

    magnitudes: Tensor | None

    def __init__(
        self,
        weighted: Sequence[tuple[float | Schedule | Weight, Term]],
        *,
        balanced: float | None = None,
    ) -> None:
        super().__init__()
        if not weighted:
            raise ObjectiveError("An objective needs at least one term, e.g. GroundTruth().")
        if balanced is not None:
            check("balanced", DECAY, decay=balanced)
        for _, term in weighted:
            if "name" not in vars(term):
                raise ObjectiveError(
                    f"{type(term).__name__} is not initialised. Begin its __init__ with "
                    "super().__init__()."
                )
        pairs = [(Weight(1.0).times(weight), term) for weight, term in weighted]
        terms = [term for _, term in pairs]
        self.terms = nn.ModuleList(terms)
        #: Weight and term by name; duplicates are numbered from 2.
        self.named_terms = dict(zip(_free_names(terms), pairs, strict=True))
        computed = [term for weight, term in pairs if weight.factor]
        #: Names of all taps that are read, without repetition; a term that weighs 0 reads nothing.
        self.taps = tuple(dict.fromkeys(tap for term in computed for tap in term.taps))
        #: Whether any term reads the teacher's logits, and whether any reads the target.
        self.needs_teacher_logits = any(term.needs_teacher for term in computed)
        self.needs_target = any(term.needs_target for term in computed)
        self._teaches_without_target = not all(term.needs_target for term in computed)
        self.decay = balanced
        # Zero says that a term has not been seen yet.
        unseen = None if balanced is None else torch.zeros(len(weighted))
        self.register_buffer("magnitudes", unseen)

    def build(self, step: Step) -> None:
        """Make the networks of all terms that weigh anything, on the student's device.

        Args:
            step: Logits, features and view of the example.
        """
        # A term under two names is one module.
        for term in dict.fromkeys(term for weight, term in self._pairs() if weight.factor):
            term.build(step)
            term.to(step.student.device)

    def balanced(self, decay: float = 0.99) -> "Objective":
        """Divide each term by the running mean of its own size, so that weights are shares.

        Terms of different units then need no tuning of magnitudes. Sizes are averaged over
        training steps, begin anew where objectives are weighed or added, and are in the
        `state_dict()`; DistributedDataParallel takes those of its first process.

        Args:
            decay: Share of the mean that is kept in each step, in [0, 1).

        Returns:
            A new objective over the same terms.

        Raises:
            ObjectiveError: If the decay is outside of [0, 1).

        Example:
            >>> from privdistill import GroundTruth, LatentKL
            >>> (GroundTruth() + LatentKL()).balanced()
            (1 * GroundTruth() + 1 * LatentKL(tap='bottleneck')).balanced(0.99)

        Source:
            Ours; the step from a fixed factor (Hu et al. 2020, section 3.2: alpha is "needed to
            balance the magnitude") to a measured one.
        """
        return Objective(self._pairs(), balanced=decay)

    def forward(
        self, step: Step, heads: Sequence[tuple[float, Step]] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the sum, and each term.

        Args:
            step: Outputs, taps and target of the step.
            heads: Under deep supervision, weight and step of each head; a term is then the
                weighted mean over them.

        Returns:
            The weighted sum, and the terms by name, unweighted and detached. Left out of both are
            terms that weigh 0, and without a target those that need one, if there are others.

        Raises:
            ObjectiveError: If a term returns anything but a scalar tensor, or reads what it does
                not declare.
        """
        index = torch.as_tensor(step.index)
        total, values = None, {}
        for position, (name, (weight, term)) in enumerate(self.named_terms.items()):
            missing = step.target is None and term.needs_target and self._teaches_without_target
            if missing or not weight.factor:
                continue
            if heads and term.per_head:
                value = 0.0 * index
                for share, head in heads:
                    value = value + share * _scalar(term, _at(head, step, term))
            else:
                value = _scalar(term, step)
            values[name] = value.detach()
            if self.magnitudes is not None:
                value = self._sized(position, value, advance=step.advance)
            value = (weight.at(index) if weight.schedules else weight.factor) * value
            total = value if total is None else total + value
        if total is None:
            # The empty sum keeps the graph of an objective in which no term counts.
            total = 0.0 * index + step.student[:0].sum()
        return total, values

    def _sized(self, position: int, value: Tensor, *, advance: bool) -> Tensor:
        """What a value is of its usual size."""
        magnitudes: Any = self.magnitudes
        size, now = magnitudes[position], value.detach().abs()
        if self.training and torch.is_grad_enabled():
            # A micro-batch counts only where no step was taken before.
            decay = (self.decay or 0.0) if advance else 1.0
            # A term that is zero in a step, for instance without labels, says nothing of its size.
            mean = torch.where(size > 0, decay * size + (1 - decay) * now, now)
            size.copy_(torch.where((now > 0) & now.isfinite(), mean, size))
        # The next step writes into the buffer, perhaps before this one's backward pass.
        seen = magnitudes[position].clone()
        return value / torch.where(seen > 0, seen, torch.ones_like(seen)).to(value.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.magnitudes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if kept is not None and self.magnitudes is not None:
            device = self.magnitudes.device
            # A running mean stalls in half precision; one that comes from meta has no values yet.
            unseen = kept.is_meta and device.type != "meta"
            self.magnitudes = torch.zeros(kept.shape, device=device) if unseen else kept.to(device)
        return self

    def __mul__(self, factor: float | Schedule) -> "Objective":
        pairs = [(weight.times(factor), term) for weight, term in self._pairs()]
        return Objective(pairs, balanced=self.decay)

    __rmul__ = __mul__

    def __add__(self, other: "Term | Objective") -> "Objective":
        more = as_objective(other)
        if self.decay != more.decay:
            raise ObjectiveError(
                "A balanced objective and one that is not cannot be added. Add the terms first: "
                "(a + b).balanced()."
            )
        return Objective([*self._pairs(), *more._pairs()], balanced=self.decay)

    def __radd__(self, other: Any) -> "Objective":
        # sum() begins with 0.
        return self if other == 0 else as_objective(other) + self

    def _pairs(self) -> list[tuple[Weight, Term]]:
        return list(self.named_terms.values())

    def __repr__(self) -> str:
        formula = " + ".join(f"{weight!r} * {term!r}" for weight, term in self._pairs())
        return formula if self.decay is None else f"({formula}).balanced({self.decay:g})"


def as_objective(objective: Any) -> Objective:
    """Return an objective as it is, and a lone term as one of weight 1."""
    if isinstance(objective, Term):
        return 1.0 * objective
    if isinstance(objective, Objective):
        return objective
    raise ObjectiveError(
        f"`objective` is a {type(objective).__name__}; expected a term or a sum of terms, e.g. "
        "0.75 * SoftTargetDiceBCE(temperature=5.0) + 0.25 * GroundTruth()."
    )


def copied(objective: Objective) -> Objective:
    """Return an objective of a wrapper's own, deeply copied."""
    memo: dict[int, Any] = {}
    for term in objective.terms:
        try:
            copy.deepcopy(term, memo)
        except (RuntimeError, TypeError) as error:
            raise ObjectiveError(
                f"{term!r} cannot be copied, and a wrapper copies its terms: {error}. Hold tensors "
                "detached or as parameters, and make locks and files where they are used."
            ) from error
    return copy.deepcopy(objective, memo)


def _at(head: Step, step: Step, term: Term) -> Step:
    """A head's step; references are never resized, so a coarse head meets them at full size."""
    if not term.needs_target or head.student.shape == step.student.shape:
        return head
    student = resize(head.student, step.student.shape[2:])
    return replace(head, student=student, teacher=step.teacher, members=step.members)


def _scalar(term: Term, step: Step) -> Tensor:
    if step.target is None and term.needs_target:
        raise no_target(term.name)
    labelled = step.labelled
    labelled = None if labelled is None or _masks_unlabelled(term) else labelled
    if labelled is not None and not term.needs_target:
        step = replace(step, target=None)
    elif labelled is not None:
        if not labelled.any():
            return _nothing(term, step)
        step = labelled_only(step, labelled, term.name)
    try:
        value = term(step)
    except _OF_ABSENCE as error:
        advice = _undeclared(term, step, error)
        if not advice:
            raise
        raise ObjectiveError(
            f"{term!r} reads what it does not declare: {' or '.join(advice)}, as attributes of "
            f"the class. A step holds no more, so it ended in {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.ndim:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ObjectiveError(
            f"{term!r} returned {found}; a term must return a scalar tensor. Reduce it, for "
            "instance with .mean()."
        )
    return value


def _nothing(term: Term, step: Step) -> Tensor:
    """Zero, as the empty sum of all that the term would have read: none of it loses its graph."""
    zero = torch.zeros((), device=step.student.device)
    taps = [step.taps[tap].student for tap in term.taps if tap in step.taps]
    for values in (step.student, *taps, *term.parameters()):
        zero = zero + values.flatten()[:0].sum()
    return zero


def _masks_unlabelled(term: Term) -> bool:
    """Whether the `forward` that a term has is covered by what a class says of its own."""
    # Whoever writes a `forward`, be it in a mixin or later on, answers for what it reads.
    for holder in map(vars, (term, *type(term).__mro__)):
        if "forward" in holder or "masks_unlabelled" in holder:
            return bool(holder.get("masks_unlabelled"))
    return False


class _AnyTap(dict[str, TapPair]):
    """Taps, at least one, in which any name is found; `asked` is the last that was not there."""

    asked = "its name"

    def __missing__(self, name: str) -> TapPair:
        self.asked = name
        return next(iter(self.values()))

    def __contains__(self, _name: object) -> bool:
        return True

    def get(self, name: str, _default: Any = None) -> Any:
        return self[name]


def _undeclared(term: Term, step: Step, error: Exception) -> list[str]:
    """What to declare: that with which a term, run once more, does not fail as it did."""
    like = step.student.detach()
    taps = _AnyTap(step.taps or {"": TapPair(like, like)})
    absent: dict[str, dict[str, Any]] = {}
    if step.teacher is None and not term.needs_teacher:
        absent["step.teacher, needs_teacher = True"] = {"teacher": like, "members": ((like, 1.0),)}
    if step.target is None and not term.needs_target:
        absent["step.target, needs_target = True"] = {"target": like.argmax(1)}
    if set(term.taps).issubset(step.taps):
        absent["this tap, taps = ({!r},)"] = {"taps": taps}
    advice = []
    for declaration, given in absent.items():
        try:
            term(replace(step, **given))
        except Exception as other:  # noqa: BLE001
            if str(other) == str(error):
                continue
        advice.append(f"if it reads {declaration.format(taps.asked)}")
    return advice


def _free_names(terms: Sequence[Term]) -> list[str]:
    names: list[str] = []
    for term in terms:
        numbered = (f"{term.name}_{number}" for number in count(2))
        names.append(next(name for name in chain([term.name], numbered) if name not in names))
    return names


def _snake_case(name: str) -> str:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", words).lower()
