"""What a step costs in Python, whatever the networks cost."""

import sys

import pytest
import torch

from network import TINY, make_world
from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    PrivilegedInput,
    SoftTargetDiceBCE,
)


def calls_in_the_library(function):
    """Python calls into files of privdistill; a resumed generator or comprehension is one, too."""
    seen = []

    def profile(frame, event, _argument):
        if event == "call" and "/privdistill/" in frame.f_code.co_filename:
            seen.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_step_of_the_papers_objective_takes_at_most_ninety_calls(activation):
    world = make_world(*TINY)
    target = world.target if activation == "sigmoid" else world.target.argmax(1)
    kd = DistillationWrapper(
        world.teacher,
        world.student,
        objective=0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10 * LatentKL(),
        inputs=PrivilegedInput(("a", "b", "c", "d"), student=("a",)),
        activation=activation,
        example=torch.zeros(1, 4, 8, 8, 8),
    )
    # The first step checks values.
    kd(world.image, target)
    assert len(calls_in_the_library(lambda: kd(world.image, target))) <= 90
