"""docs/lineage.md: what its table says of a method can be typed, and trains."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import privdistill
from privdistill import Critic, DistillationWrapper, MovingAverage, PrivilegedInput, Tap
from privdistill.losses import presets

PAGE = Path(__file__).parent.parent / "docs" / "lineage.md"
TEXT = PAGE.read_text(encoding="utf-8")
TABLE = TEXT.split("## What can be written\n")[1].split("\n## ")[0]
TEACHERS = dict(re.findall(r"^- `(\w+)` is `([^`]+)`", TEXT, re.MULTILINE))
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in TABLE.splitlines()
    if line.startswith("| ") and "`" in line
]
EVERY = pytest.mark.parametrize("row", ROWS, ids=[row[0].split(",")[0] for row in ROWS])
NAMES = ("flair", "t1", "t1ce", "t2")


class UNet(nn.Module):
    """A network with the two layers that the rows tap."""

    def __init__(self, channels):
        super().__init__()
        self.bottleneck = nn.Sequential(nn.Conv2d(channels, 8, 2, stride=2), nn.LeakyReLU())
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 6, 1))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(self.decoder(self.bottleneck(x)))


def code(cell):
    (found,) = re.findall(r"^`([^`]+)`$", cell)
    return found


def typed(text, **names):
    """What a piece of code is, evaluated with the public names."""
    public = {name: getattr(privdistill, name) for name in privdistill.__all__}
    return eval(text, public | names)


@EVERY
def test_a_row_trains_as_it_is_typed(row):
    teacher = typed(TEACHERS[code(row[1])], teacher=UNet(4), other=UNet(4))
    objective = typed(code(row[2]), critic=Critic(4 + 1, axes=2))
    shared = isinstance(teacher, MovingAverage)
    inputs = PrivilegedInput(NAMES, student=("t1ce",))
    if shared:  # one network sees what the other does, but for what is hidden
        inputs = PrivilegedInput(NAMES, student=NAMES, dropout=0.5)
    kd = DistillationWrapper(
        teacher,
        UNet(4 if shared else 1),
        objective=objective,
        inputs=inputs,
        taps={tap: Tap(tap, tap) for tap in (1.0 * objective).taps},
        example=torch.zeros(1, 4, 8, 8),
    )
    out = kd(torch.randn(2, 4, 8, 8), torch.arange(4).repeat(2, 8, 2))
    out.loss.backward()
    assert out.loss.isfinite()
    assert len(out.terms) > 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in kd.student.parameters())


@EVERY
def test_a_row_has_all_its_cells(row):
    assert len(row) == 4
    assert all(row)


def test_every_preset_is_a_method_of_the_page():
    names = [name for name, kind in vars(presets).items() if kind.__class__.__name__ == "function"]
    own = [name for name in names if getattr(presets, name).__module__ == presets.__name__]
    assert len(own) == 10
    assert [name for name in own if f"`{name}()" not in TABLE] == []
