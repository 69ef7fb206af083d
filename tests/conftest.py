"""Tiny networks and inputs shared by the suite."""

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    PrivilegedInput,
    SoftTargetDiceBCE,
)

# Shells start programs in the background without Ctrl-C, which tests of signals send themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The networks are tiny, the processes of pytest-xdist many: threads would only wait for each other.
torch.set_num_threads(1)

# HYPOTHESIS_PROFILE=nightly looks much further than there is time for in every run.
slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ordinary", max_examples=200, derandomize=True, **slow)
settings.register_profile("nightly", max_examples=10_000, print_blob=True, **slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))


class TinyUNet(nn.Module):
    """Two levels, one skip connection, a bottleneck called by its name."""

    def __init__(self, in_channels: int, out_channels: int = 3, width: int = 4, axes: int = 2):
        super().__init__()
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        self.encoder = nn.Sequential(conv(in_channels, width, 3, padding=1), nn.LeakyReLU())
        self.down = conv(width, width, 2, stride=2)
        self.bottleneck = nn.Sequential(conv(width, 2 * width, 3, padding=1), nn.LeakyReLU())
        self.up = nn.Upsample(scale_factor=2)
        self.head = conv(3 * width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x)
        deep = self.up(self.bottleneck(self.down(skip)))
        return self.head(torch.cat((skip, deep), dim=1))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_unet() -> type[TinyUNet]:
    return TinyUNet


@pytest.fixture
def networks(tiny_unet):
    return tiny_unet(4), tiny_unet(1)


@pytest.fixture
def build(networks):
    """KD-Net's objective on the tiny networks; any option of the wrapper can be another one."""

    def make(**options):
        teacher, student = options.pop("teacher", networks[0]), options.pop("student", networks[1])
        kdnet = 0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10.0 * LatentKL()
        inputs = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",))
        usual = {"objective": kdnet, "inputs": inputs, "example": torch.zeros(1, 4, 8, 8)}
        return DistillationWrapper(teacher, student, **usual | options)

    return make


def leave_out(patch, distances=True):
    patch.setattr("kdnet.results.collected._main_tables", lambda _: [])
    patch.setattr("kdnet.results.collected.write_report", lambda root, _: root)
    if distances:
        patch.setattr("kdnet.evaluation.scoring.surface_scores", lambda *_, **__: (1.0, 0.5))


@pytest.fixture
def training_alone(monkeypatch):
    """Leaves out what takes longer than the training of tiny networks: distances, tables, page."""
    leave_out(monkeypatch)


@pytest.fixture(scope="session")
def train_alone():
    """Runs a program without them, for runs that several tests look at."""

    def start(program, arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            leave_out(patch, **options)
            return program.main(arguments)

    return start


@pytest.fixture
def refusal(capsys):
    """Starts a program that refuses its arguments; gives what it says of them."""

    def start(program, *arguments):
        assert program.main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return start
