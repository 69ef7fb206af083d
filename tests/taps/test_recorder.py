import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from privdistill import LifecycleError, Tap
from privdistill.taps.recorder import Recorder


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))


IMAGE = torch.ones(1, 1, 2, 2)


def test_records_only_while_armed(net):
    recorder = Recorder(net, {"a": "0"}, role="student")
    with recorder.recording() as captured:
        net(IMAGE)
    first = captured["a"]
    net(IMAGE)
    assert captured["a"] is first


def test_nothing_is_pinned_after_recording(net):
    recorder = Recorder(net, {"a": "0"}, role="student")
    with recorder.recording() as captured:
        net(IMAGE)
    reference = weakref.ref(captured["a"])
    del captured
    gc.collect()
    assert reference() is None


def test_nothing_is_pinned_after_an_exception(net):
    recorder = Recorder(net, {"a": "0"}, role="student")
    with pytest.raises(RuntimeError), recorder.recording():
        net(torch.ones(1, 5, 2, 2))
    assert not recorder.armed
    with recorder.recording() as captured:
        net(IMAGE)
    recorder.check(captured)


def test_remove_leaves_no_hook_and_can_be_repeated(net):
    recorder = Recorder(net, {"a": "0", "b": "1"}, role="student")
    recorder.remove()
    recorder.remove()
    assert not any(module._forward_hooks for module in net.modules())


def test_tap_that_does_not_fire_is_an_error(net):
    recorder = Recorder(net, {"a": "2"}, role="student")
    with recorder.recording() as captured:
        net[0](IMAGE)
    with pytest.raises(LifecycleError, match=r"layer '2' of the student did not run"):
        recorder.check(captured)


def test_layer_that_runs_twice_is_an_error(net):
    recorder = Recorder(net, {"a": "0"}, role="teacher")
    with recorder.recording() as captured:
        net(IMAGE)
        net(IMAGE)
    with pytest.raises(LifecycleError, match="ran more than once"):
        recorder.check(captured)


def test_output_that_is_no_tensor_is_an_error():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    net = nn.Sequential(Pair())
    recorder = Recorder(net, {"a": "0"}, role="student")
    with recorder.recording() as captured:
        net(IMAGE)
    with pytest.raises(
        LifecycleError, match=r"tuple of \{0: \(1, 1, 2, 2\).*Layer\('0', select=1\)"
    ):
        recorder.check(captured)


def test_recording_twice_at_once_is_an_error(net):
    recorder = Recorder(net, {}, role="student")
    with (
        recorder.recording(),
        pytest.raises(LifecycleError, match="already being recorded"),
        recorder.recording(),
    ):
        pass


def test_change_in_place_is_found_and_cloning_keeps_the_value():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    nn.init.constant_(net[0].weight, -1.0)
    recorder = Recorder(net, {"a": "0"}, role="student")
    with torch.no_grad(), recorder.recording() as captured:
        net(IMAGE)
    assert recorder.corrupted(captured) == ["a"]
    recorder.cloned.add("a")
    with torch.no_grad(), recorder.recording() as captured:
        net(IMAGE)
    assert recorder.corrupted(captured) == []
    assert captured["a"].min() < 0


def test_deepcopy_of_a_hooked_network_does_not_record_for_the_original(net):
    recorder = Recorder(net, {"a": "0"}, role="student")
    twin = copy.deepcopy(net)
    with recorder.recording() as captured:
        twin(IMAGE)
    assert captured == {}


def test_a_twin_clones_what_the_original_clones(net):
    recorder = Recorder(net, {"a": "0"}, role="student")
    recorder.cloned.add("a")
    assert recorder.twin(net).cloned == {"a"}


def test_a_tap_that_is_silent_names_what_may_be_the_cause_and_the_nearest_layers(build, tiny_unet):
    student = tiny_unet(1)
    student.bottleneck.append(nn.BatchNorm2d(8))
    kd = build(student=student, taps={"bottleneck": Tap("bottleneck", "bottleneck.2")}).eval()
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(kd)
    with pytest.raises(LifecycleError) as caught:
        kd(torch.randn(2, 4, 8, 8), torch.randint(0, 3, (2, 8, 8)))
    message = str(caught.value)
    for quoted in ("replaced", "convert_sync_batchnorm", "compiled", "TorchScript", "'bottleneck'"):
        assert quoted in message
