"""The matrix: networks nobody here wrote, as teacher and as student, without code for them."""

import os
import re
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, Network
from torch import nn
from versions import needs_quicknat

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    LayerNotFoundError,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Tap,
)
from privdistill.taps.tap import as_layer

PAGE = Path(__file__).parent.parent / "docs" / "networks.md"
WRITING = bool(os.environ.get("PRIVDISTILL_WRITE_PAGES"))
# Small enough that the gradient's promise holds in the most curved of the networks.
FALL = 0.0005
INPUTS = PrivilegedInput(("a", "b"), student=("b",))
HEADINGS = {
    "networks": ("network", "from", "axes", "returns", "bottleneck", "shape", "how"),
    "pairs": ("teacher", "student", "teacher's features", "student's features", "adapter"),
}
# Teacher and student of different families; both are given the size of the first.
PAIRS = [
    ("UNETR 3-D", "BasicUNet 3-D"),
    ("UNETR 3-D", "DynUNet 3-D"),
    ("SwinUNETR 3-D", "SegResNet 3-D"),
    ("SegResNet 3-D", "ResidualEncoderUNet 3-D, deep supervision"),
    ("BasicUNet 3-D", "DynUNet 3-D, deep supervision"),
    ("ResidualEncoderUNet 3-D, deep supervision", "UNet 3-D"),
    ("UNETR 2-D", "MultiResUNet 2-D"),
    ("UNETR 2-D", "Unet, ResNet-18"),
    ("Segformer, MiT-B0", "Unet, ResNet-18"),
    ("Unet, EfficientNet-B0", "Segformer, MiT-B0"),
    ("DPT, ViT-tiny", "FPN, ResNet-18"),
    ("FPN, ResNet-18", "DPT, ViT-tiny"),
    ("DeepLabV3, ResNet-18", "features of EfficientNet-Lite0"),
    ("DeepLabV3, ResNet-14", "UNet 2-D"),
    ("LR-ASPP, MobileNetV3", "features of ResNet-10t"),
    ("features of Swin (channels last)", "Unet, timm MobileNetV3"),
    ("MedNeXt 3-D", "KDNet 3-D"),
]
BY_NAME = {network.name: network for network in NETWORKS}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _quick_random_weights(monkeypatch):
    """Initialisation by truncated normals takes longer than the whole step, and changes nothing."""
    monkeypatch.setattr(nn.init, "trunc_normal_", nn.init.normal_)


@pytest.fixture(autouse=True, scope="module")
def _page_without_rows():
    """Rows that are no longer true must not outlive the page that is written."""
    if WRITING:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(re.sub(r"(\| ---.*\n)(\|.*\n)*", r"\1", text), encoding="utf-8")


def wrap(teacher: Network, student: Network, networks=None) -> DistillationWrapper:
    taps = {}
    if teacher.by_hand or student.by_hand:
        sides = (n.bottleneck if n.by_hand else None for n in (teacher, student))
        taps = {"bottleneck": Tap(*sides)}
    return DistillationWrapper(
        *(networks or (teacher.make(2), student.make(1))),
        objective=0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10.0 * LatentKL(),
        inputs=INPUTS,
        taps=taps,
        example=torch.zeros(1, 2, *teacher.size),
    )


def losses_around_a_step(kd, size):
    """The loss of one batch before and after a step that should take off `FALL` of it."""
    image, labels = torch.randn(2, 2, *size), torch.randint(0, 2, (2, *size))
    state = torch.get_rng_state()
    before = kd(image, labels).loss
    before.backward()
    gradients = [p.grad for p in kd.parameters() if p.grad is not None]
    steepness = torch.stack(torch._foreach_norm(gradients)).square().sum()
    torch.optim.SGD(kd.parameters(), lr=float(FALL * before.detach() / steepness)).step()
    # dropout must be the same before and after
    torch.set_rng_state(state)
    return before.item(), kd(image, labels).loss.item()


def tensors(model):
    """Parameters and buffers, also those that no checkpoint keeps."""
    return [*model.parameters(), *model.buffers()]


def flags(model):
    """What a wrapper borrows: hooks, modes, and whether parameters learn."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return hooks, modes, [p.requires_grad for p in model.parameters()]


def shape(kd, role):
    """Of the row of the printed table that is about the bottleneck of one network."""
    row = next(line for line in str(kd).splitlines() if f" {role}  " in line and " x " in line)
    return re.search(r"\d+( x \d+)+", row)[0]


def check_row(table, cells):
    """Compare one row of the page with what was found, or write it."""
    row = f"| {' | '.join(cells)} |"
    text = PAGE.read_text(encoding="utf-8")
    lines = text.splitlines()
    start = lines.index(f"| {' | '.join(HEADINGS[table])} |") + 2
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    if row in lines[start:end]:
        return
    assert WRITING, f"docs/networks.md lacks {row}; PRIVDISTILL_WRITE_PAGES=1 pytest -n 0 writes it"
    PAGE.write_text("\n".join([*lines[:end], row, *lines[end:]]) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(net, marks=[needs_quicknat] if "QuickNAT" in net.name else [])
        for net in NETWORKS
    ],
    ids=lambda net: net.name,
)
def test_a_network_teaches_and_learns(network):
    networks = network.make(2), network.make(1)
    as_they_came = [flags(net) for net in networks]
    kd = wrap(network, network, networks)
    tap = kd.taps["bottleneck"]
    assert [as_layer(of).layer for of in (tap.student, tap.teacher)] == [network.bottleneck] * 2
    frozen = [tensor.clone() for tensor in tensors(kd.teacher)]
    before, after = losses_around_a_step(kd, network.size)
    assert after < before
    assert all(map(torch.equal, tensors(kd.teacher), frozen))
    how = f"named: {network.by_hand}" if network.by_hand else "found"
    cells = (network.name, network.library, str(len(network.size)), network.output)
    check_row("networks", (*cells, f"`{network.bottleneck}`", shape(kd, "student"), how))
    kd.close()
    assert [flags(net) for net in networks] == as_they_came


@pytest.mark.parametrize(
    ("teacher", "student"), PAIRS, ids=[" teaches ".join(pair) for pair in PAIRS]
)
def test_one_family_teaches_another(teacher, student):
    size = BY_NAME[teacher].size
    kd = wrap(BY_NAME[teacher], BY_NAME[student])
    before, after = losses_around_a_step(kd, size)
    assert after < before
    check_row("pairs", (teacher, student, shape(kd, "teacher"), shape(kd, "student"), adapter(kd)))


def adapter(kd):
    """The last cell of the student's row of the printed table."""
    row = next(line for line in str(kd).splitlines() if " student  " in line and " x " in line)
    return re.split(r"  +", row.strip())[-1]


def test_the_page_has_a_row_for_each_network_and_no_other():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [row.strip("| ").split(" | ") for row in rows]
    heads = [index for index, row in enumerate(rows) if set(row) <= set("|- ")]
    first, second = cells[heads[0] + 1 : heads[1] - 1], cells[heads[1] + 1 :]
    assert [row[0] for row in first] == [network.name for network in NETWORKS]
    assert [tuple(row[:2]) for row in second] == PAIRS
    assert len(NETWORKS) >= 40


@pytest.mark.parametrize("name", [n.name for n in NETWORKS if n.by_hand])
def test_where_the_rule_finds_none_or_two_the_error_says_so(name):
    network = BY_NAME[name]
    with pytest.raises(LayerNotFoundError, match=r"taps=\{'bottleneck': Tap"):
        DistillationWrapper(
            network.make(1),
            network.make(1),
            objective=1.0 * LatentKL(),
            example=torch.zeros(1, 1, *network.size),
        )
