"""Terms on the features of a tap, sample by sample."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from privdistill.exceptions import ObjectiveError, ShapeMismatchError
from privdistill.losses.base import Term, changed_options, check_positive
from privdistill.losses.functional import (
    at_least_float32,
    full_precision,
    latent_kl,
    standardise,
    unit,
)
from privdistill.losses.reading import tap_pair
from privdistill.step import Step, TapPair


class FeatureTerm(Term):
    """What terms on features share: a tap.

    Args:
        tap: Name of the tap; "bottleneck" is located by the wrapper unless given.
    """

    per_head = False

    def __init__(self, tap: str = "bottleneck") -> None:
        super().__init__()
        self.tap = tap
        self.taps = (tap,)

    def features(self, step: Step) -> TapPair:
        """Return the tap's features, in float32 at least, the teacher's without gradient.

        Args:
            step: The step.

        Returns:
            Student and teacher features.

        Raises:
            ShapeMismatchError: If they are no maps, or empty, or their shapes do not fit.
        """
        student, teacher = tap_pair(step, self.tap, self.name)
        if student.ndim < 3 or 0 in student.shape:
            raise ShapeMismatchError(
                f"{self.name}: tap '{self.tap}' gives {tuple(student.shape)}; expected "
                "(B, C, *spatial) with at least one spatial axis and no empty one."
            )
        equal = range(student.ndim) if self.equal_channels else (0, *range(2, student.ndim))
        if student.ndim != teacher.ndim or any(student.shape[i] != teacher.shape[i] for i in equal):
            allowed = "they must be equal" if self.equal_channels else "only channels may differ"
            raise ShapeMismatchError(
                f"{self.name}: tap '{self.tap}' gives {tuple(student.shape)} for the student and "
                f"{tuple(teacher.shape)} for the teacher; {allowed}. Let the wrapper build an "
                "adapter: Tap(..., adapter='auto')."
            )
        student = at_least_float32(student)
        # Matrix products of both need one dtype, and a float64 teacher must not cast the student.
        return TapPair(student, teacher.detach().to(student.dtype))

    def built(self, network: nn.Module | None) -> nn.Module:
        """Return one of the term's own networks, once there is one.

        Args:
            network: What `build` made, or None before.

        Returns:
            The network.

        Raises:
            ObjectiveError: If it was not built.
        """
        if network is None:
            raise ObjectiveError(
                f"{self.name}: its networks are made from the shapes of a dry run, and there was "
                "none. Pass example=torch.zeros(1, C, *spatial) to the wrapper."
            )
        return network

    def check_fit(self, built: Sequence[int], wanted: Sequence[int]) -> None:
        """Refuse networks that were made for another wrapper and do not fit this one.

        Args:
            built: Channels of student and teacher that the term's networks take.
            wanted: Those of the example.

        Raises:
            ObjectiveError: If they differ.
        """
        if tuple(built) != tuple(wanted):
            raise ObjectiveError(
                f"{self.name}: its networks were made for another wrapper, whose features have "
                f"{built[0]} channels for the student and {built[1]} for the teacher; here they "
                f"have {wanted[0]} and {wanted[1]}. Make an objective for each wrapper."
            )

    def extra_repr(self) -> str:
        """Show the tap and the options that were chosen."""
        return changed_options(self, "tap")


class FeatureL2(FeatureTerm):
    """Mean squared difference of features.

    `mean((F_s - F_t)^2)` over batch, channels and voxels.

    Args:
        tap: Name of the tap.
        normalise: Whether each channel of each sample is first brought to mean 0 and variance 1
            over space; the value is then twice one minus the mean Pearson correlation.

    Shape:
        Features `(B, C, *spatial)`, equal after the tap's adapter. Output: scalar, >= 0.

    Raises:
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> import torch
        >>> pair = TapPair(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 3.0))
        >>> FeatureL2("stage3")(Step(student=pair.student, taps={"stage3": pair}))
        tensor(9.)

    Weight:
        Depends on the scale of the features; begin with the share that `.balanced()` gives.

    Source:
        Romero et al. 2015 (FitNets), arXiv:1412.6550, eq. (3), the mean where it halves a sum; the
        regressor is the tap's adapter. Normalised: Cao et al. 2022 (PKD), arXiv:2207.02039, who
        take mean and variance over the batch too and halve; that form could not be checked.
    """

    def __init__(self, tap: str = "bottleneck", *, normalise: bool = False) -> None:
        super().__init__(tap)
        self.normalise = normalise

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        student, teacher = self.features(step)
        if self.normalise:
            space = tuple(range(2, student.ndim))
            student, teacher = standardise(student, space), standardise(teacher, space)
        return (student - teacher).square().mean()


class FeatureCosine(FeatureTerm):
    """One minus the cosine between the channel vectors of each voxel.

    Computed as half the squared distance of the two unit vectors, which is the same and exact
    where they agree. Two zero vectors agree; of one zero vector it is one half.

    Args:
        tap: Name of the tap.

    Shape:
        Features `(B, C, *spatial)`, equal after the tap's adapter. Output: scalar, in [0, 2].

    Raises:
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> import torch
        >>> pair = TapPair(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [2.0]]]))
        >>> FeatureCosine()(Step(student=pair.student, taps={"bottleneck": pair}))
        tensor(1.)

    Weight:
        1; the term lies in [0, 2].

    Source:
        The usual cosine distance, averaged over voxels.
    """

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        student, teacher = self.features(step)
        return (unit(student, 1) - unit(teacher, 1)).square().sum(1).mean() / 2


class AttentionTransfer(FeatureTerm):
    """Squared distance between the spatial attention maps of both networks.

    `|| Q_s / ||Q_s|| - Q_t / ||Q_t|| ||^2` with `Q = sum_c |F_c|^p` flattened over space, averaged
    over the batch.

    Args:
        tap: Name of the tap; the numbers of channels may differ.
        power: p, >= 1; a larger one looks at the strongest activations alone.

    Shape:
        Features `(B, C, *spatial)`, equal but for C. Output: scalar, in [0, 2].

    Raises:
        ObjectiveError: If the power is below one.
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in resolution.

    Example:
        >>> import torch
        >>> pair = TapPair(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]]))
        >>> AttentionTransfer()(Step(student=pair.student, taps={"bottleneck": pair}))
        tensor(2.)

    Weight:
        Of the order of 10: unit maps are compared, so that the term lies in [0, 2].

    Source:
        Zagoruyko and Komodakis 2017, arXiv:1612.03928, eq. (2), where the norm of the difference is
        not squared; squared, it is smooth where the maps agree. A mean over voxels instead would
        shrink with the patch.
    """

    equal_channels = False

    def __init__(self, tap: str = "bottleneck", *, power: float = 2.0) -> None:
        super().__init__(tap)
        self.power = check_positive("AttentionTransfer", "power", power)
        if power < 1:
            raise ObjectiveError(
                f"AttentionTransfer: `power` must be at least 1; got {power}. Below it the slope "
                "at an activation of 0 is infinite."
            )

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        student, teacher = self.features(step)
        difference = self._attention(student) - self._attention(teacher)
        return difference.square().sum(1).mean()

    def _attention(self, features: Tensor) -> Tensor:
        features = features.flatten(2)
        # The unit map does not depend on the scale, so that a high power need not overflow.
        largest = features.detach().abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
        return unit((features / largest).abs().pow(self.power).sum(1), 1)


class ChannelWise(FeatureTerm):
    """Kullback-Leibler divergence between the channels as distributions over space.

    `T^2 / C sum_c sum_i q_ci log(q_ci / p_ci)`, averaged over the batch, with q and p the softmax
    over space of `F_t / T` and `F_s / T` in each channel.

    Args:
        tap: Name of the tap.
        temperature: T, dimensionless, > 0.

    Shape:
        Features `(B, C, *spatial)`, equal after the tap's adapter. Output: scalar, nats, >= 0.

    Raises:
        ObjectiveError: If the temperature is not positive.
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> import torch
        >>> pair = TapPair(torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0]]]))
        >>> ChannelWise(temperature=1.0)(Step(student=pair.student, taps={"bottleneck": pair}))
        tensor(0.3278)

    Weight:
        Of the order of 1; the divergence is a mean over channels.

    Source:
        Shu et al. 2021 (CWD), arXiv:2011.13256, and the code the authors published with it.
    """

    def __init__(self, tap: str = "bottleneck", *, temperature: float = 4.0) -> None:
        super().__init__(tap)
        self.temperature = check_positive("ChannelWise", "temperature", temperature)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        student, teacher = self.features(step)
        divergence = latent_kl(
            student, teacher, normalisation="softmax_spatial", temperature=self.temperature
        )
        return self.temperature**2 * divergence

    def extra_repr(self) -> str:
        """Show the tap, the temperature and the options that were chosen."""
        return changed_options(self, "tap", "temperature")


class Gram(FeatureTerm):
    """Squared difference of the channels' correlations over space: style without place.

    `|| G_t - G_s ||^2 / (4 C^2)` with `G = F F^T / S` of the `(C, S)` features, S voxels, averaged
    over the batch. Its slope grows with the cube of the features: in fp16 it may overflow for
    features beyond some hundreds, and a gradient scaler then skips the step.

    Args:
        tap: Name of the tap.

    Shape:
        Features `(B, C, *spatial)`, equal after the tap's adapter. Output: scalar, >= 0.

    Raises:
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> import torch
        >>> pair = TapPair(torch.zeros(1, 1, 4), torch.full((1, 1, 4), 2.0))
        >>> Gram()(Step(student=pair.student, taps={"bottleneck": pair}))
        tensor(4.)

    Weight:
        Depends on the scale of the features; begin with the share that `.balanced()` gives.

    Source:
        Azad et al. 2022 (SMU-Net), after Gatys et al. 2015, arXiv:1508.06576:
        `|| G_t - G_s ||^2 / (4 C^2 S^2)` of sums over voxels, which is this. SMU-Net's code divides
        by C and S once more and mixes the samples of a batch, so that its weight (1e-4) belongs
        to other values.
    """

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        student, teacher = self.features(step)
        return (_gram(student) - _gram(teacher)).square().mean() / 4


def _gram(features: Tensor) -> Tensor:
    flat = features.flatten(2)
    with full_precision(flat):
        return flat @ flat.mT / flat.shape[2]


class VariationalInformation(FeatureTerm):
    """Negative log-likelihood of the teacher's features, given the student's.

    `((F_t - mu(F_s))^2 / v_c + log v_c) / 2`, averaged over batch, channels and voxels: minimising
    it raises a lower bound of the mutual information. `mu` is three 1x1 convolutions without bias
    and with ReLU between them; `v_c = softplus(e_c) + min_variance` is learnt for each channel.
    Both are trained with the student; the wrapper makes them after its dry run, and another wrapper
    of the same term keeps them.

    Args:
        tap: Name of the tap; the numbers of channels may differ.
        hidden: Channels between the convolutions; None takes the teacher's.
        initial_variance: `v_c` before training.
        min_variance: Its floor.

    Shape:
        Features `(B, C, *spatial)`, equal but for C. Output: scalar, nats; it may be negative.

    Raises:
        ObjectiveError: If an option has no meaning, there was no dry run, or the networks were made
            for other channels.
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in resolution.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2, 4)
        >>> step = Step(student=z, taps={"bottleneck": TapPair(z, z)})
        >>> term = VariationalInformation(initial_variance=1.0)
        >>> term.build(step)
        >>> bool(term(step).abs() < 1e-6)
        True

    Weight:
        0.5, as in ACN (Wang et al. 2021).

    Source:
        Ahn et al. 2019 (VID), arXiv:1904.05835; layers, initial and least variance as in the
        authors' code, in the copy that RepDistiller publishes. Constants are left out.
    """

    equal_channels = False
    likelihood: "_Gaussian | None"

    def __init__(
        self,
        tap: str = "bottleneck",
        *,
        hidden: int | None = None,
        initial_variance: float = 5.0,
        min_variance: float = 1e-5,
    ) -> None:
        super().__init__(tap)
        owner = "VariationalInformation"
        self.hidden = None if hidden is None else _check_width(owner, "hidden", hidden)
        self.min_variance = check_positive(owner, "min_variance", min_variance)
        self.initial_variance = check_positive(owner, "initial_variance", initial_variance)
        if initial_variance <= min_variance:
            raise ObjectiveError(
                f"{owner}: `initial_variance` must exceed `min_variance`; got {initial_variance} "
                f"and {min_variance}."
            )
        self.register_module("likelihood", None)

    def build(self, step: Step) -> None:
        """Make the mean network and the variances from the tap's shapes, unless they are there."""
        student, teacher = self.features(step)
        inputs, outputs = student.shape[1], teacher.shape[1]
        if self.likelihood is not None:
            self.check_fit(self.likelihood.channels, (inputs, outputs))
            return
        widths = (inputs, self.hidden or outputs, self.hidden or outputs, outputs)
        gaussian = _Gaussian(widths, self.initial_variance, self.min_variance)
        self.likelihood = gaussian.to(student.device)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        student, teacher = self.features(step)
        return _run(self.built(self.likelihood), student.flatten(2), teacher.flatten(2))


class _Gaussian(nn.Module):
    def __init__(self, widths: tuple[int, ...], initial: float, floor: float) -> None:
        super().__init__()
        # One kernel for any number of axes, since space comes flattened.
        first, second, third = (nn.Conv1d(a, b, 1, bias=False) for a, b in pairwise(widths))
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.channels = (widths[0], widths[-1])
        self.floor = floor
        # So that training starts at that variance itself; expm1 keeps the digits of small ones.
        gap = initial - floor
        inverse_softplus = gap + math.log(-math.expm1(-gap))
        self.scale = nn.Parameter(torch.full((widths[-1], 1), inverse_softplus))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        variance = F.softplus(self.scale) + self.floor
        distance: Tensor = (teacher - self.mean(student)).square()
        return (distance / variance + variance.log()).mean() / 2


class ContrastiveProjection(FeatureTerm):
    """Margin contrastive loss between projections of both networks' pooled features.

    `mean_ij (d_ii^2 if i = j else max(0, margin - d_ij)^2)` over all B^2 pairs, with `d_ij` the
    distance between the student's embedding of sample i and the teacher's of sample j. An embedding
    is the mean over space, a linear layer, ReLU, a linear layer, over its L2 norm. Each network has
    its own head; both are trained with the student, and the wrapper makes them after its dry run;
    another wrapper of the same term keeps them.

    Args:
        tap: Name of the tap; the numbers of channels may differ.
        dimensions: Length of an embedding.
        hidden: Width between the linear layers.
        margin: Distance beyond which negatives count no more; two embeddings are at most 2 apart.

    Shape:
        Features `(B, C, *spatial)`, equal but for C, with B >= 2. Output: scalar, >= 0. The
        negatives are the other samples of the batch; under DDP, of each process's own.

    Raises:
        ObjectiveError: If an option has no meaning, the batch has one sample, there was no dry
            run, or the heads were made for other channels.
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in resolution.

    Example:
        >>> import torch
        >>> z = torch.zeros(2, 3, 4)
        >>> step = Step(student=z, taps={"bottleneck": TapPair(z, z)})
        >>> term = ContrastiveProjection(dimensions=8)
        >>> term.build(step)
        >>> term(step).shape
        torch.Size([])

    Weight:
        0.5, as in `pmkl()`.

    Source:
        Chen et al. 2022 (PMKL), doi:10.1109/TMI.2021.3119385, "contrastive knowledge distillation
        loss", after the code the authors published; their tap is the decoder's last feature map.
    """

    equal_channels = False
    student_head: nn.Module | None
    teacher_head: nn.Module | None

    def __init__(
        self,
        tap: str = "bottleneck",
        *,
        dimensions: int = 16,
        hidden: int = 32,
        margin: float = 1.0,
    ) -> None:
        super().__init__(tap)
        owner = "ContrastiveProjection"
        self.dimensions = _check_width(owner, "dimensions", dimensions)
        self.hidden = _check_width(owner, "hidden", hidden)
        self.margin = check_positive(owner, "margin", margin)
        self.register_module("student_head", None)
        self.register_module("teacher_head", None)

    def build(self, step: Step) -> None:
        """Make both heads from the tap's shapes, unless they are there."""
        student, teacher = self.features(step)
        built = [
            next(head.parameters()).shape[1]
            for head in (self.student_head, self.teacher_head)
            if head is not None
        ]
        if built:
            self.check_fit(built, (student.shape[1], teacher.shape[1]))
            return
        self.student_head = self._head(student)
        self.teacher_head = self._head(teacher)

    def _head(self, features: Tensor) -> nn.Module:
        first = nn.Linear(features.shape[1], self.hidden)
        second = nn.Linear(self.hidden, self.dimensions)
        return nn.Sequential(first, nn.ReLU(), second).to(features.device)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        student, teacher = self.features(step)
        batch = student.shape[0]
        if batch < 2:
            raise ObjectiveError(
                f"{self.name}: the batch holds {batch} sample, and negatives need a second one. "
                "Raise batch_size, and pass drop_last=True to the loader so that the last batch is "
                "not smaller."
            )
        mine = self._embed(self.student_head, student)
        theirs = self._embed(self.teacher_head, teacher)
        squared = (mine[:, None] - theirs).square().sum(2)
        # The slope of a root is infinite at zero.
        negative = (self.margin - squared.clamp_min(1e-12).sqrt()).relu().square()
        same = torch.eye(batch, dtype=torch.bool, device=squared.device)
        return torch.where(same, squared, negative).mean()

    def _embed(self, head: nn.Module | None, features: Tensor) -> Tensor:
        return unit(_run(self.built(head), features.flatten(2).mean(2)), 1)


def _run(network: nn.Module, *values: Tensor) -> Tensor:
    """Run a term's own network in the precision of the values, whatever its own and autocast's."""
    weights = {name: weight.to(values[0].dtype) for name, weight in network.named_parameters()}
    with full_precision(values[0]):
        output: Tensor = functional_call(network, weights, values)
    return output


def _check_width(owner: str, option: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ObjectiveError(f"{owner}: `{option}` must be a whole number >= 1; got {value!r}.")
    return value
