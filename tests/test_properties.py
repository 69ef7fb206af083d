"""Whatever is passed in, the library works or raises an error of its own."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import nn

from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    Layer,
    PrivDistillError,
    PrivilegedInput,
    ShapeMismatchError,
    SoftTargetDiceBCE,
    Tap,
)
from privdistill.taps.layout import as_map, find_layout
from privdistill.taps.names import find_layer
from privdistill.taps.pairing import build_adapter, check_equal, resample

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
names = st.text(min_size=1, max_size=4)


class NetworkRefusedError(Exception):
    """The network's own error, which the library lets through as it is."""


class Small(nn.Module):
    """Down once and up again, for any size and number of axes."""

    def __init__(self, axes, channels, classes, width):
        super().__init__()
        convolution = CONVOLUTIONS[axes]
        self.down = convolution(channels, width, 3, stride=2, padding=1)
        self.body = nn.Sequential(convolution(width, width, 1), nn.LeakyReLU(inplace=True))
        self.head = convolution(width, classes, 1)

    def forward(self, x):
        if x.ndim != self.head.weight.ndim:
            raise NetworkRefusedError(x.shape)
        return F.interpolate(self.head(self.body(self.down(x))), size=x.shape[2:])


@st.composite
def objectives(draw):
    kinds = [
        GroundTruth(batch_dice=draw(st.booleans()), include_background=draw(st.booleans())),
        SoftTargetDiceBCE(temperature=draw(st.floats(0.1, 50))),
        LatentKL(normalisation=draw(st.sampled_from(["softmax", "softmax_channel", "l1"]))),
    ]
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    weights = draw(st.lists(st.floats(-2, 20), min_size=3, max_size=3))
    return sum((w * t for w, t in zip(weights[1:], chosen[1:], strict=False)), 1.0 * chosen[0])


def mostly(draw, usual, *others):
    """Draw what fits, and now and then something else."""
    return draw(st.sampled_from([usual] * 12 + list(others)))


def target(draw, batch, classes, size):
    spatial = mostly(draw, size, tuple(s + 1 for s in size), size[1:])
    form = draw(st.sampled_from(["labels", "one label channel", "channels"]))
    form = mostly(draw, form, "more channels", "none")
    if form == "none":
        return None
    lead = {"labels": (), "one label channel": (1,), "channels": (classes,)}
    shape = (mostly(draw, batch, batch + 1), *lead.get(form, (classes + 1,)), *spatial)
    labels = torch.randint(0, classes, shape)
    if form == "channels":
        labels = F.one_hot(torch.randint(0, classes, (batch, *size)), classes).movedim(-1, 1)
    dtypes = [torch.long, torch.float32, torch.uint8, torch.float16]
    wrong = torch.full_like(labels, draw(st.sampled_from([-1, classes, 200])))
    return mostly(draw, labels, wrong, labels + 0.5).to(draw(st.sampled_from(dtypes)))


@given(st.data())
def test_a_step_works_or_says_why_not(data):
    draw = data.draw
    axes = draw(st.integers(1, 3))
    size = tuple(draw(st.lists(st.integers(1, 7), min_size=axes, max_size=axes)))
    classes = draw(st.integers(1, 3))
    teacher = Small(axes, 2, classes + mostly(draw, 0, 1), draw(st.integers(1, 3)))
    student = Small(axes, 1, classes, draw(st.integers(1, 3)))
    batch = mostly(draw, draw(st.integers(1, 2)), 0)
    stack = torch.randn(batch, 2, *size)
    image = mostly(
        draw, stack, stack[:, :1], stack.long(), stack.flatten(), stack[None], {"a": stack}
    )
    some = torch.ones(batch, 2).bool()
    activation = "sigmoid" if classes == 1 else draw(st.sampled_from(["softmax", "sigmoid"]))
    with suppress(PrivDistillError, NetworkRefusedError):
        kd = DistillationWrapper(
            teacher,
            student,
            objective=draw(objectives()),
            inputs=PrivilegedInput(("a", "b"), student=("b",)),
            activation=mostly(draw, activation, "softmax"),
            taps=draw(st.sampled_from([None, {"bottleneck": Tap("body", "down")}])),
            example=mostly(draw, torch.zeros(1, 2, *size), torch.zeros(1, 1, *size), None),
        )
        present = draw(st.sampled_from([None, some])) if batch else None
        present = mostly(draw, present, some.float(), torch.ones(3, 3).bool())
        out = kd(image, target(draw, batch, classes, size), present=present)
        out.loss.backward()
        assert torch.isfinite(out.loss)
        assert kd.predict(image).shape == (batch, classes, *size)
        event("worked")


@given(st.data())
def test_inputs_are_divided_or_refused(data):
    draw = data.draw
    modalities = draw(st.lists(names, max_size=4) | st.dictionaries(names, st.integers(-1, 3)))
    own = list(modalities)
    some = st.lists(st.sampled_from(own), max_size=4) if own else st.just([])
    some |= st.lists(names, max_size=2)
    with suppress(PrivDistillError):
        inputs = PrivilegedInput(
            modalities,
            student=draw(some),
            teacher=draw(st.none() | some),
            dropout=draw(st.sampled_from([0, 0, 0.5, 0.99, 1, -1])),
        )
        channels = sum(inputs.channels.values())
        image = torch.randn(2, draw(st.sampled_from([channels, channels, 1, 5])), 3)
        if draw(st.booleans()):
            image = {
                n: torch.randn(2, c, 3) for n, c in inputs.channels.items() if draw(st.booleans())
            }
        present = draw(st.none() | st.just(torch.rand(2, len(inputs.modalities)) > 0.5))
        teacher, student = inputs.for_teacher(image, present), inputs.for_training(image, present)
        assert teacher.shape == (2, sum(inputs.channels[n] for n in inputs.teacher), 3)
        assert student.shape == (2, sum(inputs.channels[n] for n in inputs.student), 3)


@given(names | st.text(alphabet="body.*?01down", max_size=8))
def test_a_layer_is_found_or_its_neighbours_are_named(name):
    net = Small(2, 1, 2, 2)
    with suppress(PrivDistillError):
        assert dict(net.named_modules())[find_layer(net, name, tap="t", role="student")] is not net


@given(
    st.none() | st.integers(-3, 3) | names | st.just(len),
    st.sampled_from([torch.zeros(1, 2, 3), (), [1], {"a": torch.zeros(2)}, {}, None, "ab"]),
)
def test_an_entry_is_picked_or_the_value_is_returned(select, value):
    with suppress(PrivDistillError, TypeError if callable(select) else PrivDistillError):
        Layer("x", select=select).pick(value)


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=6)


@given(shapes, shapes.filter(len))
def test_features_have_a_layout_or_none(shape, spatial):
    found = find_layout(shape, spatial)
    assert found is None or len(found.grid) == len(spatial)
    read = as_map(torch.zeros(shape), spatial)
    assert (read is None) == (found is None)
    if found is not None:
        assert tuple(read.shape[2:]) == found.grid
        assert read.shape[0] == shape[0]


@given(shapes, shapes)
def test_an_adapter_gives_the_teachers_shape_or_cannot_be_built(student, teacher):
    with suppress(ShapeMismatchError):
        adapter = build_adapter("t", student, teacher)
        assume(student[0] == teacher[0])
        found = resample(adapter(torch.zeros(student)), teacher[2:])
        check_equal("t", found.shape, teacher, adapter)
        assert list(found.shape) == teacher
