"""Terms on captured features."""

from torch import Tensor

from privdistill.losses.base import check_choice, check_positive
from privdistill.losses.features import FeatureTerm
from privdistill.losses.functional import Normalisation, Reduction, latent_kl
from privdistill.step import Step

_NORMALISATIONS = ("softmax", "softmax_channel", "softmax_spatial", "l1")


class LatentKL(FeatureTerm):
    """Kullback-Leibler divergence between the normalised features of a tap.

    `L_KL = sum_j q_j log(q_j / p_j)`, q from the teacher and p from the student, averaged over the
    batch.

    Args:
        tap: Name of the tap; "bottleneck" is located by the wrapper unless given.
        normalisation: "softmax" over the flattened vector (the default reading of "flattened and
            normalized"), "softmax_channel" per voxel, "softmax_spatial" per channel, or "l1",
            absolute values over their sum.
        temperature: Divides the features before a softmax, dimensionless, > 0.
        reduction: "sum" over the vector, as in the equation; "mean" shrinks with its length (30,720
            numbers in the paper's network), so that the term all but vanishes.

    Shape:
        Features `(B, C, *spatial)`, equal after the tap's adapter. Output: scalar, nats, >= 0.

    Raises:
        ObjectiveError: If an option has no meaning.
        LayerNotFoundError: If the step carries no such tap.
        ShapeMismatchError: If the features differ in shape.

    Example:
        >>> import torch
        >>> from privdistill import TapPair
        >>> z = torch.zeros(1, 2, 4, 4, 4)
        >>> LatentKL()(Step(student=z, taps={"bottleneck": TapPair(z, z)}))
        tensor(0.)

    Weight:
        10, the paper's alpha, as in `kdnet()`.

    Source:
        Hu et al. 2020, arXiv:2106.09564, eq. (3); the normalisation is not given there.
    """

    def __init__(
        self,
        tap: str = "bottleneck",
        *,
        normalisation: Normalisation = "softmax",
        temperature: float = 1.0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(tap)
        check_choice("LatentKL", "normalisation", normalisation, _NORMALISATIONS)
        check_choice("LatentKL", "reduction", reduction, ("sum", "mean"))
        self.reduction: Reduction = reduction
        self.normalisation: Normalisation = normalisation
        self.temperature = check_positive("LatentKL", "temperature", temperature)

    def forward(self, step: Step) -> Tensor:
        """Compute the term from the tap's features."""
        return latent_kl(
            *self.features(step),
            normalisation=self.normalisation,
            temperature=self.temperature,
            reduction=self.reduction,
        )
