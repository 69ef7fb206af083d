"""A loss term, and objectives: weighted sums of terms."""

import copy
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from privdistill.exceptions import ObjectiveError
from privdistill.losses.functional import resize
from privdistill.losses.schedules import Schedule, Weight, is_number
from privdistill.step import Step


class Term(nn.Module, ABC):
    """One loss with a name. Weigh terms with `*`, add them with `+`.

    A subclass stores its options, sets what it reads, and computes a scalar from a `Step`.

    Attributes:
        name: Key in `Output.terms`; by default the class name in snake case.
        taps: Names of the taps it reads.
        needs_teacher: Whether it reads the teacher's logits.
        needs_target: Whether it reads the target.
        per_head: Whether it is computed for each head under deep supervision; terms that read
            nothing but taps, or `step.student_output`, need it once.
        equal_channels: Whether the features it compares need the same number of channels.

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
    per_head: ClassVar[bool] = True
    equal_channels: ClassVar[bool] = True

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
        return Objective([(1.0, self)]) + other

    def __radd__(self, other: Any) -> "Objective":
        # sum() begins with 0.
        return Objective([(1.0, self)]) if other == 0 else as_objective(other) + self

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
        ObjectiveError: If there is no term, or a weight is neither a finite number nor a function.

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
        if balanced is not None and not 0 <= balanced < 1:
            raise ObjectiveError(f"balanced: `decay` must be in [0, 1); got {balanced}.")
        pairs = [(Weight(1.0).times(weight), term) for weight, term in weighted]
        terms = [term for _, term in pairs]
        self.terms = nn.ModuleList(terms)
        #: Weight and term by name; duplicates are numbered from 2.
        self.named_terms = dict(zip(_free_names(terms), pairs, strict=True))
        #: Names of all taps the terms read, without repetition.
        self.taps = tuple(dict.fromkeys(tap for term in terms for tap in term.taps))
        #: Whether any term reads the teacher's logits, and whether any reads the target.
        self.needs_teacher_logits = any(term.needs_teacher for term in terms)
        self.needs_target = any(term.needs_target for term in terms)
        self._teaches_without_target = not all(term.needs_target for term in terms)
        self.decay = balanced
        # Zero says that a term has not been seen yet.
        unseen = None if balanced is None else torch.zeros(len(weighted))
        self.register_buffer("magnitudes", unseen)

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
            The weighted sum, and the terms by name, unweighted and detached. Without a target,
            terms that need one are left out of both, if there are others.

        Raises:
            ObjectiveError: If a term returns anything but a scalar tensor.
        """
        index = torch.as_tensor(step.index)
        total, values = 0.0 * index, {}
        for position, (name, (weight, term)) in enumerate(self.named_terms.items()):
            if step.target is None and term.needs_target and self._teaches_without_target:
                continue
            value = _value(term, step, heads)
            total = total + weight.at(index) * self._sized(position, value)
            values[name] = value.detach()
        return total, values

    def _sized(self, position: int, value: Tensor) -> Tensor:
        """A term's value, or what it is of its usual size."""
        if self.decay is None or self.magnitudes is None:
            return value
        size, now = self.magnitudes[position], value.detach().abs()
        if self.training and torch.is_grad_enabled():
            # A term that is zero in a step, for instance without labels, says nothing of its size.
            mean = torch.where(size > 0, self.decay * size + (1 - self.decay) * now, now)
            size.copy_(torch.where((now > 0) & now.isfinite(), mean, size))
        # The next step writes into the buffer, perhaps before this one's backward pass.
        seen = self.magnitudes[position].clone()
        return value / torch.where(seen > 0, seen, torch.ones_like(seen)).to(value.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.magnitudes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if kept is not None and self.magnitudes is not None:
            # A running mean stalls in half precision.
            self.magnitudes = kept.to(self.magnitudes.device)
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
    """Return a lone term as an objective of weight 1.

    Args:
        objective: A term or an objective.

    Returns:
        An objective.

    Raises:
        ObjectiveError: If it is neither.
    """
    if isinstance(objective, Term):
        return 1.0 * objective
    if isinstance(objective, Objective):
        return objective
    raise ObjectiveError(
        f"`objective` is a {type(objective).__name__}; expected a term or a sum of terms, e.g. "
        "0.75 * SoftTargetDiceBCE(temperature=5.0) + 0.25 * GroundTruth()."
    )


def check_positive(owner: str, option: str, value: float) -> float:
    """Return an option that must be a positive finite number.

    Args:
        owner: Class name, for the message.
        option: Option name, for the message.
        value: What was passed.

    Returns:
        The value.

    Raises:
        ObjectiveError: If it is not positive and finite.
    """
    if not (is_number(value) and 0 < value < float("inf")):
        raise ObjectiveError(f"{owner}: `{option}` must be positive and finite; got {value!r}.")
    return value


def check_weight(owner: str, option: str, value: float) -> float:
    """Return a published weight, which may be zero but not negative.

    Args:
        owner: Function name, for the message.
        option: Option name, for the message.
        value: What was passed.

    Returns:
        The value.

    Raises:
        ObjectiveError: If it is negative or not finite.
    """
    if not (is_number(value) and 0 <= value < float("inf")):
        raise ObjectiveError(f"{owner}: `{option}` must be finite and >= 0; got {value!r}.")
    return value


def check_resize(owner: str, value: Literal["logits"] | None) -> Literal["logits"] | None:
    """Return the option `resize` of a term with a target.

    Args:
        owner: Class name, for the message.
        value: What was passed.

    Returns:
        The value.

    Raises:
        ObjectiveError: If it is neither None nor "logits".
    """
    if value is not None:
        check_choice(owner, "resize", value, ("logits",))
    return value


def check_share(owner: str, option: str, value: float) -> None:
    """Check an option that must lie in [0, 1].

    Args:
        owner: Function name, for the message.
        option: Option name, for the message.
        value: What was passed.

    Raises:
        ObjectiveError: If it does not.
    """
    if not (is_number(value) and 0 <= value <= 1):
        raise ObjectiveError(f"{owner}: `{option}` must be in [0, 1]; got {value!r}.")


def check_choice(owner: str, option: str, value: str, choices: Sequence[str]) -> None:
    """Check an option that must be one of a few words.

    Args:
        owner: Class name, for the message.
        option: Option name, for the message.
        value: What was passed.
        choices: What is allowed.

    Raises:
        ObjectiveError: If the value is not among the choices.
    """
    if value not in choices:
        raise ObjectiveError(f"{owner}: `{option}` must be one of {choices}; got {value!r}.")


def _value(term: Term, step: Step, heads: Sequence[tuple[float, Step]]) -> Tensor:
    if not heads or not term.per_head:
        return _scalar(term, step)
    value = step.student.new_zeros((), dtype=torch.float32)
    for weight, head in heads:
        # References are never resized, so a coarse head meets them at full resolution.
        own = _enlarged(head, step) if term.needs_target else head
        value = value + weight * _scalar(term, own)
    return value


def _enlarged(head: Step, step: Step) -> Step:
    if head.student.shape == step.student.shape:
        return head
    student = resize(head.student, step.student.shape[2:])
    return replace(head, student=student, teacher=step.teacher, members=step.members)


def _scalar(term: Term, step: Step) -> Tensor:
    value = term(step)
    if not isinstance(value, Tensor) or value.ndim:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ObjectiveError(
            f"{term!r} returned {found}; a term must return a scalar tensor. Reduce it, for "
            "instance with .mean()."
        )
    return value


def _free_names(terms: Sequence[Term]) -> list[str]:
    names: list[str] = []
    for term in terms:
        numbered = (f"{term.name}_{number}" for number in count(2))
        names.append(next(name for name in chain([term.name], numbered) if name not in names))
    return names


def _snake_case(name: str) -> str:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", words).lower()


def changed_options(term: Term, *always: str) -> str:
    """Return a term's options that differ from their defaults, as they would be typed.

    Args:
        term: A term that keeps each option as an attribute of its name.
        always: Options to be shown in any case.

    Returns:
        For `extra_repr`.
    """
    return ", ".join(
        f"{name}={getattr(term, name)!r}"
        for name, option in inspect.signature(type(term)).parameters.items()
        # A network that was passed is no plain attribute, and no option to be typed.
        if name in always or vars(term).get(name, option.default) != option.default
    )
