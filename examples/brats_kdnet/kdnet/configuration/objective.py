"""Options of the student's objective."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObjectiveConfig:
    """The student's objective: lambda L_KD + (1 - lambda) L_GT + alpha L_KL.

    Args:
        recipe: "auto" gives imitation, temperature, binarisation and latent_weight the values that
            a study found best for small data (docs/results/when-it-helps), each of which may be
            given as well; "options" leaves them as they are. For train.py; crossval.py's rows say
            what they are.
        objective: "kdnet" (the paper, equation 5), or one of the field: "hinton", "generalized",
            "xie", "structured", "pmkl", "protokd", with the constants of the library's presets.
            The options below are those of "kdnet" and of the reference's Dice and cross-entropy.
        imitation: lambda, the weight of the teacher's soft targets. Source: the paper, 3.2.
        temperature: T of the teacher's soft targets. Source: the paper, 3.2.
        binarisation: What cross-entropy compares with: "auto" binarises the teacher's prediction as
            the paper does ("argmax" under softmax, "positive" logits under sigmoid), "soft" takes
            its probabilities.
        imitation_start: lambda in the first step, from where it goes to `imitation` in
            `imitation_steps` steps, along a straight line; constant if none is given.
        imitation_steps: Length of that way, training steps.
        region_weights: Weight of each output channel in the soft targets; all alike if none are
            given.
        out_of_fold: Into how many parts the labelled subjects are dealt, so that each is taught by
            teachers that were not trained on it: a further teacher is trained without each part.
            1 has the one teacher of the paper.
        latent_weight: alpha, the weight of the latent divergence. Source: the paper, 3.2.
        latent_layers: Layers of both networks whose divergences share alpha, instead of the
            bottleneck alone, such as encoder.2,bottleneck.
        bottleneck_layer: Layer whose output is E(x); "auto" takes the layer called "bottleneck"
            where the network has one and lets the library locate it otherwise. The paper leaves
            it open.
        teacher_bottleneck_layer: The same for the teacher; "auto" takes the layer of the student
            where both networks are of one class.
        latent_normalisation: How a bottleneck becomes a distribution; "softmax" is over all
            channels and voxels ("flattened and normalized", the paper, section 2.2).
        latent_temperature: Softmax temperature of the bottleneck; the paper mentions none.
        include_background: Whether the background channel counts in Dice and cross-entropy; the
            paper leaves it open.
        squared_denominator: Dice with squares in the denominator; the paper leaves it open.
        batch_dice: Dice over the whole batch instead of per subject; the paper leaves it open.
        smoothing: Added to Dice's numerator and denominator, voxels; the paper leaves it open.
    """

    recipe: Literal["options", "auto"] = "options"
    objective: Literal["kdnet", "hinton", "generalized", "xie", "structured", "pmkl", "protokd"] = (
        "kdnet"
    )
    imitation: float = 0.75
    temperature: float = 5.0
    binarisation: Literal["auto", "argmax", "positive", "soft"] = "auto"
    imitation_start: float | None = None
    imitation_steps: int = 1000
    region_weights: tuple[float, ...] | None = None
    out_of_fold: int = 1
    latent_weight: float = 10.0
    latent_layers: tuple[str, ...] | None = None
    bottleneck_layer: str = "auto"
    teacher_bottleneck_layer: str = "auto"
    latent_normalisation: Literal["softmax", "softmax_channel", "softmax_spatial", "l1"] = "softmax"
    latent_temperature: float = 1.0
    include_background: bool = True
    squared_denominator: bool = False
    batch_dice: bool = False
    smoothing: float = 1e-5
