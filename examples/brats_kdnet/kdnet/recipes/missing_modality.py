"""Train for every subset of modalities at once: the comparators that need no teacher."""

from typing import Protocol, runtime_checkable

from kdnet.errors import UserError
from kdnet.recipes.distillation import ground_truth
from kdnet.recipes.lesson import Lesson, Setting
from privdistill import Objective, PrivilegedInput


@runtime_checkable
class HasExtraTerms(Protocol):
    """A network that draws subsets of modalities itself and returns more than logits."""

    def extra_terms(self) -> Objective:
        """Return what its loss holds besides the segmentation."""


def missing_modality(setting: Setting) -> Lesson:
    """Learn from the reference with a random subset of the modalities in every step."""
    # Source: HeMIS: Havaei et al. 2016, arXiv:1607.05194; U-HVED: Dorent et al. 2019,
    # arXiv:1907.11150; gated fusion: Chen et al. 2019, arXiv:2002.09708. The segmentation loss is
    # the one that all rows share, in place of their own.
    if len(setting.view) < 2:
        raise UserError(
            f"The recipe missing_modality trains for every subset of what a network sees, and this "
            f"one sees {', '.join(setting.view)} alone. Give the row role: teacher, or two "
            "student_modalities or more."
        )
    network, reference = setting.network, ground_truth(setting.options)
    plain = getattr(network, "_orig_mod", network)
    if isinstance(plain, HasExtraTerms):
        objective, dropout = reference + plain.extra_terms(), 0.0
    else:
        objective, dropout = 1.0 * reference, 0.5
    return Lesson(
        teacher=None,
        network=network,
        objective=objective,
        inputs=PrivilegedInput(setting.modalities, student=setting.view, dropout=dropout),
    )
