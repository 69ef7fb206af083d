"""Every loss as a pure function: `import privdistill.functional as F`.

Order is student, teacher, target; options are keywords. Nothing of a step or a wrapper is needed;
each term's class calls the function of its name in snake case.
"""

from privdistill.losses.adversarial import critic_loss, holistic_adversarial
from privdistill.losses.features import (
    attention_transfer,
    channel_wise,
    feature_cosine,
    feature_l1,
    feature_l2,
    gram,
    latent_kl,
)
from privdistill.losses.functional import binarise, mix_logits, probabilities, resize
from privdistill.losses.learned import contrastive_projection, variational_information
from privdistill.losses.relational import (
    centered_kernel_alignment,
    local_consistency,
    pairwise_similarity,
    prototype_similarity,
)
from privdistill.losses.response import (
    hinton_kl,
    logit_mse,
    probability_mse,
    reliable_soft_target_ce,
    soft_target_dice_bce,
)
from privdistill.losses.supervised import ground_truth

__all__ = [
    "attention_transfer",
    "binarise",
    "centered_kernel_alignment",
    "channel_wise",
    "contrastive_projection",
    "critic_loss",
    "feature_cosine",
    "feature_l1",
    "feature_l2",
    "gram",
    "ground_truth",
    "hinton_kl",
    "holistic_adversarial",
    "latent_kl",
    "local_consistency",
    "logit_mse",
    "mix_logits",
    "pairwise_similarity",
    "probabilities",
    "probability_mse",
    "prototype_similarity",
    "reliable_soft_target_ce",
    "resize",
    "soft_target_dice_bce",
    "variational_information",
]
