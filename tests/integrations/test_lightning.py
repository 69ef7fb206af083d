"""Lightning's real Trainer on tiny networks."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    HolisticAdversarial,
    JointTeacher,
    LifecycleError,
    ObjectiveError,
    PrivilegedInput,
    Ramp,
    SoftTargetDiceBCE,
    TeacherCache,
    kdnet,
)

lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")

from privdistill.integrations.lightning import DistillationModule  # noqa: E402

# Lightning advises on loaders and workers, and torch on what Lightning calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
MODALITIES = ("flair", "t1", "t1ce", "t2")


class Samples(Dataset):
    """Six images; only two thirds of them have a reference."""

    def __init__(self, **more):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(6, 4, 8, 8, generator=generator)
        self.targets = torch.randint(0, 3, (6, 8, 8), generator=generator)
        self.more = more

    def __len__(self):
        return 6

    def __getitem__(self, index):
        more = {name: value(index) for name, value in self.more.items()}
        return {"image": self.images[index], "label": self.targets[index], **more}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def module(build, **options):
    torch.manual_seed(0)
    return DistillationModule(build(), adam, names={"target": "label"}, **options)


def trainer(folder, epochs, **options):
    usual = {
        "accelerator": "cpu",
        "max_epochs": epochs,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(**usual | options)


def loader(shuffle=False, **more):
    return DataLoader(Samples(**more), batch_size=2, shuffle=shuffle)


def test_every_term_is_logged(build, tmp_path):
    fit = trainer(tmp_path, 1, enable_checkpointing=False)
    fit.fit(module(build), loader(), loader())
    names = ("loss", "soft_target_dice_bce", "ground_truth", "latent_kl")
    assert {f"val/{name}" for name in names} <= set(fit.callback_metrics)
    assert {f"train/{name}_epoch" for name in names} <= set(fit.callback_metrics)


def test_a_training_equals_the_plain_loop(build, tmp_path):
    trained = module(build)
    trainer(tmp_path, 2, enable_checkpointing=False).fit(trained, loader())
    torch.manual_seed(0)
    kd = build()
    plain = trained.kd.student.__class__(1)
    del plain
    optimizer = adam(kd.parameters())
    for batch in [*loader(), *loader()]:
        optimizer.zero_grad()
        kd(batch["image"], batch["label"]).loss.backward()
        optimizer.step()
    assert kd.steps == trained.kd.steps == 6
