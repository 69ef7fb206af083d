"""What terms share that compare features, and what terms share that compare logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from privdistill.exceptions import LayerNotFoundError, ObjectiveError
from privdistill.losses import functional as ops
from privdistill.losses.functional import Activation
from privdistill.losses.objective import Term
from privdistill.losses.options import ACTIVATION, check_options, option, options_of
from privdistill.step import Step


@dataclass(eq=False, repr=False)
class FeatureTerm(Term):
    """A term that compares the features of a tap: a subclass writes `compare`.

    Or it names a function of both features, which gets the fields of a data class as its options,
    as the library's own terms do: `class MMD(FeatureTerm, function=mmd)`.

    Args:
        tap: Name of the tap; "bottleneck" is located by the wrapper unless given.

    Shape:
        Features `(B, C, *spatial)`, equal after the tap's adapter; where the class says
        `equal_channels = False`, C may differ.

    Raises:
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features are no maps, or do not fit.

    Example:
        >>> import torch
        >>> from privdistill import TapPair
        >>> class MMD(FeatureTerm):
        ...     def compare(self, student, teacher):
        ...         distance = student.flatten(2).mean(-1) - teacher.flatten(2).mean(-1)
        ...         return distance.square().sum()
        >>> pair = TapPair(torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 3.0))
        >>> MMD("deep")(Step(pair.student, taps={"deep": pair}))
        tensor(18.)
    """

    per_head = False
    _shown: ClassVar[tuple[str, ...]] = ("tap",)

    tap: str = "bottleneck"

    def __post_init__(self) -> None:
        super().__init__()
        check_options(self)
        self.taps = (self.tap,)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the unweighted term.

        Args:
            student: Features in float32 (float64 for such networks), with their graph.
            teacher: Features in the same precision, without gradient.

        Returns:
            A scalar tensor.

        Raises:
            ObjectiveError: If the subclass writes neither this nor a `forward` of its own.
        """
        if self.function is None:
            raise _without_comparison(self, "student, teacher")
        # Read at each step, so that an option may be changed on the term.
        return self.function(student, teacher, **options_of(self))

    def features(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the tap's features, in float32 at least, the teacher's without gradient.

        Args:
            step: The step.

        Returns:
            Student and teacher features.

        Raises:
            LayerNotFoundError: If the step carries no such tap.
            ShapeMismatchError: If they are no maps, or empty, or their shapes do not fit.
        """
        if self.tap not in step.taps:
            raise LayerNotFoundError(
                f"{self.name}: this step has no tap '{self.tap}'; it has "
                f"{sorted(step.taps) or 'none'}. Name it in the wrapper: taps={{'{self.tap}': "
                "Tap(teacher=..., student=...)}."
            )
        student, teacher = step.taps[self.tap]
        where = f"{self.name}: tap '{self.tap}'"
        # Checked here though functions check too: here the message names term and tap.
        return ops.feature_pair(student, teacher, where, equal_channels=self.equal_channels)

    def build(self, step: Step) -> None:
        """Refuse features of which one number is normalised: it is 1, and the term always 0."""
        shape = step.taps[self.tap].student.shape if self.tap in step.taps else ()
        if shape and self._normalised(shape[1:]) < 2:
            raise ObjectiveError(
                f"{self!r}: features {tuple(shape)} leave one number to normalise, which is 1 "
                "whatever it was, so that the term is always zero. Tap a layer of more voxels or "
                "channels, or pass a larger example."
            )

    def _normalised(self, shape: Sequence[int]) -> int:  # noqa: ARG002
        """How many numbers of `(C, *spatial)` are scaled together to a sum or a length of one."""
        return 2

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        return self.compare(*self.features(step))


@dataclass(eq=False, repr=False, kw_only=True)
class ResponseTerm(Term):
    """A term that compares the logits of both networks: a subclass writes `compare`.

    Or it names a function of both logits, `class Distance(ResponseTerm, function=distance)`, which
    gets `activation` and the fields of a data class as its options.

    Args:
        activation: "softmax" or "sigmoid"; None takes the wrapper's.

    Attributes:
        mixing_temperature: T at which the probabilities of several teachers are averaged.

    Shape:
        Student and teacher logits `(B, C, *spatial)`, equal. Under deep supervision each head is
        compared with the teacher at its own resolution.

    Raises:
        ObjectiveError: If the activation is neither, the softmax runs over one channel, or the step
            has no teacher.
        ShapeMismatchError: If the logits differ in shape.

    Example:
        >>> import torch
        >>> class Disagreement(ResponseTerm):
        ...     def compare(self, student, teacher, activation):
        ...         agreed = student.softmax(1).gather(1, teacher.argmax(1, keepdim=True))
        ...         return 1 - agreed.mean()
        >>> Disagreement()(Step(torch.zeros(1, 2, 4), teacher=torch.ones(1, 2, 4)))
        tensor(0.5000)
    """

    needs_teacher = True
    mixing_temperature = 1.0
    activation: Activation | None = option(None, ACTIVATION)

    def __post_init__(self) -> None:
        super().__init__()
        check_options(self)

    def build(self, step: Step) -> None:
        """Refuse logits whose probabilities would be constant."""
        # Whoever writes a `forward` may read one channel, as of a depth.
        if type(self).forward.__module__.startswith("privdistill."):
            ops.check_logits(step.student, self.activation or step.activation, self.name)

    def compare(self, student: Tensor, teacher: Tensor, activation: Activation) -> Tensor:
        """Compute the unweighted term.

        Args:
            student: Logits in float32 (float64 for such networks), with their graph.
            teacher: Logits of the same shape, without gradient.
            activation: "softmax" or "sigmoid".

        Returns:
            A scalar tensor.

        Raises:
            ObjectiveError: If the subclass writes neither this nor a `forward` of its own.
        """
        if self.function is None:
            raise _without_comparison(self, "student, teacher, activation")
        return self.function(student, teacher, activation=activation, **options_of(self))

    def teacher_logits(
        self, step: Step, activation: Activation, temperature: float = 1.0
    ) -> Tensor:
        """Return the teacher's logits, or of several those of their mean probabilities.

        Args:
            step: The step.
            activation: "softmax" or "sigmoid".
            temperature: T at which the probabilities of several teachers are averaged.

        Returns:
            `(B, C, *spatial)`, detached.

        Raises:
            ObjectiveError: If the step has none.
        """
        if step.teacher is None:
            raise ObjectiveError(f"{self.name}: the step has no teacher logits.")
        # Logits do not average: the mean is one of probabilities, at T.
        if step.members:
            return ops.mix_logits(step.members, activation, temperature=temperature).detach()
        return step.teacher.detach()

    def forward(self, step: Step) -> Tensor:
        """Compute the term from both networks' logits."""
        # A term's own option wins over the wrapper's.
        activation = self.activation or step.activation
        teacher = self.teacher_logits(step, activation, self.mixing_temperature)
        student, teacher = ops.logit_pair(step.student, teacher, activation, self.name)
        return self.compare(
            ops.at_least_float32(student), ops.at_least_float32(teacher), activation
        )


def _without_comparison(term: Term, arguments: str) -> ObjectiveError:
    return ObjectiveError(
        f"{type(term).__name__} says of nothing how it is compared. Write `def compare(self, "
        f"{arguments})`, or `def forward(self, step)` where it reads more than these."
    )
