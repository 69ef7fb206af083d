"""Compiled networks and compiled wrappers give what eager ones give."""

import copy
import shutil

import pytest
import torch
from paths import EVERY, IMAGE, LABELS, NAMES, PATHS, PRESENT, Deep, assert_close, train
from torch._dynamo.testing import CompileCounterWithBackend
from versions import whole_graphs

from privdistill import LifecycleError, ObjectiveError, PrivilegedInput

# Several heads, a state that a step changes and a teacher that learns are traced in ways of their
# own; the other paths differ in what the compiler reads, and are traced by `make test-all`.
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


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_promise_9_compiled_networks_give_equal_gradients(build, networks, which):
    plain = train(build(teacher=copy.deepcopy(networks[0]), student=copy.deepcopy(networks[1])))
    teacher, student = networks
    if which != "student":
        teacher = compiled(teacher)
    if which != "teacher":
        student = compiled(student)
    assert_close(train(build(teacher=teacher, student=student)), plain)


def test_a_compiled_student_with_heads_gives_equal_gradients(build, networks):
    student = Deep(networks[1])
    plain = train(build(student=copy.deepcopy(student)))
    assert_close(train(build(student=compiled(student))), plain)


def test_a_student_compiled_after_the_wrapper_was_built_gives_equal_gradients(pair):
    kd, twin = pair()
    kd.student.compile(backend="aot_eager")
    assert_close(train(kd), train(twin))


@pytest.mark.parametrize(
    ("path", "backend"),
    [
        *((path, "aot_eager") for path in TRACED),
        *((path, "eager") for path in OTHERS),
        *(pytest.param(path, "aot_eager", marks=pytest.mark.slow) for path in OTHERS),
    ],
)
def test_promise_9_a_compiled_wrapper_gives_equal_gradients(pair, tiny_unet, path, backend):
    kd, twin = pair(**PATHS[path](tiny_unet))
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


@pytest.mark.parametrize("path", ["usual", "average", pytest.param("heads", marks=whole_graphs)])
def test_promise_9_later_steps_compile_nothing_new(build, tiny_unet, path):
    counter = CompileCounterWithBackend("aot_eager")
    kd = build(validate="never", **PATHS[path](tiny_unet))
    fast = torch.compile(kd, backend=counter)
    train(kd, fast)
    assert counter.frame_count == 1
    kd.eval()
    fast(IMAGE, LABELS)
    kd.train()
    train(kd, fast, steps=2)
    # one graph for each mode
    assert counter.frame_count == 2


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
