import pytest
import torch
from torch import nn

from privdistill import GroundTruth, LatentKL, Layer, PrivDistillError, PrivilegedInput, Tap
from privdistill.checks import (
    check_gradients,
    check_heads,
    check_networks,
    check_view,
    feature_map,
    input_views,
    tap_table,
)
from privdistill.taps.recorder import Recorder


def test_a_bottleneck_that_is_read_needs_no_name():
    assert tap_table({}, ("bottleneck",), 1) == {"bottleneck": Tap()}


def test_given_taps_are_kept():
    mine = Tap("a", "b")
    assert tap_table({"bottleneck": mine}, ("bottleneck",), 1) == {"bottleneck": mine}


def test_any_object_with_both_views_serves_as_inputs():
    mine = PrivilegedInput(("a",), student=("a",))
    assert input_views(mine) is mine


def test_a_baseline_without_teacher_passes():
    check_networks([], nn.Conv2d(1, 1, 1), 1.0 * GroundTruth())


def test_equal_logits_pass():
    check_heads(torch.zeros(1, 3, 4, 4), [torch.zeros(1, 3, 4, 4)])


def test_other_classes_or_resolutions_are_refused():
    same = torch.zeros(1, 3, 4, 4)
    for teacher in [(1, 2, 4, 4), (1, 3, 8, 8)]:
        with pytest.raises(PrivDistillError, match=r"student gives \(1, 3, 4, 4\) and the teacher"):
            check_heads(same, [same, torch.zeros(teacher)])


def test_tokens_become_maps_and_vectors_do_not():
    tokens = torch.arange(8.0).reshape(1, 4, 2)
    found = feature_map(tokens, (8, 8), tap="deep", layer=Layer("x"))
    assert torch.equal(found[0, 0], torch.tensor([[0.0, 2.0], [4.0, 6.0]]))
    with pytest.raises(PrivDistillError, match=r"layer 'x' gives \(1, 64\) for an image of size"):
        feature_map(torch.zeros(1, 64), (8, 8), tap="deep", layer=Layer("x"))


def test_features_without_gradient_are_named():
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    recorder = Recorder(net, {"deep": "0"}, role="student")
    check_gradients(recorder, {"deep": torch.zeros(1, requires_grad=True)})
    with pytest.raises(PrivDistillError, match="Tap 'deep': the output of layer '0'"):
        check_gradients(recorder, {"deep": torch.zeros(1)})


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((0, 2, 4), torch.float32, "the batch is empty"),
        ((1, 2), torch.float32, "at least one spatial axis"),
        ((1, 2, 0), torch.float32, "no empty one"),
        ((1, 2, 4), torch.int64, r"is torch.int64; .*image.float\(\)"),
        ((1, 3, 4), torch.float32, r"is \(1, 3, 4\), that of the example was \(1, 2, 8\)"),
        ((1, 2, 4, 4), torch.float32, "the number of axes and channels"),
    ],
)
def test_views_that_no_network_could_take_are_refused(shape, dtype, message):
    with pytest.raises(PrivDistillError, match=message):
        check_view(torch.zeros(shape, dtype=dtype), "student", (1, 2, 8))


def test_other_batches_and_sizes_than_the_examples_pass():
    check_view(torch.zeros(3, 2, 5), "student", (1, 2, 8))
    check_view(torch.zeros(3, 2, 5), "student", None)


def test_an_objective_that_reads_a_tap_needs_a_teacher():
    with pytest.raises(PrivDistillError, match="latent_kl read the teacher"):
        check_networks([], nn.Conv2d(1, 1, 1), 1.0 * LatentKL())
