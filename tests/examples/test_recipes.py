"""Every recipe takes training steps through the wrapper."""

import pytest
import torch

from kdnet.config import ObjectiveConfig
from kdnet.models import build_network
from kdnet.recipes.lesson import Setting
from kdnet.recipes.missing_modality import missing_modality
from kdnet.recipes.objectives import taught_by_objective
from kdnet.recipes.sharing import share_deepest_layers
from kdnet.recipes.synthesis import synthesise_then_segment
from privdistill import DistillationWrapper

MODALITIES = ("flair", "t1", "t1ce", "t2")
KDNET = {"channels": [4, 8]}
OBJECTIVES = ("kdnet", "hinton", "generalized", "xie", "structured", "pmkl", "protokd")


def setting(backbone, arguments, view=("t1ce",), teacher=False, **options):
    return Setting(
        network=build_network(backbone, arguments, in_channels=len(view), out_channels=4),
        teachers=(build_network("kdnet", KDNET, in_channels=4, out_channels=4),) * teacher,
        options=ObjectiveConfig(**options),
        modalities=MODALITIES,
        view=view,
        teacher_view=MODALITIES,
    )


def lessons():
    fusion = {"channels": [4, 8], "style_channels": 2}
    synthesis = {"segmenter_arguments": KDNET}
    return {
        "hemis": lambda: missing_modality(setting("hemis", KDNET, MODALITIES)),
        "uhved": lambda: missing_modality(setting("uhved", KDNET, MODALITIES)),
        "gated_fusion": lambda: missing_modality(setting("gated_fusion", fusion, MODALITIES)),
        "concatenated": lambda: missing_modality(setting("kdnet", KDNET, MODALITIES)),
        "synthesised": lambda: synthesise_then_segment(setting("synthesis", synthesis)),
        "shared": lambda: share_deepest_layers(setting("kdnet", KDNET, teacher=True)),
    } | {
        name: lambda name=name: taught_by_objective(
            setting("kdnet", KDNET, teacher=True, objective=name)
        )
        for name in OBJECTIVES
    }


@pytest.mark.parametrize("name", lessons())
def test_every_recipe_lowers_its_loss_and_can_be_validated(name):
    lesson = lessons()[name]()
    image = torch.randn(2, 4, 16, 8, 8)
    target = torch.nn.functional.one_hot((image[:, 2] > 0.5).long(), 4).movedim(-1, 1).float()
    with DistillationWrapper(
        lesson.teacher,
        lesson.network,
        objective=lesson.objective,
        inputs=lesson.inputs,
        taps=lesson.taps,
        example=torch.zeros(1, 4, 16, 8, 8),
    ) as kd:
        optimizer = torch.optim.Adam(kd.parameters(), lr=0.01)
        losses = []
        for _ in range(5):
            loss = kd(image, target).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert torch.isfinite(torch.tensor(losses)).all()
        assert losses[-1] < losses[0]
        kd.eval()
        with torch.no_grad():
            out = kd(image, target)
        assert torch.isfinite(out.loss)
        assert out.student.shape == target.shape
        assert kd.predict(image).shape == target.shape
