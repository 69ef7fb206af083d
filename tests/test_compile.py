"""Compiled networks and compiled wrappers give what eager ones give."""

import copy
import shutil

import pytest
import torch
from paths import (
    EVERY,
    IMAGE,
    LABELS,
    NAMES,
    PATHS,
    PRESENT,
    Deep,
    all_at_once,
    assert_close,
    train,
)
from torch._dynamo.testing import CompileCounterWithBackend
from versions import WHOLE_GRAPHS

from privdistill import LifecycleError, ObjectiveError, PrivilegedInput

# Several heads, a state that a step changes and a teacher that learns are traced in ways of their
# own. What the others add is traced at once here, and path by path by `make test-all`.
TRACED = ("usual", "heads", "average", "joint")
OTHERS = [path for path in PATHS if path not in (*TRACED, "sigmoid", "no teacher")]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pair(build):
    """The same wrapper twice."""

    def make(**options):
        kd = build(validate="never", **options)
        return kd, copy.deepcopy(kd)

    return make


def compiled(model, backend="aot_eager"):
    return torch.compile(copy.deepcopy(model), backend=backend)


@pytest.mark.parametrize("heads", [False, True])
def test_promise_9_compiled_networks_give_equal_gradients(build, networks, heads):
    teacher, student = networks[0], Deep(networks[1]) if heads else networks[1]
    plain = train(build(teacher=copy.deepcopy(teacher), student=copy.deepcopy(student)))
    assert_close(train(build(teacher=compiled(teacher), student=compiled(student))), plain)


def test_a_student_compiled_after_the_wrapper_was_built_gives_equal_gradients(pair):
    kd, twin = pair()
    kd.student.compile(backend="aot_eager")
    assert_close(train(kd), train(twin))


@pytest.mark.parametrize("path", TRACED)
def test_promise_9_a_compiled_wrapper_gives_equal_gradients(pair, tiny_unet, path):
    kd, twin = pair(**PATHS[path](tiny_unet))
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(twin, backend=counter)
    assert_close(train(twin, fast), train(kd))
    if path == "heads" and not WHOLE_GRAPHS:
        return
    # Later steps compile nothing new: there is one graph for each mode.
    assert counter.frame_count == 1
    twin.eval()
    fast(IMAGE, LABELS)
    twin.train()
    train(twin, fast, steps=2)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        pytest.param(all_at_once, "eager", id="all at once"),
        *(
            pytest.param(PATHS[path], "aot_eager", id=path, marks=pytest.mark.slow)
            for path in OTHERS
        ),
    ],
)
def test_promise_9_every_path_compiled_gives_equal_gradients(pair, tiny_unet, options, backend):
    kd, twin = pair(**options(tiny_unet))
    assert_close(train(twin, torch.compile(twin, backend=backend)), train(kd))


def test_a_compiled_wrapper_fills_what_is_absent(pair, tiny_unet):
    kd, twin = pair(student=tiny_unet(4), inputs=EVERY)
    fast = torch.compile(twin, backend="aot_eager")
    found = train(twin, fast, steps=1, present=PRESENT)
    assert_close(found, train(kd, steps=1, present=PRESENT))
    with pytest.raises(AssertionError):
        assert_close(found, train(kd, steps=1))


def test_promise_9_masks_and_dropout_compile(build, tiny_unet):
    inputs = PrivilegedInput(NAMES, student=NAMES, dropout=0.5)
    kd = build(student=tiny_unet(4), inputs=inputs, validate="never")
    fast = torch.compile(kd, backend="aot_eager")
    drawn = {fast(IMAGE, LABELS, present=PRESENT).loss.item() for _ in range(6)}
    assert len(drawn) > 1
    assert torch.isfinite(torch.tensor([*drawn])).all()
    kd.eval()
    assert torch.allclose(
        fast(IMAGE, LABELS, present=PRESENT).loss, kd(IMAGE, LABELS, present=PRESENT).loss
    )


# Where a check breaks the graph, the compiler itself looks at the gradients of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_checks_of_values_end_with_the_first_compiled_step(build):
    counter = CompileCounterWithBackend("aot_eager")
    kd = build(validate="first")
    fast = torch.compile(kd, backend=counter)
    with pytest.raises(ObjectiveError, match="label map holds"):
        fast(IMAGE, LABELS + 5)
    counts = []
    for _ in range(4):
        train(kd, fast, steps=1)
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3


def test_a_teachers_hook_that_compile_skips_is_an_error_too(build, networks):
    teacher = torch.compile(networks[0].eval().requires_grad_(False), backend="aot_eager")
    with torch.no_grad():
        teacher(IMAGE)
    kd = build(teacher=teacher)
    with pytest.raises(LifecycleError, match=r"of the teacher did not run.*torch\._dynamo\.reset"):
        kd(IMAGE, LABELS)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, g++")
def test_promise_9_inductor_gives_equal_gradients(pair):
    kd, twin = pair()
    assert_close(train(twin, torch.compile(twin)), train(kd))
