"""What a step costs in Python, whatever the networks cost."""

import sys

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


def test_a_step_of_the_papers_objective_takes_at_most_ninety_calls():
    world = make_world(*TINY)
    kd = DistillationWrapper(
        world.teacher,
        world.student,
        objective=0.75 * SoftTargetDiceBCE() + 0.25 * GroundTruth() + 10 * LatentKL(),
        inputs=PrivilegedInput(("a", "b", "c", "d"), student=("a",)),
        activation="sigmoid",
        example=torch.zeros(1, 4, 8, 8, 8),
    )
    # The first step checks values.
    kd(world.image, world.target)
    assert len(calls_in_the_library(lambda: kd(world.image, world.target))) <= 90
