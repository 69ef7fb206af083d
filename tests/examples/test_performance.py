import pytest
import torch
from torch import nn

from kdnet.config import Config, TrainingConfig
from kdnet.errors import UserError
from kdnet.models import KDNet
from kdnet.runs.devices import launch
from kdnet.training.performance import (
    Performance,
    Stopwatch,
    candidates,
    check_precision,
    choose,
    may_compile,
    peak_memory,
    steps_of,
    torch_format,
    unsafe_in_bf16,
)

NETWORK, SHAPE = KDNet(1, 2, channels=(2, 4, 8)), (2, 1, 16, 16, 16)
PLAIN, LAST = Performance(), Performance(memory_format="channels_last")
HALF, BOTH = Performance("bf16-mixed"), Performance("bf16-mixed", "channels_last")
COMPILED = Performance("bf16-mixed", "channels_last", compile=True)


class Steps:
    """Steps of given seconds; the clock shows what they have taken, compilation included."""

    def __init__(self, seconds, compilation=0.0):
        ways = (PLAIN, LAST, HALF, BOTH, COMPILED)[: len(seconds)]
        self.seconds, self.compilation = dict(zip(ways, seconds, strict=True)), compilation
        self.now, self.taken = 0.0, []

    def clock(self):
        return self.now

    def __call__(self, way):
        first = way.compile and way not in self.taken
        self.taken.append(way)
        self.now += self.seconds[way] + (self.compilation if first else 0)
        return self.seconds[way]

    def choose(self, options, steps=1000, **settings):
        return choose(options, self, steps=steps, clock=self.clock, **settings)


def options(device="cpu", shape=SHAPE, **settings):
    return candidates(TrainingConfig(**settings), device, NETWORK, shape)


def test_everything_open_compares_precisions_and_layouts_the_plainest_first():
    assert options() == [PLAIN, LAST, HALF, BOTH]


def test_given_options_win_over_the_trial():
    assert options(precision="32-true") == [PLAIN, LAST]
    assert options(memory_format="channels_last") == [LAST, BOTH]
    assert options(precision="16-mixed", memory_format="contiguous") == [Performance("16-mixed")]


def test_plain_measures_nothing_and_given_options_win_over_it_too():
    assert options(performance="plain") == [PLAIN]
    assert options(performance="plain", precision="bf16-mixed") == [HALF]
    steps = Steps([])
    assert steps.choose([HALF]) == (HALF, {})
    assert steps.taken == []


def test_depth_two_keeps_a_cpu_from_bf16():
    shape = (1, 1, 8, 8, 8)
    assert options(shape=shape) == [PLAIN, LAST]
    check_precision("32-true", "cpu", NETWORK, shape)
    check_precision("bf16-mixed", "cuda", NETWORK, shape)
    with pytest.raises(UserError, match=r"depth 2, as here: bottleneck.convolution"):
        check_precision("bf16-mixed", "cpu", NETWORK, shape)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ([0.4, 0.3, 0.2, 0.1], BOTH),
        ([0.4, 0.1, 4.0, 4.0], LAST),
        ([0.2, 0.4, 2.0, 3.0], PLAIN),
        # too little to be more than noise
        ([0.200, 0.196, 0.4, 0.4], PLAIN),
    ],
)
def test_the_fastest_is_taken_and_never_one_slower_than_plain(seconds, best):
    choice, measured = Steps(seconds).choose([PLAIN, LAST, HALF, BOTH])
    assert choice == best
    assert measured == dict(zip(map(str, (PLAIN, LAST, HALF, BOTH)), seconds, strict=True))


def test_a_trial_ends_after_seconds_and_does_not_repeat_hopeless_steps():
    steps = Steps([0.01, 0.011, 0.1, 0.1])
    steps.choose([PLAIN, LAST, HALF, BOTH])
    assert steps.now < 3
    assert steps.taken.count(HALF) == steps.taken.count(BOTH) == 2
    assert steps.taken.count(PLAIN) > 50
    # a minute for each step: two of each and no more, three of the first
    slow = Steps([60.0, 70.0])
    slow.choose([PLAIN, LAST])
    assert slow.taken == [PLAIN, PLAIN, LAST, PLAIN, LAST]


def test_a_slow_first_step_does_not_put_another_out_of_the_running():
    # On a GPU the first step of a precision loads its kernels.
    firsts = iter([0.9])

    def measure(way):
        return 0.2 if way == PLAIN else next(firsts, 0.1)

    ticks = iter(range(100))
    assert choose([PLAIN, LAST], measure, steps=1, clock=lambda: next(ticks))[0] == LAST


def test_a_slow_first_step_does_not_put_the_plain_one_out_of_the_running():
    firsts = iter([9.0, 9.0])

    def measure(way):
        return next(firsts, 0.1) if way == PLAIN else 0.2

    ticks = iter(range(100))
    assert choose([PLAIN, LAST], measure, steps=1, clock=lambda: next(ticks))[0] == PLAIN


@pytest.mark.parametrize(
    ("seconds", "compilation", "steps", "taken", "best"),
    [
        (0.05, 30.0, 100_000, True, COMPILED),
        (0.05, 30.0, 10_000, False, BOTH),  # 1000 s without: not even tried
        (0.05, 2000.0, 100_000, True, BOTH),  # saves 5000 s, costs four times 2000
        (0.11, 30.0, 100_000, True, BOTH),  # slower
    ],
)
def test_compilation_is_tried_in_long_runs_and_must_pay(seconds, compilation, steps, taken, best):
    trial = Steps([0.4, 0.3, 0.2, 0.1, seconds], compilation)
    choice, measured = trial.choose([PLAIN, LAST, HALF, BOTH], steps=steps, compilable=True)
    assert choice == best
    assert (COMPILED in trial.taken) is (str(COMPILED) in measured) is taken


def test_a_cpu_compiles_only_if_told_to():
    assert not may_compile(TrainingConfig(), "cpu")
    for settings in ({"compile": False}, {"compile": True}, {"performance": "plain"}):
        assert not may_compile(TrainingConfig(**settings), "cuda")


def test_memory_formats_are_those_of_volumes():
    assert torch_format("channels_last") is torch.channels_last_3d
    assert torch_format("channels_last", 2) is torch.channels_last
    assert torch_format("contiguous") is torch.contiguous_format


def test_a_step_of_any_output_form_can_be_taken():
    class Forms(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv3d(2, 1, 1)
            self.dropout = nn.Dropout()

        def forward(self, image):
            return {"out": [self.dropout(self.convolution(image))]}

    network, state = Forms(), torch.get_rng_state()
    with steps_of(network, (1, 2, 2, 2, 2), "cpu") as measure:
        assert all(measure(way) > 0 for way in (PLAIN, BOTH))
    assert network.convolution.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_of_depth_two_are_found_and_the_network_left_as_it_was():
    network = KDNet(1, 2, channels=(2, 4, 8)).train()
    assert unsafe_in_bf16(network, (1, 1, 16, 8, 8)) == []
    found = ["bottleneck.convolution", "decoder.0.reduce.convolution"]
    assert unsafe_in_bf16(network, (1, 1, 8, 16, 16)) == found
    assert network.training
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_phases_add_up_also_after_an_exception():
    watch = Stopwatch({"teacher": 5.0})
    with pytest.raises(RuntimeError, match="stop"), watch.phase("teacher"):
        raise RuntimeError("stop")
    assert watch.seconds["teacher"] >= 5.0


def test_peak_memory_is_that_of_a_python_process():
    assert 20 < peak_memory()["process"] < 100_000


def test_a_sharded_network_is_neither_compiled_nor_trained_with_a_loss_scaler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    scaled = [str(way) for way in options("cuda") if way.precision == "16-mixed"]
    assert len(scaled) == 2
    assert options("cuda", strategy="fsdp") == [PLAIN, LAST]
    assert not may_compile(TrainingConfig(strategy="fsdp"), "cuda")


@pytest.mark.parametrize("given", [{"compile": True}, {"precision": "16-mixed"}])
def test_what_a_sharded_network_cannot_take_is_refused_before_any_process_starts(given):
    training = TrainingConfig(strategy="fsdp", accelerator="cpu", **given)
    with pytest.raises(UserError, match="neither --compile true nor --precision 16-mixed"):
        launch(Config(training=training), "32-true")
