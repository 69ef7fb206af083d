"""Synthesise a privileged modality and segment with it: a negative result of the paper."""

from torch import Tensor, nn

from kdnet.errors import UserError
from kdnet.models.synthesis import SynthesisNetwork
from kdnet.recipes.distillation import ground_truth
from kdnet.recipes.lesson import Lesson, Setting
from kdnet.recipes.terms import SynthesisL1
from privdistill import PrivilegedInput, Tap


class PrivilegedImage(nn.Module):
    """The teacher of a generator: the privileged modalities themselves, in a layer to be tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Return the image, (B, M, *spatial), as it came."""
        real: Tensor = self.image(image)
        return real


def synthesise_then_segment(setting: Setting) -> Lesson:
    """Learn to make the privileged modality from the view, and to segment with what was made."""
    # Source: Hu et al. 2020, arXiv:2106.09564, section 3.3, "Observations". Both networks are
    # trained together here, where the paper synthesises first: the segmenter sees the generator
    # improve.
    privileged = privileged_modalities(setting.view, setting.teacher_view)
    made = _synthesised(setting.network)
    if made != len(privileged):
        raise UserError(
            f"The recipe synthesised makes {len(privileged)} modalities, {', '.join(privileged)}, "
            f"but the network makes {made}. Set backbone: synthesis and backbone_arguments: "
            f"{{synthesised: {len(privileged)}}}."
        )
    return Lesson(
        teacher=PrivilegedImage(),
        network=setting.network,
        objective=ground_truth(setting.options) + 1.0 * SynthesisL1("synthesis"),
        inputs=PrivilegedInput(setting.modalities, student=setting.view, teacher=privileged),
        taps={"synthesis": Tap(teacher="image", student="generator", adapter=None)},
    )


def privileged_modalities(view: tuple[str, ...], teacher_view: tuple[str, ...]) -> tuple[str, ...]:
    """Say what is synthesised: FLAIR, as the paper tried, or else all that the teacher sees more.

    >>> privileged_modalities(("t1ce",), ("flair", "t1", "t1ce"))
    ('flair',)
    >>> privileged_modalities(("ct",), ("ct", "pet", "mr"))
    ('pet', 'mr')
    """
    more = tuple(name for name in teacher_view if name not in view)
    if not more:
        raise UserError(
            f"The recipe synthesised needs modalities that only teachers see; both see "
            f"{', '.join(view)}. Set --student_modalities and --teacher_modalities."
        )
    return ("flair",) if "flair" in more else more


def _synthesised(network: nn.Module) -> int:
    """Number of modalities that a network makes; a compiled one holds it inside."""
    plain = getattr(network, "_orig_mod", network)
    return plain.synthesised if isinstance(plain, SynthesisNetwork) else 0
