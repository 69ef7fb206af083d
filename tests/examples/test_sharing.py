import pytest
import torch

from kdnet.config import ObjectiveConfig
from kdnet.errors import UserError
from kdnet.models import HeMIS, KDNet, MultiResUNet
from kdnet.recipes.lesson import Setting
from kdnet.recipes.sharing import deepest_layer, share_deepest_layers
from privdistill import DistillationWrapper

MODALITIES = ("flair", "t1", "t1ce", "t2")
WIDTHS = (4, 8)


def lesson(student, teacher, **options):
    teachers = () if teacher is None else (teacher,)
    setting = Setting(
        student, teachers, ObjectiveConfig(**options), MODALITIES, ("t1ce",), MODALITIES
    )
    return share_deepest_layers(setting)


def copies(module):
    return {name: weights.detach().clone() for name, weights in module.named_parameters()}


def test_shared_layers_are_the_teachers_and_stay_so_while_all_others_learn():
    teacher, student = KDNet(4, 4, WIDTHS), KDNet(1, 4, WIDTHS)
    found = lesson(student, teacher)
    shared, before = copies(teacher.bottleneck), copies(student)
    with DistillationWrapper(
        found.teacher,
        student,
        objective=found.objective,
        inputs=found.inputs,
        taps=found.taps,
        example=torch.zeros(1, 4, 8, 8, 8),
    ) as kd:
        optimizer = torch.optim.Adam(kd.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            target = torch.randint(0, 4, (1, 8, 8, 8))
            kd(torch.randn(1, 4, 8, 8, 8), target).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = copies(student)
    assert all(torch.equal(after[f"bottleneck.{name}"], value) for name, value in shared.items())
    others = [name for name in after if not name.startswith("bottleneck.")]
    # A bias before an instance norm has no influence, and Adam leaves it to rounding.
    assert all(not torch.equal(after[name], before[name]) for name in others if "weight" in name)


def test_everything_else_is_the_whole_objective():
    found = lesson(KDNet(1, 4, WIDTHS), KDNet(4, 4, WIDTHS))
    assert list(found.objective.named_terms) == [
        "soft_target_dice_bce",
        "ground_truth",
        "latent_kl",
    ]


def test_the_two_networks_keep_weights_of_their_own():
    teacher, student = KDNet(4, 4, WIDTHS), KDNet(1, 4, WIDTHS)
    lesson(student, teacher)
    pairs = zip(student.bottleneck.parameters(), teacher.bottleneck.parameters(), strict=True)
    assert all(mine is not theirs and torch.equal(mine, theirs) for mine, theirs in pairs)


def test_the_layer_can_be_named():
    teacher, student = KDNet(4, 4, WIDTHS), KDNet(1, 4, WIDTHS)
    lesson(student, teacher, bottleneck_layer="encoder.0.second")
    assert not any(part.requires_grad for part in student.encoder[0].second.parameters())
    assert all(part.requires_grad for part in student.bottleneck.parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (KDNet(1, 4, WIDTHS), None, {}, "needs a teacher"),
        (KDNet(1, 4, (4, 6)), KDNet(4, 4, WIDTHS), {}, "same weights in both networks"),
        (MultiResUNet(1, 4, (4, 8)), KDNet(4, 4, WIDTHS), {}, "same weights in both networks"),
        (KDNet(1, 4, WIDTHS), KDNet(4, 4, WIDTHS), {"bottleneck_layer": "deep"}, "no layer 'deep'"),
        (HeMIS(1, 4, WIDTHS), HeMIS(4, 4, WIDTHS), {}, "same weights in both networks"),
    ],
)
def test_layers_that_cannot_be_shared_are_refused(student, teacher, options, message):
    with pytest.raises(UserError, match=message):
        lesson(student, teacher, **options)


def test_networks_without_a_bottleneck_by_name_must_name_it():
    with pytest.raises(UserError, match=r"none called 'bottleneck'.*--bottleneck_layer"):
        deepest_layer(ObjectiveConfig(), torch.nn.Sequential())
