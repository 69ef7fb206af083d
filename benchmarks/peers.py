"""The same step by other libraries, which need not be installed."""

import logging
import warnings

import torch
from torch import Tensor, nn

from contest import Contestant
from network import World
from steps import ADAM, dice_bce, finish, latent_kl, soft_dice_bce


def torchdistill(world: World) -> Contestant:
    """Its `DistillationBox` with a weighted sum of three criteria.

    Raises:
        ImportError: If it is not installed.
    """
    from torchdistill.core.distillation import get_distillation_box  # noqa: PLC0415
    from torchdistill.core.interfaces.registry import (  # noqa: PLC0415
        register_forward_proc_func,
    )
    from torchdistill.losses.mid_level import SimpleLossWrapper  # noqa: PLC0415

    @register_forward_proc_func
    def forward_first_modality(model, sample_batch, *_, **_others):  # noqa: ANN001, ANN002, ANN003, ANN202
        return model(sample_batch[:, :1])

    def term(function, path, weight, *, label=False):  # noqa: ANN001, ANN202
        own = {"is_from_teacher": False, "module_path": path, "io": "output"}
        other = {"uses_label": True} if label else own | {"is_from_teacher": True}
        return {
            "criterion": SimpleLossWrapper(function, input=own, target=other),
            "weight": weight,
        }

    terms = {
        "target": term(dice_bce, ".", 0.5, label=True),
        "soft": term(soft_dice_bce, ".", 0.25),
        "latent": term(latent_kl, "bottleneck", 0.25),
    }
    hooks = {"output": ["bottleneck"]}
    config = {
        "num_epochs": 1,
        "teacher": {
            "requires_grad": False,
            "forward_proc": "forward_batch_only",
            "forward_hook": hooks,
        },
        "student": {"forward_proc": "forward_first_modality", "forward_hook": hooks},
        "optimizer": {"key": "Adam", "kwargs": ADAM},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    # The box leaves the teacher in the mode it came in.
    world.teacher.eval()
    device = torch.device("cpu")
    box = get_distillation_box(world.teacher, world.student, {}, config, device, None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step() -> Tensor:
        loss = box.forward_process(world.image, world.target)
        box.post_forward_process(loss=loss)
        return loss.detach()

    return Contestant(step, world.student)


class Criterion(nn.modules.loss._Loss):  # noqa: SLF001
    """A function in the form that modelopt takes."""

    def __init__(self, function) -> None:  # noqa: ANN001
        super().__init__()
        self.function = function

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.function(student, teacher)


class FirstModality(nn.Module):
    """The student behind a slice, as modelopt feeds both networks the same input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image[:, :1])


def modelopt(world: World) -> Contestant:
    """NVIDIA's ModelOpt in its mode `kd_loss`.

    Raises:
        ImportError: If it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.distill as mtd  # noqa: PLC0415

    criteria = {
        ("", ""): Criterion(soft_dice_bce),
        ("network.bottleneck", "bottleneck"): Criterion(latent_kl),
    }
    # What the balancer's weights leave of one goes to the student's own loss.
    settings = {
        "teacher_model": world.teacher,
        "criterion": criteria,
        "loss_balancer": mtd.StaticLossBalancer([0.25, 0.25]),
    }
    model = mtd.convert(FirstModality(world.student), mode=[("kd_loss", settings)])
    optimizer = torch.optim.Adam(model.network.parameters(), **ADAM)
    model.train()

    def step() -> Tensor:
        own = dice_bce(model(world.image), world.target)
        return finish(model.compute_kd_loss(student_loss=own), optimizer)

    return Contestant(step, model.network)


PEERS = {"torchdistill": torchdistill, "modelopt": modelopt}
