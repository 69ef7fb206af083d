"""What KD-Net is compared with: networks for any subset of modalities, and negative results."""

from collections import OrderedDict

from torch import nn

from kdnet.errors import UserError
from kdnet.models.gated_fusion import GatedFusionNet
from kdnet.models.synthesis import SynthesisNetwork
from kdnet.models.uhved import UHVED
from kdnet.recipes.kdnet import Recipe, Setting, ground_truth, uncompiled
from kdnet.recipes.objectives import distilled
from kdnet.recipes.terms import Reconstruction, StyleDivergence, SubsetDivergence
from privdistill import FeatureL1, Objective, PrivilegedInput, Tap


def missing_modality(setting: Setting) -> Recipe:
    """Learn from the reference with a random subset of the modalities in every step."""
    # Source: HeMIS: Havaei et al. 2016, arXiv:1607.05194; U-HVED: Dorent et al. 2019,
    # arXiv:1907.11150; gated fusion: Chen et al. 2019, arXiv:2002.09708. The segmentation loss is
    # the one that all rows share, in place of their own.
    if len(setting.view) < 2:
        raise UserError(
            f"The recipe missing_modality hides modalities, and here {setting.view[0]} is the only "
            "one. Give the row role: teacher, or two student_modalities or more."
        )
    reference, extra = ground_truth(setting.options), extra_terms(uncompiled(setting.network))
    # Networks with terms of their own draw subsets by themselves.
    inputs = PrivilegedInput(
        setting.modalities, student=setting.view, dropout=0.5 if extra is None else 0.0
    )
    objective = 1.0 * reference if extra is None else reference + extra
    return Recipe(None, setting.network, objective, inputs)


def extra_terms(network: nn.Module) -> Objective | None:
    """Return what a network's loss holds besides the segmentation: 0.1 of each, as published."""
    if isinstance(network, UHVED):
        return 0.1 * SubsetDivergence() + 0.1 * Reconstruction("squared")
    if isinstance(network, GatedFusionNet):
        return 0.1 * Reconstruction("absolute") + 0.1 * StyleDivergence()
    return None


def synthesise_then_segment(setting: Setting) -> Recipe:
    """Learn to make the privileged modality from the view, and to segment with what was made."""
    # Source: Hu et al. 2020, arXiv:2106.09564, section 3.3, "Observations". Both networks are
    # trained together here, where the paper synthesises first: the segmenter sees the generator
    # improve.
    privileged = privileged_modalities(setting.view, setting.teacher_view)
    network = uncompiled(setting.network)
    made = network.synthesised if isinstance(network, SynthesisNetwork) else 0
    if made != len(privileged):
        raise UserError(
            f"The recipe synthesised makes {', '.join(privileged)}, the network makes {made}. Set "
            f"backbone: synthesis, backbone_arguments: {{synthesised: {len(privileged)}}}."
        )
    # The usual loss of image synthesis; Hu et al. 2020, arXiv:2106.09564, name none.
    synthesis = FeatureL1("synthesis").named("synthesis_l1")
    return Recipe(
        # It teaches the privileged modalities themselves, in a layer that can be tapped.
        teacher=nn.Sequential(OrderedDict(image=nn.Identity())),
        network=setting.network,
        objective=ground_truth(setting.options) + 1.0 * synthesis,
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
            f"{', '.join(view)}. Set --student-modalities and --teacher-modalities."
        )
    return ("flair",) if "flair" in more else more


def share_deepest_layers(setting: Setting) -> Recipe:
    """Give the student the teacher's deepest layers, fixed, and distil as usual."""
    # Source: Hu et al. 2020, arXiv:2106.09564, section 3.3, "Observations": weights shared between
    # teacher and student in the deepest layers; the result was almost that of KD-Net, slightly
    # worse. Which layers, whether they went on learning, and with which loss, is not said; fixed
    # layers of the trained teacher and the whole objective are ours.
    option = setting.options.bottleneck_layer
    name = "bottleneck" if option == "auto" else option
    try:
        networks = (uncompiled(setting.network), uncompiled(setting.teachers[0]))
        student, teacher = (network.get_submodule(name) for network in networks)
        student.load_state_dict(teacher.state_dict())
    except (AttributeError, RuntimeError) as error:
        raise UserError(
            f"The recipe shared cannot copy layer {name!r} from the teacher: {error}. Give both "
            "the same backbone and arguments, or name the deepest layers: --bottleneck-layer."
        ) from error
    if not student.state_dict():
        raise UserError(f"Layer {name!r} has no weights to share; name others: --bottleneck-layer.")
    # Fixed, or the student would unlearn what is shared.
    student.requires_grad_(requires_grad=False)
    return distilled(setting)
