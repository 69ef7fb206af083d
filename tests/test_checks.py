import pytest
import torch
from torch import nn

from privdistill import GroundTruth, LatentKL, PrivDistillError, PrivilegedInput, Tap
from privdistill.checks import (
    check_batch,
    check_gradients,
    check_logits,
    check_networks,
    check_single_head,
    input_views,
    tap_table,
)
from privdistill.dry_run import Trial
from privdistill.taps import Recorder


def test_a_bottleneck_that_is_read_needs_no_name():
    assert tap_table({}, ("bottleneck",)) == {"bottleneck": Tap()}


def test_given_taps_are_kept():
    mine = Tap("a", "b")
    assert tap_table({"bottleneck": mine}, ("bottleneck",)) == {"bottleneck": mine}


def test_any_object_with_both_views_serves_as_inputs():
    mine = PrivilegedInput(("a",), student=("a",))
    assert input_views(mine) is mine


def test_a_baseline_without_teacher_passes():
    check_networks(None, nn.Conv2d(1, 1, 1), 1.0 * GroundTruth())


def test_equal_logits_pass():
    check_logits((1, 2, 4, 4), (1, 2, 4, 4))


def test_one_head_passes_and_several_do_not():
    one = Trial(torch.zeros(1, 2, 4), (1, 2, 4), {})
    two = Trial([torch.zeros(1, 2, 4), torch.zeros(1, 2, 2)], (1, 2, 4), {})
    stacked = Trial(torch.zeros(1, 3, 2, 4), (1, 3, 2, 4), {})
    check_single_head(one, one)
    for several in (two, stacked):
        with pytest.raises(PrivDistillError, match="only the first would be taught"):
            check_single_head(several, one)


def test_features_without_gradient_are_named():
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    recorder = Recorder(net, {"deep": "0"}, role="student")
    check_gradients(recorder, {"deep": torch.zeros(1, requires_grad=True)})
    with pytest.raises(PrivDistillError, match="Tap 'deep': the output of layer '0'"):
        check_gradients(recorder, {"deep": torch.zeros(1)})


def test_empty_batches_are_refused():
    check_batch(torch.zeros(1, 2, 4))
    with pytest.raises(PrivDistillError, match="the batch is empty"):
        check_batch(torch.zeros(0, 2, 4))


def test_an_objective_that_reads_a_tap_needs_a_teacher():
    with pytest.raises(PrivDistillError, match="latent_kl read the teacher"):
        check_networks(None, nn.Conv2d(1, 1, 1), 1.0 * LatentKL())
