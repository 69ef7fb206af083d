import json
import math

import pytest
import torch
from torch import nn

from kdnet.errors import UserError
from kdnet.models import build_network
from kdnet.results.cost import cost, cost_table, flops, parameters, scoring_seconds

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
    assert flops(CONVOLUTION, SHAPE) == 2 * (4 * 6 * 8) * 8 * 2 * 27
    assert flops(LooksAtValues(), SHAPE) == flops(CONVOLUTION, SHAPE)


def test_frozen_parameters_do_not_count():
    frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)
    assert parameters(nn.Sequential(frozen, nn.Linear(3, 1))) == 4


def test_network_of_the_paper_counts_without_being_run():
    network = build_network("kdnet", {}, in_channels=1, out_channels=4).train()
    assert flops(network, (1, 1, 128, 128, 128)) == 8 * flops(network, (1, 1, 64, 64, 64))
    assert network.training
    assert next(network.parameters()).device == torch.device("cpu")


def test_seconds_come_from_the_history(tmp_path):
    history = tmp_path / "history.csv"
    history.write_text("epoch,step,seconds\n1,5,10.0\n2,10,14.0\n")
    measured = cost("kdnet", CONVOLUTION, SHAPE, history, training_cases=6)
    assert (measured.epochs, measured.training_seconds) == (2, 24.0)
    assert measured.training_seconds_per_case == 2.0
    absent = cost("kdnet", CONVOLUTION, SHAPE, tmp_path / "none.csv", training_cases=6)
    assert math.isnan(absent.training_seconds)
    assert cost_table([measured, absent]).rows[0][0] == "kdnet"
    with pytest.raises(ValueError, match="1 training case or more, got 0"):
        cost("kdnet", CONVOLUTION, SHAPE, history, training_cases=0)


def test_scoring_takes_its_share_of_the_evaluation(tmp_path):
    summary = tmp_path / "summary.json"
    assert math.isnan(scoring_seconds(summary, 3, 10))
    summary.write_text(json.dumps({"seconds": {"teacher": 9.0, "evaluation": 60.0}}))
    assert scoring_seconds(summary, 3, 10) == 2.0
    summary.write_text("{}")
    with pytest.raises(UserError, match="expected a summary with seconds"):
        scoring_seconds(summary, 3, 10)
    with pytest.raises(ValueError, match="got 0 networks"):
        scoring_seconds(summary, 0, 10)
