"""Published objectives in one line, with their constants.

Each returns a sum of terms that can be weighed, extended and printed like any other. The supervised
part is Dice plus cross-entropy in all of them, so that they compare in what the teacher adds; where
a paper supervises otherwise, its preset says so.
"""

from privdistill.losses.features import FeatureL2, LatentKL
from privdistill.losses.learned import ContrastiveProjection
from privdistill.losses.objective import Objective
from privdistill.losses.options import NOT_NEGATIVE, POSITIVE, SHARE, check
from privdistill.losses.relational import LocalConsistency, PairwiseSimilarity, PrototypeSimilarity
from privdistill.losses.response import (
    HintonKL,
    ProbabilityMSE,
    ReliableSoftTargetCE,
    SoftTargetDiceBCE,
)
from privdistill.losses.supervised import GroundTruth


def kdnet(
    *,
    imitation: float = 0.75,
    temperature: float = 5.0,
    latent_weight: float = 10.0,
    tap: str = "bottleneck",
) -> Objective:
    r"""KD-Net: soft targets, the latent representation and the reference.

    :math:`\lambda L_\mathrm{KD} + (1 - \lambda) L_\mathrm{GT} + \alpha L_\mathrm{KL}`.

    Args:
        imitation: lambda, in [0, 1].
        temperature: T of the teacher's soft targets, dimensionless, > 0.
        latent_weight: alpha, >= 0.
        tap: Name of the tap that holds the latent representation.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> kdnet()
        0.75 * SoftTargetDiceBCE(temperature=5.0) + 0.25 * GroundTruth() +
        10 * LatentKL(tap='bottleneck')

    Source:
        Hu et al. 2020, arXiv:2106.09564, eq. (5); the constants are those of its section 3.2.
    """
    check("kdnet", SHARE, imitation=imitation)
    check("kdnet", NOT_NEGATIVE, latent_weight=latent_weight)
    # One minus lambda is the reference's: the two shares of eq. (5) sum to one, alpha is apart.
    imitated = imitation * SoftTargetDiceBCE(temperature=temperature)
    return imitated + (1 - imitation) * GroundTruth() + latent_weight * LatentKL(tap)


def hinton(*, imitation: float = 0.5, temperature: float = 4.0) -> Objective:
    r"""Hinton's distillation: tempered outputs of both networks, times T^2, and the reference.

    :math:`\lambda T^2 \mathrm{KL} + (1 - \lambda) L_\mathrm{GT}`.

    Args:
        imitation: lambda, in [0, 1].
        temperature: T of both networks, dimensionless, > 0.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> hinton()
        0.5 * HintonKL(temperature=4.0) + 0.5 * GroundTruth()

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2. The paper fixes no constants; T = 4 and
        equal shares are usual. Its supervised part is the cross-entropy alone.
    """
    check("hinton", SHARE, imitation=imitation)
    return imitation * HintonKL(temperature=temperature) + (1 - imitation) * GroundTruth()


def generalized(*, imitation: float = 0.5, temperature: float = 2.0) -> Objective:
    r"""Generalized distillation with privileged information: one loss for targets of both kinds.

    :math:`(1 - \lambda) l(y, \sigma(f)) + \lambda l(s, \sigma(f))` with
    :math:`s = \sigma(f_t / T)`. Only the teacher is tempered.

    Args:
        imitation: lambda, in [0, 1].
        temperature: T of the teacher, dimensionless, > 0.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> generalized()
        0.5 * SoftTargetDiceBCE(temperature=2.0, binarisation='soft') + 0.5 * GroundTruth()

    Source:
        Lopez-Paz et al. 2016, arXiv:1511.03643, section 4. There l is the cross-entropy, here Dice
        plus cross-entropy; lambda and T are chosen for each task there, and ours here.
    """
    check("generalized", SHARE, imitation=imitation)
    # Both halves compare with the soft target: nothing is binarised in that paper.
    soft = SoftTargetDiceBCE(temperature=temperature, binarisation="soft")
    return imitation * soft + (1 - imitation) * GroundTruth()


def structured(
    *, pixelwise: float = 10.0, pairwise: float = 1.0, tap: str = "bottleneck"
) -> Objective:
    """Structured knowledge distillation: voxels and pairs of positions.

    `L_GT + lambda_1 KL + lambda_2 PA`.

    Args:
        pixelwise: Weight of the divergence of each voxel's probabilities.
        pairwise: Weight of the similarities between positions.
        tap: Name of the tap whose positions are compared.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> structured().taps
        ('bottleneck',)

    Source:
        Liu et al. 2019, arXiv:1903.04197; the weights are those of a public implementation. The
        holistic, adversarial term has an optimizer of its own and is added by hand:
        `structured() + 0.1 * HolisticAdversarial(critic)`.
    """
    check("structured", NOT_NEGATIVE, pixelwise=pixelwise, pairwise=pairwise)
    # At T = 1 the factor T^2 is none, as in the paper's pixel-wise term.
    pixels = HintonKL(temperature=1.0)
    return GroundTruth() + pixelwise * pixels + pairwise * PairwiseSimilarity(tap)


def pmkl(*, reliable: float = 0.5, contrastive: float = 0.5, tap: str = "decoder") -> Objective:
    r"""Privileged modality distillation: soft targets where the teacher knows better, and contrast.

    :math:`L_\mathrm{GT} + 0.5 L_\mathrm{RKD} + 0.5 L_\mathrm{con}`. Needs batches of two or more,
    and a tap on the last decoder features: `taps={"decoder": Tap(teacher=..., student=...)}`.

    Args:
        reliable: Weight of the soft targets, T = 10.
        contrastive: Weight of the contrast between samples.
        tap: Name of the tap on the last decoder features.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> pmkl().taps
        ('decoder',)

    Source:
        Chen et al. 2022, doi:10.1109/TMI.2021.3119385, and the constants of the code the authors
        published. Its weight decay of 1e-5 belongs to the optimizer; its cross-entropy is weighted
        by class: `GroundTruth(class_weights=...)`.
    """
    check("pmkl", NOT_NEGATIVE, reliable=reliable, contrastive=contrastive)
    soft = reliable * ReliableSoftTargetCE(temperature=10.0)
    return GroundTruth() + soft + contrastive * ContrastiveProjection(tap)


def protokd(
    *, classes: int = 4, softened: float = 10.0, prototypes: float = 0.1, tap: str = "decoder"
) -> Objective:
    r"""Prototype distillation: softened outputs, and similarity of features to class prototypes.

    :math:`L_\mathrm{GT} + 10 \mathrm{KL} + 0.1 \mathrm{MSE}(M_s, M_t)`. Needs a tap on the last
    decoder features: `taps={"decoder": Tap(teacher=..., student=...)}`.

    Args:
        classes: Number of classes; the published divergence is a mean over classes too.
        softened: Weight of the divergence at T = 10, without T^2.
        prototypes: Weight of the similarity maps.
        tap: Name of the tap on the last decoder features.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> protokd().taps
        ('decoder',)

    Source:
        Wang et al. 2023, ProtoKD (ICASSP), and the constants of the code the authors published. Its
        cross-entropy is weighted by class: `GroundTruth(class_weights=...)`.
    """
    check("protokd", POSITIVE, classes=classes)
    check("protokd", NOT_NEGATIVE, softened=softened, prototypes=prototypes)
    # The published divergence is a mean over classes, ours a sum.
    soft = HintonKL(temperature=10.0, scale_by_t2=False)
    return GroundTruth() + softened / classes * soft + prototypes * PrototypeSimilarity(tap)


def xie(*, zero_order: float = 1.0, first_order: float = 1.0) -> Objective:
    r"""Xie's distillation of segmentation: probabilities, and how they change between neighbours.

    :math:`L_\mathrm{GT} + \lambda_0 \lVert p_t - p_s \rVert^2 + \lambda_1 (c_t - c_s)^2`.

    Args:
        zero_order: Weight of the probabilities.
        first_order: Weight of the local consistency maps.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> len(xie().terms)
        3

    Source:
        Xie et al. 2018, arXiv:1810.08476, of which the abstract alone could be read: the exact
        forms and weights could not be checked.
    """
    check("xie", NOT_NEGATIVE, zero_order=zero_order, first_order=first_order)
    return GroundTruth() + zero_order * ProbabilityMSE() + first_order * LocalConsistency()


def m3ae(*, features: float = 0.1, tap: str = "bottleneck") -> Objective:
    r"""M3AE's self-distillation: the same features, whichever modalities are there.

    :math:`L_\mathrm{GT} + 0.1 \mathrm{mean} (F_s - F_t)^2`. One network is student and teacher,
    `DistillationWrapper(MovingAverage(0), network, ...)`: as the student it sees some modalities,
    `PrivilegedInput(..., dropout=0.5)`, as the teacher all of them.

    Args:
        features: Weight of the features' distance.
        tap: Name of the tap on the features.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> m3ae()
        1 * GroundTruth() + 0.1 * FeatureL2(tap='bottleneck')

    Source:
        Liu et al. 2023, arXiv:2303.05302, and the constants of the code the authors published.
        There both sets of modalities are drawn alike, and the gradient flows into both; the
        supervised part is 0.7 Dice plus 0.3 BCE. Its pre-training and the learnt image that stands
        in for what is absent are no losses on a teacher.
    """
    check("m3ae", NOT_NEGATIVE, features=features)
    return GroundTruth() + features * FeatureL2(tap)


def passion(
    *, classes: int = 4, softened: float = 0.5, prototypes: float = 0.1, tap: str = "decoder"
) -> Objective:
    r"""PASSION's self-distillation: softened outputs, and similarity of features to prototypes.

    :math:`L_\mathrm{GT} + \frac{0.5}{C} T^2 \mathrm{KL} + 0.1 \mathrm{MSE}(M_s, M_t)`, T = 4.
    Needs a tap on the last decoder features:
    `taps={"decoder": Tap(teacher=..., student=...)}`. One network is student and teacher, as in
    `m3ae()`.

    Args:
        classes: Number of classes; the published divergence is a mean over classes too.
        softened: Weight of the divergence.
        prototypes: Weight of the similarity maps.
        tap: Name of the tap on the last decoder features.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> passion().taps
        ('decoder',)

    Source:
        Shi et al. 2024, arXiv:2407.14796, and the constants of the code the authors published. That
        clips probabilities at 0.005, so that a student who is wrong and sure gets no gradient; not
        so here. Its weights of the modalities, by how often each is there and how well it learns,
        are left out, as is the loss of each modality's own decoder.
    """
    check("passion", POSITIVE, classes=classes)
    check("passion", NOT_NEGATIVE, softened=softened, prototypes=prototypes)
    # The published divergence is a mean over classes, ours a sum.
    soft = HintonKL(temperature=4.0)
    return GroundTruth() + softened / classes * soft + prototypes * PrototypeSimilarity(tap)


def mstkdnet(
    *, classes: int = 4, consistency: float = 10.0, features: float = 0.2, tap: str = "bottleneck"
) -> Objective:
    r"""MST-KDNet: standardised logits, probabilities, and features.

    :math:`0.6 L_\mathrm{GT} + 10 \lVert p_t - p_s \rVert^2 + \frac{1}{C} T^2 \mathrm{KL}
    + 0.2 \mathrm{mean} (F_s - F_t)^2` with T = 7; the
    divergence is one of logits that are brought to mean 0 and variance 1 over classes. Each further
    level of features, such as a transformer layer, is one more `0.2 * FeatureL2(tap)`.

    Args:
        classes: Number of classes; the published divergence is a mean over classes too.
        consistency: Weight of the probabilities.
        features: Weight of the features' distance.
        tap: Name of the tap on the features.

    Returns:
        The objective.

    Raises:
        ObjectiveError: If a constant has no meaning.

    Example:
        >>> mstkdnet().named_terms["hinton_kl"]
        (0.25, HintonKL(temperature=7.0, standardise=True))

    Source:
        Zhu et al. 2025, arXiv:2507.22626, and the constants of the code the authors published. That
        code standardises over the last spatial axis, hands student and teacher to the divergence in
        reverse, and divides it by the batch twice; this is the form of Sun et al. 2024,
        arXiv:2403.01427. The published weight of the probabilities grows to 10 in 20 epochs, as
        `Ramp(0, 10, steps=20 * len(loader), curve="exponential")`; a teacher that is trained along
        has `0.4 * GroundTruth(of="teacher")`. The adversarial loss of style (0.0002) and the loss
        on attention maps (1e8) are left out.
    """
    check("mstkdnet", POSITIVE, classes=classes)
    check("mstkdnet", NOT_NEGATIVE, consistency=consistency, features=features)
    soft = 1 / classes * HintonKL(temperature=7.0, standardise=True)
    alike = consistency * ProbabilityMSE() + features * FeatureL2(tap)
    return 0.6 * GroundTruth() + soft + alike
