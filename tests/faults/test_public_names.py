"""Odd shapes, values, types and networks: the library answers rightly or with its own error.

Every name of `privdistill.__all__` that takes input is called here or in `test_properties.py`. A
`PrivDistillError` must say something; any other exception fails the test.
"""

import functools
import inspect
import math
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn

import privdistill as lib

FLOATS = [torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
NUMBERS = st.one_of(
    st.floats(0.1, 20),
    st.floats(),
    st.integers(-3, 10),
    st.sampled_from([None, True, "2", (1,), torch.tensor(2.0)]),
)
# What users derive from or fill in themselves.
BASES = {"CacheStore", "FeatureTerm", "ResponseTerm", "Term"}
PRESETS = ("kdnet", "hinton", "generalized", "structured", "pmkl", "protokd", "xie", "warm_up")
PRESETS += ("m3ae", "passion", "mstkdnet")
#: All that an objective can be made of.
TERMS = {
    name: kind
    for name, kind in ((name, getattr(lib, name)) for name in lib.__all__)
    if isinstance(kind, type) and issubclass(kind, lib.Term) and name not in BASES
}


class MeanCritic(nn.Module):
    """A critic of any number of channels and axes."""

    def forward(self, x):
        return x.flatten(1).mean(1)


TERMS["HolisticAdversarial"] = functools.partial(lib.HolisticAdversarial, MeanCritic())
OPTIONS = {
    **dict.fromkeys(("temperature", "smoothing", "power", "scale"), NUMBERS),
    **dict.fromkeys(("gradient_penalty", "min_variance"), NUMBERS),
    "activation": st.sampled_from([None, "softmax", "sigmoid", "tanh", 3]),
    "reduction": st.sampled_from(["mean", "sum", "none", None]),
    "normalisation": st.sampled_from(["softmax", "softmax_channel", "l1", "max", None]),
    "resize": st.sampled_from([None, "logits", "target"]),
    "ignore_index": st.sampled_from([None, 0, 1, 255, -1]),
    "class_weights": st.sampled_from([None, (1.0, 2.0), (0.0, 0.0), (-1, 1), "ab", (1.0,)]),
    "over": st.sampled_from(["voxels", "samples", "channels"]),
    "metric": st.sampled_from(["rms", "euclidean", "cosine"]),
    "of": st.sampled_from(["student", "teacher", "nobody"]),
    "dimensions": st.integers(-1, 5),
    **dict.fromkeys(("batch_dice", "include_background", "squared_denominator"), st.booleans()),
    **dict.fromkeys(("scale_by_t2", "standardise", "centre", "conditional"), st.booleans()),
}


@contextmanager
def right_or_refused():
    """Let through a `PrivDistillError` that says something, and nothing else."""
    try:
        with warnings.catch_warnings():
            # Random logits are softened beyond what their decision survives.
            warnings.filterwarnings("ignore", ".*a perfect copy of this teacher", UserWarning)
            yield
        event("worked")
    except NetworkRefusedError:
        event("refused by the network")
    except lib.PrivDistillError as error:
        event(f"refused: {type(error).__name__}")
        said = str(error).rstrip()
        if len(said) < 20 or said[-1] not in ".)]:'":
            pytest.fail(f"says too little: {said!r}")


def mostly(draw, usual, *others):
    """Draw what fits, and now and then something else."""
    return draw(st.sampled_from([usual] * 10 + list(others)))


def two_of(draw, names):
    """At most two of some options."""
    return draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []


@st.composite
def terms(draw, usual=None):
    """A term with options of any kind; `PrivDistillError` is left to the caller."""
    kind = TERMS[draw(st.sampled_from(sorted(TERMS)))]
    if usual or draw(st.booleans()):
        return kind()
    known = [name for name in inspect.signature(kind).parameters if name in OPTIONS]
    return kind(**{name: draw(OPTIONS[name]) for name in two_of(draw, known)})


def numbers(draw, shape, dtype):
    """Random numbers of some size, rarely of one that no float16 holds."""
    size = mostly(draw, draw(st.sampled_from([0.0, 1.0, 30.0])), 1e4, 1e30)
    return (torch.randn(shape) * size).to(dtype)


def a_target(draw, batch, classes, size):
    spatial = mostly(draw, size, (*size, 2), size[1:])
    form = mostly(draw, "labels", "channel", "one-hot", "none", "classes")
    if form == "none":
        return None
    lead = {"channel": (1,), "one-hot": (classes,), "classes": (classes + 1,)}.get(form, ())
    values = torch.randint(0, max(classes, 2), (mostly(draw, batch, batch + 1), *lead, *spatial))
    kinds = [torch.long, torch.uint8, torch.float32, torch.bool, torch.complex64]
    values = mostly(draw, values, values - 1, values + 0.25, values * float("nan"))
    return values.to(mostly(draw, draw(st.sampled_from(kinds[:3])), *kinds[3:]))


def a_step(draw):
    # What was found must be found again.
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    axes = draw(st.integers(1, 3))
    size = tuple(draw(st.lists(st.integers(1, 5), min_size=axes, max_size=axes)))
    size = mostly(draw, size, (0, *size[1:]))
    batch, classes = mostly(draw, draw(st.integers(1, 3)), 0), mostly(draw, 3, 1, 2, 0)
    dtype = mostly(draw, draw(st.sampled_from(FLOATS)), torch.long)
    shape = (batch, classes, *size)
    other = mostly(draw, shape, (batch, classes + 1, *size), (batch, classes), shape[:-1])
    width = draw(st.integers(1, 4))
    features = mostly(draw, (batch, width, *size), (batch, width), (batch, 4, width))
    theirs = mostly(draw, features, (batch, width + 1, *size), features[:-1])
    pair = lib.TapPair(numbers(draw, features, dtype), numbers(draw, theirs, dtype))
    return lib.Step(
        student=numbers(draw, shape, dtype),
        teacher=mostly(draw, numbers(draw, other, dtype), None),
        target=a_target(draw, batch, classes, size),
        labelled=mostly(draw, None, torch.ones(batch).bool(), torch.ones(2), torch.zeros(5).bool()),
        sample_weights=mostly(draw, None, torch.ones(batch), -torch.ones(batch), torch.ones(4)),
        image=mostly(draw, torch.randn(batch, 2, *size), None),
        taps=mostly(draw, {"bottleneck": pair, "decoder": pair}, {}),
        activation=mostly(draw, draw(st.sampled_from(["softmax", "sigmoid"])), "tanh"),
    )


def is_small(*values):
    """Whether these numbers leave a loss room in float32."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return all(bool((value.double().abs() < 1e3).all()) for value in tensors)


@given(st.data())
def test_a_term_alone_gives_a_finite_scalar_or_an_error(data):
    with right_or_refused():
        term = data.draw(terms())
        step = a_step(data.draw)
        term.build(step)
        if step.student.is_floating_point():
            step.student.requires_grad_()
        value = term(step)
        assert value.ndim == 0
        pairs = [tensor for pair in step.taps.values() for tensor in pair]
        if is_small(step.student, step.teacher, step.image, *pairs):
            assert torch.isfinite(value)
            if value.requires_grad and step.student.requires_grad:
                (slope,) = torch.autograd.grad(value, step.student, allow_unused=True)
                assert slope is None or torch.isfinite(slope).all()


@given(st.data())
def test_objectives_are_a_vector_space_or_an_error(data):
    draw = data.draw
    step = lib.Step(
        student=torch.randn(2, 3, 4, 4),
        teacher=torch.randn(2, 3, 4, 4),
        target=torch.randint(0, 3, (2, 4, 4)),
        index=torch.tensor(draw(st.integers(0, 20))),
    )
    weights = st.one_of(
        st.floats(-5, 5),
        NUMBERS,
        st.just(lib.Ramp(0, 1, steps=5)),
        st.just(lambda index: index * 0.5),
    )
    with right_or_refused():
        parts = [
            draw(weights) * draw(st.sampled_from([lib.GroundTruth, lib.HintonKL, lib.LogitMSE]))()
            for _ in range(draw(st.integers(1, 4)))
        ]
        total = sum(parts)
        assert isinstance(total, lib.Objective)
        assert repr(total)
        together, values = total(step)
        alone = torch.stack([part(step)[0] for part in parts]).sum()
        torch.testing.assert_close(together, alone, equal_nan=True)
        # Terms that weigh 0 are left out.
        assert len(values) == sum(w.factor != 0 for w, _ in total.named_terms.values())
        factor = draw(weights)
        scaled, _ = (factor * total)(step)
        number = factor(step.index) if callable(factor) else factor
        # Sums of numbers near the largest depend on the order in which they are multiplied.
        if together.abs() * abs(number) < 1e30 and together.abs() < 1e30:
            torch.testing.assert_close(scaled, together * number, rtol=1e-4, atol=1e-4)
        decayed = total.balanced(draw(st.sampled_from([0.9, 0.0, 1.0, -1.0, math.nan])))
        assert torch.isfinite(decayed(step)[0]) or not torch.isfinite(together)


@given(st.sampled_from(["+", "*", "r+", "r*", "name"]), NUMBERS | st.text(max_size=3))
def test_terms_are_added_to_terms_and_weighed_by_numbers_alone(operation, other):
    with right_or_refused():
        made = {
            "+": lambda: lib.GroundTruth() + other,
            "*": lambda: lib.GroundTruth() * other,
            "r+": lambda: other + lib.GroundTruth(),
            "r*": lambda: other * lib.GroundTruth(),
            "name": lambda: lib.GroundTruth().named(other),
        }[operation]()
        assert isinstance(made, lib.Objective | lib.Term)


@given(st.sampled_from(PRESETS), st.data())
def test_a_preset_is_an_objective_or_refuses_its_constants(name, data):
    preset, values = getattr(lib, name), {"tap": st.sampled_from(["a", "bottleneck"])}
    chosen = two_of(data.draw, [*inspect.signature(preset).parameters])
    if name == "warm_up":
        chosen = ["steps"]
    with right_or_refused():
        made = preset(**{option: data.draw(values.get(option, NUMBERS)) for option in chosen})
        assert isinstance(made, lib.Ramp if name == "warm_up" else lib.Objective)


@given(
    NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(["linear", "cosine", "exponential", "x"])
)
def test_a_ramp_stays_between_its_ends_or_is_refused(start, end, steps, begin, curve):
    with right_or_refused():
        ramp = lib.Ramp(start, end, steps, begin=begin, curve=curve)
        found = [float(ramp(torch.tensor(index))) for index in (0, 1, 7, 10**6)]
        low, high = sorted((float(start), float(end)))
        room = 1e-5 * max(abs(low), abs(high), 1e-30)
        assert all(low - room <= value <= high + room for value in found)


keys = st.lists(
    st.text(max_size=6)
    | st.sampled_from(["a/flip0", "a/flip3", "b/flip9", "../../x", "\x00", "a" * 5000, "/flip²"]),
    max_size=3,
)


@given(
    st.lists(st.tuples(keys, st.integers(0, 3)), min_size=1, max_size=4),
    st.sampled_from(["full", "half", "4bit"]),
    st.sampled_from([None, 1, 5000, 0, -1, 10.5]),
)
def test_a_cache_gives_what_the_teacher_gives_or_refuses_the_keys(batches, storage, limit):
    teacher = nn.Conv2d(1, 2, 1).requires_grad_(False)
    with right_or_refused():
        cache = lib.TeacherCache(storage=storage, max_bytes=limit)
        for named, size in batches:
            view = torch.full((size, 1, 3, 3), 0.5)
            expected = teacher(view)
            served = cache.fetch("t", named, view, lambda view=view: {"logits": teacher(view)})
            torch.testing.assert_close(served["logits"], expected, rtol=0.01, atol=0.01)
            assert len(named) == size
        assert cache.statistics.hits + cache.statistics.misses == sum(s for _, s in batches)


@given(
    st.sampled_from([["a", "b"], ["a", "a"], ["a"], "ab", (), ["a", 3], 3]),
    st.booleans(),
)
def test_a_cache_is_filled_or_says_why_not(named, flips):
    kd = lib.DistillationWrapper(
        nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), objective=lib.LogitMSE(), cache=lib.TeacherCache()
    )
    with right_or_refused():
        found = lib.precompute(kd, [(torch.rand(2, 1, 3, 3), named)], flips=flips)
        assert found.stored == (8 if flips else 2)


class Odd(nn.Module):
    """A network whose layers and output take an unusual form."""

    def __init__(self, channels, classes, axes, form):
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.down = kind(channels, 4, 3, stride=2, padding=1)
        self.deep = nn.Sequential(kind(4, 4, 1), nn.ReLU(inplace=True))
        self.head = kind(4, classes, 1)
        self.form = form

    def forward(self, x):
        if x.ndim != self.head.weight.ndim or x.shape[1] != self.down.in_channels or not x.numel():
            raise NetworkRefusedError(x.shape)
        deep = self.deep(self.down(x))
        logits = nn.functional.interpolate(self.head(deep), size=x.shape[2:])
        return FORMS[self.form](logits, deep)


class NetworkRefusedError(Exception):
    """The network's own error, which the library must let through as it is."""


FORMS = {
    "logits": lambda logits, deep: logits,
    "tuple": lambda logits, deep: (logits, deep),
    "list of heads": lambda logits, deep: [logits, logits[..., ::2]],
    "stacked": lambda logits, deep: torch.stack((logits, logits), 1),
    "mapping": lambda logits, deep: {"out": logits, "aux": logits},
    "object": lambda logits, deep: SimpleNamespace(logits=logits),
    "coarse": lambda logits, deep: logits[..., ::2],
    "nothing": lambda logits, deep: None,
    "empty": lambda logits, deep: [],
    "empty mapping": lambda logits, deep: {},
    "text": lambda logits, deep: "logits",
    "number": lambda logits, deep: logits.mean(),
    "vector": lambda logits, deep: logits.flatten(2).mean(2),
    "nested": lambda logits, deep: [[logits, logits], logits],
    "integers": lambda logits, deep: logits.argmax(1, keepdim=True),
    "not finite": lambda logits, deep: logits * float("nan"),
    "double": lambda logits, deep: logits.double(),
    "half": lambda logits, deep: logits.half(),
    "detached": lambda logits, deep: logits.detach(),
}
forms = st.sampled_from(["logits"] * 8 + sorted(FORMS))


@pytest.mark.filterwarnings("ignore:No term of")
@given(st.data())
def test_an_odd_network_is_distilled_or_refused(data):
    draw = data.draw
    axes = draw(st.integers(1, 3))
    size = (4,) * axes
    classes = mostly(draw, 3, 1)
    student, teacher = Odd(1, classes, axes, draw(forms)), Odd(2, classes, axes, draw(forms))
    layers = [lib.Layer("deep", at="input"), lib.Layer("head", select=0)]
    layers += [lib.Layer("deep", network=2), lib.Layer("deep.1", at="output")]
    sides = [None, "deep", "d*", "missing", "", 0, *layers]
    with right_or_refused():
        objective = draw(terms(usual=True)) + 0.5 * draw(terms(usual=True))
        inputs = lib.PrivilegedInput(("a", "b"), student=("b",))
        tap = lib.Tap(mostly(draw, "deep", *sides), mostly(draw, "deep", *sides))
        student.train(draw(st.booleans()))
        teachers = (teacher, lib.Ensemble([teacher]), lib.JointTeacher(teacher), None, student)
        kd = lib.DistillationWrapper(
            mostly(draw, *teachers),
            student,
            objective=objective,
            inputs=mostly(draw, inputs, None, 3),
            taps=mostly(draw, {"bottleneck": tap, "decoder": tap}, None, {"a.b": tap}),
            head_weights=mostly(draw, None, [1, 1], [0, 0], [1], [1, -1], "ab"),
            activation=mostly(draw, "sigmoid" if classes == 1 else "softmax", "sigmoid"),
            example=mostly(draw, torch.zeros(2, 2, *size), None, torch.zeros(2), 3),
        )
        image = mostly(draw, torch.randn(2, 2, *size), torch.randn(2, 2), torch.randn(2, 3, *size))
        out = kd(image, torch.randint(0, max(2, classes), (2, *size)))
        assert out.loss.ndim == 0
        assert set(out.terms) <= set(kd.objective.named_terms)
        if out.loss.requires_grad:
            out.loss.backward()
        kd.close()
        assert not any(module._forward_hooks for module in student.modules())


@given(st.data())
def test_moving_averages_and_ensembles_are_made_or_refused(data):
    draw = data.draw
    networks = [Odd(1, 2, 2, "logits") for _ in range(draw(st.integers(0, 3)))]
    with right_or_refused():
        if draw(st.booleans()):
            listed = st.lists(st.floats() | st.integers(-2, 3), max_size=3)
            teacher = lib.Ensemble(networks, weights=draw(st.none() | listed | st.just("ab")))
        else:
            teacher = lib.MovingAverage(decay=draw(NUMBERS))
        student = Odd(1, 2, 2, "logits")
        kd = lib.DistillationWrapper(teacher, student, objective=lib.HintonKL())
        out = kd(torch.randn(1, 1, 4, 4))
        assert torch.isfinite(out.loss)


@given(forms, st.sampled_from([(2, 2, 4, 4), (1, 1, 4, 4), (2, 2), (0, 2, 4, 4), (1, 2, 4)]))
def test_a_network_is_described_and_tried_for_leaks_or_refused(form, shape):
    network = Odd(2, 3, 2, form)
    with right_or_refused():
        assert lib.describe(network, torch.zeros(shape))
    with right_or_refused():
        inputs = lib.PrivilegedInput(("a", "b"), student=("a", "b"))
        lib.assert_no_leak(network, inputs, torch.randn(shape))


@given(st.data())
def test_agreement_and_temperature_of_a_teacher_are_numbers_or_refused(data):
    draw = data.draw
    logits = torch.randn(2, mostly(draw, 3, 1), 4, 4) * draw(st.sampled_from([0.0, 1.0, 1e4]))
    activation = mostly(draw, draw(st.sampled_from(["softmax", "sigmoid"])), "tanh")
    with right_or_refused():
        found = lib.target_agreement(logits, draw(st.floats(0.1, 20)), activation=activation)
        assert found.shape == logits.shape[1:2]
    with right_or_refused():
        teacher = Odd(2, 3, 2, "logits")
        batches = draw(st.sampled_from([[torch.randn(1, 2, 4, 4)], [], [torch.randn(1, 2)]]))
        limits = mostly(draw, {}, {"at_most": draw(st.floats())}, {"agreement": draw(st.floats())})
        found = lib.fit_temperature(teacher, batches, activation=activation, **limits)
        assert 1 <= found <= limits.get("at_most", 5)


@given(st.integers(1, 3), st.floats())
def test_weights_are_inherited_or_the_student_stays(channels, minimum):
    student, teacher = Odd(1, 2, 2, "logits"), Odd(channels, 2, 2, "logits")
    before = student.down.weight.clone()
    inputs = lib.PrivilegedInput(("a", "b"), student=("b",))
    with right_or_refused():
        assert str(lib.inherit(student, teacher, inputs, minimum=minimum))
        return
    assert torch.equal(student.down.weight, before)


@given(st.data())
def test_a_critic_is_trained_and_a_run_diagnosed_or_refused(data):
    draw = data.draw
    critic = lib.Critic(3, axes=2)
    kd = lib.DistillationWrapper(
        Odd(1, 3, 2, "logits"),
        Odd(1, 3, 2, "logits"),
        objective=lib.GroundTruth() + lib.HolisticAdversarial(critic, conditional=False),
    )
    image, target = torch.randn(2, 1, 4, 4), torch.randint(0, 3, (2, 4, 4))
    with right_or_refused():
        penalty = {"gradient_penalty": draw(st.floats(max_value=1e6))}
        options = mostly(draw, {}, penalty, {"metric": "cosine"})
        assert torch.isfinite(lib.critic_loss(critic, kd(image, target), **options))
    with right_or_refused():
        batches = draw(st.sampled_from([[(image, target)], [image], [], [{"image": image}]]))
        assert str(lib.diagnose(kd, batches, limit=1))


def test_every_public_name_that_takes_input_is_fuzzed():
    source = Path(__file__).read_text(encoding="utf-8")
    here = {*re.findall(r"lib\.(\w+)", source), *TERMS, *PRESETS}
    records = {"Output", "Diagnosis", "Inheritance"}
    errors = {name for name in lib.__all__ if name.endswith(("Error", "Warning"))}
    assert {*lib.__all__} - here - records - BASES - errors == set()
