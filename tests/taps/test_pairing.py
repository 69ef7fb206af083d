import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from privdistill import ShapeMismatchError
from privdistill.taps.pairing import build_adapter, check_equal, resample, short


def test_equal_shapes_need_nothing():
    assert isinstance(build_adapter("t", (1, 4, 8), (1, 4, 8)), nn.Identity)


@given(
    axes=st.integers(1, 3),
    student=st.integers(1, 5),
    teacher=st.integers(1, 5),
    size=st.sampled_from([2, 3, 4]),
    other=st.sampled_from([2, 4, 5]),
)
def test_any_pair_of_maps_is_brought_to_the_teachers_shape(axes, student, teacher, size, other):
    mine, theirs = (2, student, *[size] * axes), (2, teacher, *[other] * axes)
    adapted = build_adapter("t", mine, theirs)(torch.zeros(mine))
    assert resample(adapted, theirs[2:]).shape == theirs


def test_features_of_the_right_size_are_not_touched():
    features = torch.zeros(1, 1, 3, 8)
    assert resample(features, (3, 8)) is features


def test_tokens_cannot_be_adapted_yet():
    with pytest.raises(ShapeMismatchError, match="spatial axes"):
        build_adapter("t", (1, 16, 8, 8), (1, 64, 16))


def test_mismatch_names_shapes_and_the_adapter_that_would_help():
    message = r"gives \(2, 256, 8, 8, 8\), the teacher\s\(2, 320, 8, 8, 8\); channels differ"
    with pytest.raises(ShapeMismatchError, match=message):
        check_equal("bottleneck", (2, 256, 8, 8, 8), (2, 320, 8, 8, 8), None)
    with pytest.raises(ShapeMismatchError, match=r"nn.Conv3d\(256, 320, kernel_size=1\)"):
        check_equal("bottleneck", (2, 256, 8, 8, 8), (2, 320, 8, 8, 8), None)


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ((3, 4, 8), "batch sizes differ"),
        ((2, 4, 9), "sizes differ"),
        ((2, 4, 9, 9), "numbers of axes"),
    ],
)
def test_mismatch_says_what_differs(student, words):
    with pytest.raises(ShapeMismatchError, match=words):
        check_equal("t", student, (2, 4, 8), None)


def test_adapters_are_described_as_code():
    shapes = (1, 2, 4), (1, 3, 8)
    both = build_adapter("t", *shapes)
    assert short(both, *shapes) == "nn.Conv1d(2, 3, kernel_size=1), resampled"
    assert short(nn.ReLU()) == "ReLU"
    assert short(None) == "none"


def test_channels_may_differ_where_nothing_compares_them():
    assert isinstance(build_adapter("t", (1, 2, 4), (1, 3, 8), channels=False), nn.Identity)
    check_equal("t", (1, 2, 8), (1, 3, 8), None, channels=False)
    for other in [(2, 3, 8), (1, 3, 4), (1, 3, 8, 8)]:
        with pytest.raises(ShapeMismatchError, match="differ"):
            check_equal("t", (1, 2, 8), other, None, channels=False)
