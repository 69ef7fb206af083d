"""Terms on what a network returns beside its logits, and a contrast for any batch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

from torch import Tensor

from kdnet.models.blocks import at_least_float32
from privdistill import ContrastiveProjection, Step, Term


class OutputTerm(Term, ABC):
    """A term on what a network returns in train mode; in eval mode it is zero.

    Validation losses so compare segmentations. A subclass says what it reads, and writes `measure`.
    """

    per_head = False
    reads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def measure(self, step: Step, *returned: Tensor) -> Tensor:
        """Compute the term from what was returned."""

    def forward(self, step: Step) -> Tensor:
        """Find what is read in the student's output."""
        if not self.training:
            return at_least_float32(step.student).new_zeros(())
        # Recipes choose these terms by the class of the network.
        output = cast("Mapping[str, Tensor]", step.student_output)
        return self.measure(step, *(output[name] for name in self.reads))


class Reconstruction(OutputTerm):
    """Distance between the modalities and their reconstructions."""

    # Source: "squared": Dorent et al. 2019, arXiv:1907.11150; "absolute": Chen et al. 2019,
    # arXiv:2002.09708. Both with weight 0.1.

    reads = ("reconstruction", "present")

    def __init__(self, distance: Literal["squared", "absolute"] = "squared") -> None:
        super().__init__()
        self.distance = distance

    def measure(self, step: Step, *returned: Tensor) -> Tensor:
        """Compare the reconstruction with the student's view."""
        reconstruction, present = returned
        image = cast("Tensor", step.image)
        difference = at_least_float32(reconstruction) - at_least_float32(image)
        values = difference.square() if self.distance == "squared" else difference.abs()
        return _mean_present(values.flatten(2).mean(2), present)

    def extra_repr(self) -> str:
        """Show the distance."""
        return f"distance={self.distance!r}"


class SubsetDivergence(OutputTerm):
    """How much subsets know less than all modalities, and more than a prior."""

    # Source: Dorent et al. 2019, arXiv:1907.11150, with weight 0.1; see `kdnet.models.uhved`.

    reads = ("divergence",)

    def measure(self, step: Step, *returned: Tensor) -> Tensor:  # noqa: ARG002
        """Average over the batch."""
        return at_least_float32(returned[0]).mean()


class StyleDivergence(OutputTerm):
    """Divergence of the modalities' styles from a standard normal one."""

    # Source: Chen et al. 2019, arXiv:2002.09708, with weight 0.1.

    reads = ("style_mean", "style_log_variance", "present")

    def measure(self, step: Step, *returned: Tensor) -> Tensor:  # noqa: ARG002
        """Compute the divergence of each modality, and average."""
        mean, log_variance = map(at_least_float32, returned[:2])
        values = (mean.square() + log_variance.exp() - 1 - log_variance).sum(2) / 2
        return _mean_present(values, returned[2])


class ContrastWithinBatch(ContrastiveProjection):
    """PMKL's contrast between the subjects of a batch; zero for the lone one of a last batch."""

    def forward(self, step: Step) -> Tensor:
        """Compute the term, or zero where nothing can be contrasted."""
        if len(step.student) == 1 and int(step.index) > 0:
            # Of no size, but of every parameter: processes that train together wait for gradients.
            touched = [parameter.sum() for parameter in self.parameters()]
            return 0.0 * sum(touched, step.taps[self.tap].student.float().sum())
        return super().forward(step)


def _mean_present(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the modalities that are there, (B, M); zero if there is none."""
    return values.where(present, 0).sum() / present.sum().clamp(min=1)
