import copy

import pytest
import torch
from torch import nn

from privdistill import (
    GroundTruth,
    LatentKL,
    LayerNotFoundError,
    LifecycleError,
    ObjectiveError,
    ResponseTerm,
    ShapeMismatchError,
    SoftTargetDiceBCE,
    Tap,
    describe,
)
from privdistill.sides import trial
from privdistill.sides.heads import find_heads
from privdistill.sides.side import Side


def tried(net, places=None, *, training=False):
    """A side of a network that was tried once, and what was found."""
    options = {"reads_logits": False, "read": (), "example": (1, 1, 4, 4)}
    side = Side(net, places or {}, role="student", select=find_heads, **options)
    return side, trial.run(side, torch.ones(1, 1, 4, 4), training=training)


def noisy():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(), nn.ReLU(inplace=True))


def test_modes_buffers_and_random_state_are_restored():
    net = noisy()
    net[2].eval()
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    state = torch.get_rng_state()
    tried(net, training=True)
    assert [module.training for module in net] == [True, True, False, True]
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_overwritten_in_place_are_marked_for_cloning():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    side, _ = tried(net, {"a": "0", "b": "1"})
    assert side.recorder.cloned == {"a"}


def test_batch_norm_on_single_voxels_survives_a_batch_of_one():
    net = nn.Sequential(nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2))
    _, found = tried(net, training=True)
    assert found.output.shape == (2, 2, 1, 1)


def test_a_replaced_buffer_is_put_back():
    class Counter(nn.Conv2d):
        def __init__(self):
            super().__init__(1, 2, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    net = Counter()
    calls = net.calls
    tried(net)
    assert net.calls is calls
    assert net.calls == 0


def wrapped(build, student, **options):
    return build(student=student, objective=GroundTruth(), teacher=None, inputs=None, **options)


IMAGE = torch.zeros(1, 1, 4, 4)


def test_promise_8_the_example_goes_in_as_it_is(build):
    net = nn.Conv2d(1, 2, 1)
    assert wrapped(build, net.double(), example=IMAGE.double())
    with pytest.raises(
        ShapeMismatchError, match=r"torch.float32 \(1, 1, 4, 4\), with weights of torch.float64"
    ):
        wrapped(build, net.double(), example=IMAGE)


def test_a_teacher_that_would_fail_in_the_first_step_fails_in_the_dry_run(build, tiny_unet):
    with pytest.raises(ShapeMismatchError, match=r"The teacher failed.*bfloat16"):
        build(teacher=tiny_unet(4).bfloat16())


def test_a_half_teacher_is_wrapped_and_run_under_autocast(build, tiny_unet):
    with torch.autocast("cpu", torch.bfloat16):
        kd = build(teacher=tiny_unet(4).bfloat16())
        out = kd(torch.randn(2, 4, 8, 8), torch.randint(0, 3, (2, 8, 8)))
    assert torch.isfinite(out.loss)
    assert all(p.dtype == torch.float32 for p in kd.parameters())


def test_whole_numbers_among_the_weights_do_not_decide_the_dtype(build):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            weights = torch.ones(2, 1, 1, 1, dtype=torch.uint8)
            self.packed = nn.Parameter(weights, requires_grad=False)

        def forward(self, x):
            return nn.functional.conv2d(x, self.packed.float())

    wrapped(build, nn.Sequential(Packed(), nn.Conv2d(2, 2, 1)), example=IMAGE)


def test_an_offloaded_teacher_teaches(build, tiny_unet):
    accelerate = pytest.importorskip("accelerate")
    teacher = tiny_unet(4)
    expected = build(teacher=copy.deepcopy(teacher))
    kd = build(teacher=accelerate.cpu_offload(teacher, torch.device("cpu")))
    batch = torch.randn(2, 4, 8, 8), torch.randint(0, 3, (2, 8, 8))
    assert next(teacher.parameters()).is_meta
    assert torch.equal(kd(*batch).loss, expected(*batch).loss)


@pytest.mark.parametrize("example", [torch.zeros(1, 4, 8, 8), None])
def test_a_teacher_without_values_is_refused_if_the_student_has_some(build, tiny_unet, example):
    options = {"objective": SoftTargetDiceBCE(), "example": example}
    with pytest.raises(LifecycleError, match="teacher has parameters on the meta device"):
        build(teacher=tiny_unet(4).to("meta"), **options)
    build(teacher=tiny_unet(4).to("meta"), student=tiny_unet(1).to("meta"), **options)


class Writing(nn.Module):
    """A codebook that follows what it sees, as in vector quantisation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.book, self.rest = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        with torch.no_grad():
            self.book.data.add_(1)
            self.rest.add_(1)
        return self.conv(x)


def test_parameters_that_a_forward_pass_writes_are_restored(build):
    net = Writing()
    version = net.conv.weight._version
    wrapped(build, net, example=IMAGE)
    assert not net.book.any()
    assert not net.rest.any()
    assert net.conv.weight._version == version


def test_expanded_buffers_and_inference_tensors_pass(build, tiny_unet):
    with torch.inference_mode():
        teacher = tiny_unet(4)
        teacher.bottleneck.append(nn.BatchNorm2d(8))
    teacher.register_buffer("grid", torch.zeros(1).expand(8))
    kd = build(teacher=teacher)
    kd(torch.randn(2, 4, 8, 8), torch.randint(0, 3, (2, 8, 8))).loss.backward()


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_that_refuses_one_sample_gets_two(build, training):
    norm = nn.BatchNorm2d(2, track_running_stats=training)
    net = nn.Sequential(nn.Conv2d(1, 2, 4), norm, nn.Upsample(scale_factor=4))
    wrapped(build, net, example=IMAGE)
    build(student=net, objective=LatentKL(), taps={"bottleneck": Tap("bottleneck", "1")})
    describe(net, IMAGE)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_where_one_network_needs_two_samples_both_get_them(build, role):
    def coarse(channels, norm):
        layers = nn.Conv2d(channels, 4, 8), norm, nn.Upsample(scale_factor=8), nn.Conv2d(4, 3, 1)
        return nn.Sequential(*layers)

    norms = {"teacher": nn.Identity(), "student": nn.Identity()}
    norms[role] = nn.BatchNorm2d(4, track_running_stats=False)
    networks = coarse(4, norms["teacher"]), coarse(1, norms["student"])
    kd = build(teacher=networks[0], student=networks[1], taps={"bottleneck": Tap("0", "0")})
    kd(torch.randn(2, 4, 8, 8), torch.randint(0, 3, (2, 8, 8)))


def test_a_failure_in_a_step_names_the_network_and_what_it_was_given(build):
    kd = build()
    with pytest.raises(RuntimeError) as caught:
        kd(torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randint(0, 3, (2, 8, 8)))
    assert any(
        "teacher" in note and "float64 (2, 4, 8, 8)" in note for note in caught.value.__notes__
    )


@pytest.mark.parametrize("error", [AssertionError, KeyError, ValueError])
def test_any_error_of_a_network_says_which_network_and_what_it_was_given(build, error):
    class Failing(nn.Module):
        def forward(self, x):
            raise error("31 is odd")

    with pytest.raises(
        ShapeMismatchError, match=r"(?s)The student failed.*\(1, 1, 4, 4\).*31 is odd"
    ):
        wrapped(build, Failing(), example=IMAGE)


def test_a_network_of_image_and_mask_is_told_how_to_be_wrapped(build):
    class Masked(nn.Conv2d):
        def forward(self, x, mask):
            return super().forward(x) * mask

    with pytest.raises(ShapeMismatchError, match=r"(?s)network\(image, mask\).*def forward"):
        wrapped(build, Masked(1, 2, 1), example=IMAGE)
    kd = wrapped(build, Masked(1, 2, 1), example=None)
    with pytest.raises(TypeError) as caught:
        kd(IMAGE, torch.zeros(1, 4, 4, dtype=torch.long))
    assert "def forward(self, image)" in "".join(caught.value.__notes__)


PROGRAMS = {
    "script": torch.jit.script,
    "trace": lambda net: torch.jit.trace(net, torch.zeros(2, 4, 8, 8)),
    "export": lambda net: torch.export.export(
        net, (torch.zeros(2, 4, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module(),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_teaches_without_taps_and_has_no_hooks_for_taps(build, tiny_unet, kind):
    net = tiny_unet(4).eval()
    program = PROGRAMS[kind](net)
    batch = torch.randn(2, 4, 8, 8), torch.randint(0, 3, (2, 8, 8))
    objective = SoftTargetDiceBCE() + GroundTruth()
    kd = build(teacher=program, objective=objective, example=torch.zeros(2, 4, 8, 8))
    assert torch.allclose(kd(*batch).loss, build(teacher=net, objective=objective)(*batch).loss)
    assert type(program).__name__ in str(kd)
    assert not any(part.training for part in program.modules())
    assert not any(p.requires_grad for p in program.parameters())
    for taps in ({}, {"bottleneck": Tap("bottleneck", "bottleneck")}):
        with pytest.raises(LayerNotFoundError, match=r"teacher is a program.*no hooks"):
            build(teacher=program, taps=taps)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_frozen_program_teaches_and_predicts(build, tiny_unet):
    net, batch = tiny_unet(4).eval(), (torch.randn(2, 4, 8, 8), torch.randint(0, 3, (2, 8, 8)))
    program = torch.jit.freeze(torch.jit.script(net))
    objective = SoftTargetDiceBCE() + GroundTruth()
    kd = build(teacher=program, objective=objective)
    assert torch.allclose(kd(*batch).loss, build(teacher=net, objective=objective)(*batch).loss)
    kd.close()
    student = build(
        student=torch.jit.freeze(torch.jit.script(tiny_unet(1).eval())), objective=objective
    )
    assert student.predict(batch[0]).shape == (2, 3, 8, 8)


def test_an_exported_student_trains_and_predicts(build, tiny_unet):
    program = torch.export.export(tiny_unet(1), (torch.zeros(2, 1, 8, 8),)).module()
    objective = SoftTargetDiceBCE() + GroundTruth()
    kd = build(student=program, objective=objective, example=torch.zeros(2, 4, 8, 8))
    image = torch.randn(2, 4, 8, 8)
    kd.eval().train()(image, torch.randint(0, 3, (2, 8, 8))).loss.backward()
    assert any(p.grad is not None for p in kd.student.parameters())
    assert torch.equal(kd.predict(image), program(image[:, 2:3]))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_network_that_holds_a_program_is_tapped_outside_of_it(build, tiny_unet):
    def mixed():
        net = tiny_unet(4)
        net.encoder = torch.jit.script(net.encoder)
        return net

    for taps in ({}, {"bottleneck": Tap("encoder", None)}, {"bottleneck": Tap("encoder.0", None)}):
        with pytest.raises(LayerNotFoundError, match=r"teacher.* program"):
            build(teacher=mixed(), taps=taps)
    build(teacher=mixed(), taps={"bottleneck": Tap("bottleneck", None)})
    assert "bottleneck" in str(describe(mixed(), torch.zeros(1, 4, 8, 8)))


@pytest.mark.parametrize("term", [SoftTargetDiceBCE, GroundTruth])
def test_a_softmax_over_one_channel_is_refused_before_the_first_step(build, tiny_unet, term):
    both = {"teacher": tiny_unet(4, 1), "student": tiny_unet(1, 1)}
    with pytest.raises(ObjectiveError, match="softmax over 1 channel"):
        build(objective=term(), **both)
    for fitting in (term(activation="sigmoid"), GroundTruth(nn.BCEWithLogitsLoss())):
        build(objective=fitting, **both).close()


@pytest.mark.parametrize("base", [ResponseTerm, GroundTruth])
def test_a_term_of_ones_own_may_read_one_channel_as_it_likes(build, tiny_unet, base):
    class Depth(base):
        def forward(self, step):
            return step.student.abs().mean()

    kd = build(objective=Depth(), teacher=tiny_unet(4, 1), student=tiny_unet(1, 1))
    assert kd(torch.randn(2, 4, 8, 8), torch.zeros(2, 8, 8)).loss > 0


def test_one_stateless_module_may_serve_both_networks(build, tiny_unet):
    relu, dropout = nn.ReLU(), nn.Dropout()
    teacher, student = tiny_unet(4), tiny_unet(1)
    teacher.bottleneck[1] = student.bottleneck[1] = relu
    build(teacher=teacher, student=student).close()
    teacher.bottleneck.append(dropout)
    student.bottleneck.append(dropout)
    with pytest.raises(LifecycleError, match="Dropout"):
        build(teacher=teacher, student=student)
