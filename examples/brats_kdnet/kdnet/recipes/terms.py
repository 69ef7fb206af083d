"""Terms on what a network returns beside its logits, and on synthesised images.

Networks such as `models.UHVED` return reconstructions and divergences in train mode alone. In eval
mode terms on them are zero, so that validation losses compare segmentations.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from privdistill import ContrastiveProjection, ObjectiveError, Step, Term

Distance = Literal["squared", "absolute"]


class Reconstruction(Term):
    """Distance between the modalities and their reconstructions; zero in eval mode."""

    # Source: "squared": Dorent et al. 2019, arXiv:1907.11150; "absolute": Chen et al. 2019,
    # arXiv:2002.09708. Both with weight 0.1.

    per_head = False

    def __init__(self, distance: Distance = "squared") -> None:
        super().__init__()
        if distance not in ("squared", "absolute"):
            raise ObjectiveError(
                f"Reconstruction: `distance` is 'squared' or 'absolute'; got {distance!r}."
            )
        self.distance = distance

    def forward(self, step: Step) -> Tensor:
        """Compare the reconstruction with the student's view."""
        if not self.training:
            return _nothing(step)
        if step.image is None:
            raise ObjectiveError(f"{self.name}: the step holds no image to compare with.")
        reconstruction, present = returned(self, step, "reconstruction", "present")
        difference = _wide(reconstruction) - _wide(step.image)
        values = difference.square() if self.distance == "squared" else difference.abs()
        return _mean_present(values.flatten(2).mean(2), present)

    def extra_repr(self) -> str:
        """Show the distance."""
        return f"distance={self.distance!r}"


class SubsetDivergence(Term):
    """How much subsets know less than all modalities, and more than a prior; zero in eval mode."""

    # Source: Dorent et al. 2019, arXiv:1907.11150, with weight 0.1; see `kdnet.models.uhved`.

    per_head = False

    def forward(self, step: Step) -> Tensor:
        """Average over the batch."""
        if not self.training:
            return _nothing(step)
        (divergence,) = returned(self, step, "divergence")
        return _wide(divergence).mean()


class StyleDivergence(Term):
    """Divergence of the modalities' styles from a standard normal one; zero in eval mode."""

    # Source: Chen et al. 2019, arXiv:2002.09708, with weight 0.1.

    per_head = False

    def forward(self, step: Step) -> Tensor:
        """Compute the divergence of each modality, and average."""
        if not self.training:
            return _nothing(step)
        names = ("style_mean", "style_log_variance", "present")
        mean, log_variance, present = returned(self, step, *names)
        mean, log_variance = _wide(mean), _wide(log_variance)
        values = (mean.square() + log_variance.exp() - 1 - log_variance).sum(2) / 2
        return _mean_present(values, present)


class SynthesisL1(Term):
    """Mean absolute difference between synthesised and real modalities."""

    # Source: The usual loss of image synthesis; Hu et al. 2020, arXiv:2106.09564, name none.

    per_head = False

    def __init__(self, tap: str = "synthesis") -> None:
        super().__init__()
        self.tap = tap
        self.taps = (tap,)

    def forward(self, step: Step) -> Tensor:
        """Compare both images of the tap."""
        synthesis, real = step.taps[self.tap]
        return (_wide(synthesis) - _wide(real)).abs().mean()


class ContrastWithinBatch(Term):
    """PMKL's contrast between the subjects of a batch; zero for the lone one of a last batch."""

    # Source: `privdistill.ContrastiveProjection`, which refuses every batch of one.

    per_head = False
    equal_channels = False

    def __init__(self, tap: str = "decoder") -> None:
        super().__init__()
        self.contrast = ContrastiveProjection(tap)
        self.taps = (tap,)

    def build(self, step: Step) -> None:
        """Make the projections of both networks."""
        self.contrast.build(step)

    def forward(self, step: Step) -> Tensor:
        """Compute the term, or zero where nothing can be contrasted."""
        if len(step.student) == 1 and int(step.index) > 0:
            # Of no size, but of every parameter: processes that train together wait for gradients.
            touched = [parameter.sum() for parameter in self.parameters()]
            return 0.0 * sum(touched, step.taps[self.taps[0]].student.float().sum())
        value: Tensor = self.contrast(step)
        return value


def returned(term: Term, step: Step, *names: str) -> list[Tensor]:
    """Return what a network gave beside its logits in train mode."""
    output = step.student_output
    found = list(output) if isinstance(output, Mapping) else [type(output).__name__]
    missing = [name for name in names if name not in found]
    if missing:
        raise ObjectiveError(
            f"{term.name}: in train mode the student returned {', '.join(map(str, found))}; this "
            f"term reads {', '.join(missing)} as well. Leave the term out, or train a network that "
            "returns them, such as models.UHVED or models.GatedFusionNet."
        )
    return [output[name] for name in names]


def _nothing(step: Step) -> Tensor:
    return _wide(step.student).new_zeros(())


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() > 4 else tensor.float()


def _mean_present(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the modalities that are there, (B, M); zero if there is none."""
    return values.where(present, 0).sum() / present.sum().clamp(min=1)
