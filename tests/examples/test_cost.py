import json

import torch
from torch import nn

from invented_runs import write_plan
from kdnet.data.description import load_description
from kdnet.models import build_network
from kdnet.results.cost import cost_table, flops, parameters
from kdnet.results.stored import read_folder

CONVOLUTION = nn.Conv3d(2, 8, 3, padding=1)
SHAPE = (1, 2, 4, 6, 8)


class LooksAtValues(nn.Module):
    """A network that cannot run without numbers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv3d(2, 8, 3, padding=1)

    def forward(self, image):
        return self.inner(image) if bool((image == 0).all()) else image


def test_parameters_and_operations_of_a_convolution_by_hand():
    assert parameters(CONVOLUTION) == 8 * 2 * 27 + 8
    frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)
    assert parameters(nn.Sequential(frozen, nn.Linear(3, 1))) == 4
    assert flops(CONVOLUTION, SHAPE) == 2 * (4 * 6 * 8) * 8 * 2 * 27
    assert flops(LooksAtValues(), SHAPE) == flops(CONVOLUTION, SHAPE)


def test_network_of_the_paper_counts_without_being_run():
    network = build_network("kdnet", {}, in_channels=1, out_channels=4).train()
    assert flops(network, (1, 1, 128, 128, 128)) == 8 * flops(network, (1, 1, 64, 64, 64))
    assert network.training
    assert next(network.parameters()).device == torch.device("cpu")


def test_seconds_and_memory_come_from_the_first_unit(tmp_path):
    root = write_plan(tmp_path / "run", load_description("phantom"), cases=1)
    unit = root / "units" / "student" / "fold0-seed0"
    (unit / "history.csv").write_text("epoch,step,seconds\n1,5,50.0\n2,10,70.0\n")
    (unit / "unit.json").write_text(json.dumps({"peak_mib": {"process": 10, "device": 20.4}}))
    (root / "units" / "teacher" / "fold0-seed0" / "history.csv").unlink()
    teacher, _, student = cost_table(read_folder(root)).frame.to_numpy().tolist()
    assert student[0] == "student"
    assert student[3:] == ["2", "2.0", "60.0", "20"]
    assert teacher[3:6] == ["0", "\N{EN DASH}", "\N{EN DASH}"]
