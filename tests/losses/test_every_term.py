"""What every term must keep: its gradients, its precision, its size, its silence and its errors."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from terms import KINDS, make

from privdistill import (
    AttentionTransfer,
    CenteredKernelAlignment,
    ChannelWise,
    ContrastiveProjection,
    FeatureL2,
    FeatureTerm,
    Gram,
    GroundTruth,
    HintonKL,
    HolisticAdversarial,
    LayerNotFoundError,
    LocalConsistency,
    ObjectiveError,
    PairwiseSimilarity,
    PrototypeSimilarity,
    ReliableSoftTargetCE,
    ResponseTerm,
    ShapeMismatchError,
    SoftTargetDiceBCE,
    Step,
    TapPair,
    VariationalInformation,
)

VARIANTS = (
    partial(FeatureL2, normalise=True),
    partial(HintonKL, temperature=2.0, standardise=True),
    partial(LocalConsistency, reduction="sum"),
    partial(CenteredKernelAlignment, over="samples"),
    partial(PairwiseSimilarity, max_positions=2),
)
CASES = {repr(new()): new for new in (*(partial(make, kind) for kind in KINDS), *VARIANTS)}
OF_FEATURES = [case for case, new in CASES.items() if isinstance(new(), FeatureTerm)]
OF_LOGITS = [case for case, new in CASES.items() if isinstance(new(), ResponseTerm | GroundTruth)]
EVERY = pytest.mark.parametrize("case", CASES)
ACTIVATED = pytest.mark.parametrize(
    ("case", "activation"),
    [(case, "softmax") for case in CASES] + [(case, "sigmoid") for case in OF_LOGITS],
)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# Not zero where both networks are equal.
ABSOLUTE = (
    *(ContrastiveProjection, GroundTruth, HolisticAdversarial),
    *(SoftTargetDiceBCE, VariationalInformation),
)
# Measured in test_relational.py and test_adversarial.py, on maps that have a structure.
STRUCTURED = (CenteredKernelAlignment, HolisticAdversarial, LocalConsistency, PairwiseSimilarity)
STRUCTURED += (PrototypeSimilarity,)


def step(student, teacher, labels=None, activation="softmax", **options):
    """A step whose logits and features are the same tensors."""
    batch, channels, *space = student.shape
    if labels is None:
        voxels = torch.arange(batch * student[0, 0].numel(), device=student.device)
        labels = voxels.reshape(batch, *space) % min(2, channels)
    if activation == "sigmoid":
        labels = torch.nn.functional.one_hot(labels, max(2, channels)).movedim(-1, 1)[:, :channels]
    taps = dict.fromkeys(("bottleneck", "decoder"), TapPair(student, teacher))
    image = torch.zeros(batch, 1, *space, device=student.device)
    usual = {"target": labels, "image": image, "taps": taps, "activation": activation}
    options = {**usual, **options}  # PyTorch 2.6 cannot compile a | b
    return Step(student, teacher, **options)


def built(case, given):
    term = CASES[case]()
    term.build(given)
    return term


def seeded(term, given):
    """A term's value with the same positions drawn each time."""
    torch.manual_seed(0)
    return term(given)


def learnable(case, student, teacher, labels=None, **options):
    student = student.clone().requires_grad_()
    given = step(student, teacher, labels, **options)
    loss = built(case, given)(given)
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert student.grad.isfinite().all()
    return loss.item()


@EVERY
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_one_voxel(case, axes):
    student, teacher = torch.randn(2, 2, 3, *[1] * axes)
    # Some compare nothing that one voxel has, and would be zero for any features.
    kinds = (AttentionTransfer, ChannelWise, PairwiseSimilarity)
    none = isinstance(CASES[case](), kinds) or case == "CenteredKernelAlignment(tap='bottleneck')"
    with pytest.raises(ObjectiveError) if none else nullcontext():
        learnable(case, student, teacher)


@EVERY
def test_one_class(case):
    if "standardise" not in case:
        learnable(case, *torch.randn(2, 2, 1, 4, 4), activation="sigmoid")


@ACTIVATED
def test_nothing_but_background(case, activation):
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    learnable(case, *torch.randn(2, 2, 3, 4, 4), labels, activation=activation)


@ACTIVATED
def test_equal_networks_cost_nothing(case, activation):
    z = torch.randn(2, 3, 4, 4)
    z[0, :, 0] = 0
    cost = learnable(case, z, z, z.argmax(1), activation=activation)
    assert isinstance(CASES[case](), ABSOLUTE) or abs(cost) < 1e-6


@EVERY
def test_nothing_but_zeros(case):
    learnable(case, torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))


@ACTIVATED
@HALF
@pytest.mark.parametrize("constant", [True, False])
def test_extreme_half_precision_stays_finite(case, activation, dtype, constant):
    # The slope of a Gram matrix's square is cubic: at 1e4 fp16 has no number for it.
    size = 1e2 if case.startswith("Gram") and dtype == torch.float16 else 1e4
    student, teacher = (size * torch.randn(2, 2, 3, 4, 4).sign()).to(dtype)
    if constant:
        student = size * torch.tensor([1, -1, 1]).reshape(1, 3, 1, 1).expand(2, 3, 4, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        learnable(case, student, teacher, activation=activation)


@ACTIVATED
def test_gradients_reach_the_student_and_own_networks_alone(case, activation):
    student, teacher = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    term = built(case, step(student, teacher))

    def loss(student):
        return seeded(term, step(student, teacher, activation=activation))

    # Its weights depend on the student and carry no gradient, so that differences do not agree.
    if not isinstance(term, ReliableSoftTargetCE):
        assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert loss(student).dtype == torch.float64
    assert student.grad.isfinite().all()
    assert teacher.grad is None
    assert all(weight.grad is not None for weight in term.parameters())


@pytest.mark.parametrize("case", [c for c in CASES if not isinstance(CASES[c](), STRUCTURED)])
def test_the_value_does_not_change_with_the_patch_size(case):
    sizes = [torch.randn(2, 2, 3, *[size] * 3) for size in (32, 64)]
    given = [step(s + t, t, (t + torch.randn(t.shape)).argmax(1), validate=False) for s, t in sizes]
    term = built(case, given[0])
    small, large = (term(one).item() for one in given)
    assert abs(small) > 0.01
    assert large == pytest.approx(small, rel=0.05)


@EVERY
def test_terms_compile_whole_and_ignore_autocast(case):
    tensors = torch.randn(2, 2, 3, 4, 4)
    term = built(case, step(*tensors))

    def loss(student, teacher):
        return term(step(student, teacher, validate=False))

    # Else terms count as one function that is compiled again and again.
    torch.compiler.reset()
    torch.manual_seed(0)
    expected = loss(*tensors)
    torch.manual_seed(0)
    found = torch.compile(loss, backend="eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*tensors), expected)


@EVERY
def test_terms_run_on_meta(case):
    student, teacher = torch.empty(2, 2, 3, 4, 4, device="meta")
    student.requires_grad_()
    term = built(case, step(student, teacher))
    if isinstance(term, HolisticAdversarial):
        term.critic.to("meta")
    loss = term(step(student, teacher))
    loss.backward()
    assert loss.is_meta
    assert loss.shape == ()
    assert all(weight.is_meta for weight in term.parameters())


@pytest.mark.parametrize("case", OF_FEATURES)
def test_features_that_cannot_be_compared_are_refused_with_both_shapes(case):
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 8)
    with pytest.raises(ShapeMismatchError, match=r"\(2, 3, 4\).* \(2, 3, 8\)"):
        CASES[case]()(step(student, teacher))
    other = step(student, torch.randn(2, 5, 4))
    if CASES[case]().equal_channels:
        with pytest.raises(ShapeMismatchError, match="adapter"):
            CASES[case]()(other)
    else:
        assert built(case, other)(other).isfinite()


@EVERY
def test_a_step_that_lacks_something_is_refused(case):
    with pytest.raises(
        (LayerNotFoundError, ObjectiveError), match=r"no (tap|teacher|target|image)"
    ):
        CASES[case]()(Step(torch.zeros(1, 3, 4)))


def test_style_of_extreme_features_is_finite():
    student, teacher = 1e4 * torch.randn(2, 2, 3, 4, 5).sign().half()
    assert Gram()(step(student, teacher)).isfinite()
