import pytest
import torch

from kdnet.config import ObjectiveConfig
from kdnet.errors import UserError
from kdnet.models import KDNet
from kdnet.models.synthesis import SynthesisNetwork
from kdnet.recipes.lesson import Setting
from kdnet.recipes.synthesis import privileged_modalities, synthesise_then_segment
from privdistill import DistillationWrapper

MODALITIES = ("flair", "t1", "t1ce", "t2")


def lesson(network, teacher_view=MODALITIES, view=("t1ce",)):
    setting = Setting(network, (), ObjectiveConfig(), MODALITIES, view, teacher_view)
    return synthesise_then_segment(setting)


def network(**options):
    return SynthesisNetwork(1, 4, segmenter_arguments={"channels": [4, 8]}, **options)


def test_the_generator_is_compared_with_the_privileged_modality():
    student = network()
    found = lesson(student)
    image, target = torch.randn(1, 4, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.long)
    with DistillationWrapper(
        found.teacher,
        student,
        objective=found.objective,
        inputs=found.inputs,
        taps=found.taps,
        example=torch.zeros(1, 4, 8, 8, 8),
    ) as kd:
        out = kd(image, target)
        synthesis = student.generator(image[:, 2:3])
        assert torch.allclose(out.terms["synthesis_l1"], (synthesis - image[:, :1]).abs().mean())
        out.loss.backward()
    assert all(weights.grad is not None for weights in student.parameters())


def test_generator_and_segmenter_learn_apart():
    student = network()
    (weight, reference), (_, synthesis) = lesson(student).objective.named_terms.values()
    assert (weight.at(0), reference.taps, synthesis.taps) == (1.0, (), ("synthesis",))


def test_flair_is_what_is_synthesised_or_else_all_that_is_privileged():
    assert privileged_modalities(("t1ce",), MODALITIES) == ("flair",)
    assert privileged_modalities(("flair",), MODALITIES) == ("t1", "t1ce", "t2")
    found = lesson(network(synthesised=2), teacher_view=("t1", "t1ce", "t2"))
    assert found.inputs.teacher == ("t1", "t2")


def test_misfits_are_named():
    with pytest.raises(UserError, match=r"makes 2 modalities, t1, t2, but the network makes 1"):
        lesson(network(), teacher_view=("t1", "t1ce", "t2"))
    with pytest.raises(UserError, match=r"the network makes 0\. Set backbone: synthesis"):
        lesson(KDNet(1, 4, (4, 8)))
    with pytest.raises(UserError, match="both see t1ce"):
        lesson(network(), teacher_view=("t1ce",))
