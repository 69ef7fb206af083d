"""Losses of the user's own: what they see, what they must say, and what stands ready for them."""

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from privdistill import (
    FeatureTerm,
    GroundTruth,
    HintonKL,
    LatentKL,
    ObjectiveError,
    ResponseTerm,
    ShapeMismatchError,
    Step,
    TapPair,
    Term,
)

LABELLED = torch.tensor([True, False, True])


class Supervised(Term):
    """What a user wraps around another library's loss."""

    needs_target = True

    def __init__(self, criterion=None):
        super().__init__()
        self.criterion, self.seen = criterion or nn.CrossEntropyLoss(), []

    def forward(self, step):
        self.seen.append(step)
        return self.criterion(step.student, step.target)


def step(**fields):
    student = torch.randn(3, 2, 4, requires_grad=True)
    pair = TapPair(torch.randn(3, 5, 2, requires_grad=True), torch.randn(3, 5, 2))
    usual = {
        "target": torch.randint(0, 2, (3, 4)),
        "image": torch.randn(3, 1, 4),
        "taps": {"bottleneck": pair},
        "student_output": {"out": student, "heads": [student, student], "name": "x"},
    }
    return Step(student, torch.randn(3, 2, 4), **usual | fields)


@dataclass(frozen=True)
class Data:
    logits: Any
    name: str


class Named(OrderedDict):
    """A mapping whose entries are attributes, as those of transformers."""

    __getattr__ = OrderedDict.__getitem__


def forbidden(target):
    """A target that no loss can bear in its unlabelled row."""
    target = target.clone()
    target[1] = 10**6
    return target


class Rewritten(GroundTruth):
    """A library's term of which the user wrote the computation."""

    def forward(self, step):
        return nn.functional.cross_entropy(step.student, step.target)


class Reading:
    """A computation to be mixed into a term."""

    def forward(self, step):
        return nn.functional.cross_entropy(step.student, step.target)


class Mixed(Reading, GroundTruth):
    """It comes before the library's in the order of methods."""


class Rewired(GroundTruth):
    """A computation that is assigned later on."""


Rewired.forward = Reading.forward


def assigned():
    term = GroundTruth()
    term.forward = lambda step: Reading.forward(term, step)
    return term


FOREIGN = {
    "mixin": Mixed,
    "class": Rewired,
    "instance": assigned,
    "term": Supervised,
    "criterion": lambda: GroundTruth(nn.CrossEntropyLoss()),
    "function": lambda: GroundTruth(nn.functional.cross_entropy),
    "subclass": Rewritten,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_targets_of_unlabelled_samples_are_never_seen(kind):
    given = step()
    wanted = nn.functional.cross_entropy(given.student[LABELLED], given.target[LABELLED])
    hidden = Step(**vars(given) | {"target": forbidden(given.target), "labelled": LABELLED})
    found, _ = (1.0 * FOREIGN[kind]())(hidden)
    assert found.item() == pytest.approx(wanted.item())
    (slope,) = torch.autograd.grad(found, given.student)
    assert not slope[1].any()
    assert slope[0].any()


def test_a_foreign_term_gets_a_step_of_the_labelled_samples_alone():
    weights = torch.tensor([1.0, float("nan"), 2.0])
    members = ((torch.randn(3, 2, 4), 0.5), (torch.randn(3, 2, 4), torch.ones(3)))
    term = Supervised()
    (1.0 * term)(step(labelled=LABELLED, sample_weights=weights, members=members))
    (seen,) = term.seen
    assert seen.labelled.all()
    assert seen.sample_weights.tolist() == [1, 2]
    output = seen.student_output
    tensors = [seen.student, seen.teacher, seen.target, seen.image, *seen.taps["bottleneck"]]
    tensors += [seen.members[0][0], *seen.members[1], output["out"], *output["heads"]]
    assert {len(tensor) for tensor in tensors} == {2}
    assert seen.members[0][1] == 0.5
    assert isinstance(seen.taps["bottleneck"], TapPair)


@pytest.mark.parametrize("kind", FOREIGN)
def test_without_any_labelled_sample_it_costs_nothing_and_keeps_the_graph(kind):
    given = step(labelled=torch.zeros(3, dtype=torch.bool))
    with torch.no_grad():
        given.student[0] = float("inf")
    found, _ = (1.0 * FOREIGN[kind]())(given)
    (slope,) = torch.autograd.grad(found, given.student)
    assert found == 0
    assert not slope.any()


def test_what_has_weights_of_its_own_keeps_their_graph_without_any_label():
    given = step(labelled=torch.zeros(3, dtype=torch.bool))
    term = Supervised()
    term.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
    loss, _ = (1.0 * term)(Step(**vars(given) | {"student": given.student.half()}))
    loss.backward()
    assert not term.scale.grad.any()


@pytest.mark.parametrize("kind", [Data, Named, SimpleNamespace])
def test_what_the_student_returned_is_cut_to_the_labelled_samples_whatever_holds_it(kind):
    term = Supervised()
    given = kind(logits=torch.arange(3.0), name="x")
    (1.0 * term)(step(student_output=given, labelled=LABELLED))
    seen = term.seen[0].student_output
    assert type(seen) is kind
    assert (seen.logits.tolist(), seen.name) == ([0, 2], "x")
    assert given.logits.tolist() == [0, 1, 2]


def test_a_term_that_declares_no_target_gets_none_where_some_have_none():
    class Secret(Term):
        def forward(self, step):
            return step.target.float().mean() * step.student.mean()

    with pytest.raises(ObjectiveError, match="needs_target = True"):
        (Secret() + LatentKL())(step(labelled=LABELLED))


def test_a_criterion_is_called_for_each_sample_where_they_have_weights():
    given = step(sample_weights=torch.tensor([1.0, 0.0, 3.0]))
    rows = zip(given.student.split(1), given.target.split(1), strict=True)
    single = [nn.functional.cross_entropy(*row).item() for row in rows]
    found = GroundTruth(nn.CrossEntropyLoss())(given)
    assert found.item() == pytest.approx((single[0] + 3 * single[2]) / 4)
    with pytest.raises(ObjectiveError, match="must be finite and not negative"):
        GroundTruth(nn.CrossEntropyLoss())(step(sample_weights=torch.tensor([1.0, -1, 1])))


def test_a_criterion_computes_in_float32_under_autocast():
    given = step()
    term, half = GroundTruth(nn.CrossEntropyLoss()), given.student.half()
    with torch.autocast("cpu", torch.bfloat16):
        found = term(Step(half, target=given.target))
    assert found == term(Step(half.float(), target=given.target))


def test_a_criterion_of_another_library():
    monai = pytest.importorskip("monai.losses")
    criterion = monai.DiceCELoss(to_onehot_y=True, softmax=True)
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 1, 4, 4))
    objective = 0.25 * GroundTruth(criterion)
    assert repr(objective) == "0.25 * GroundTruth(DiceCELoss)"
    found, _ = objective(Step(logits, target=target))
    assert found.item() == pytest.approx(0.25 * criterion(logits, target).item())


def test_a_criterion_s_weights_move_with_the_objective():
    objective = 1.0 * GroundTruth(nn.CrossEntropyLoss(weight=torch.ones(2)))
    assert {buffer.dtype for buffer in objective.double().buffers()} == {torch.float64}


@pytest.mark.parametrize(
    "options", [{"ignore_index": 255}, {"class_weights": (1, 2)}, {"activation": "sigmoid"}]
)
def test_beside_a_criterion_options_of_dice_are_refused(options):
    with pytest.raises(ObjectiveError, match=next(iter(options))):
        GroundTruth(nn.CrossEntropyLoss(), **options)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, "dice", LatentKL()])
def test_what_is_no_criterion_is_refused(criterion):
    with pytest.raises(ObjectiveError, match="`criterion`"):
        GroundTruth(criterion)


def test_a_criterion_may_have_its_logits_enlarged():
    logits, target = torch.randn(1, 2, 2), torch.zeros(1, 4, dtype=torch.long)
    large = nn.functional.interpolate(logits, size=(4,), mode="linear")
    found = GroundTruth(nn.CrossEntropyLoss(), resize="logits")(Step(logits, target=target))
    assert found.item() == pytest.approx(nn.functional.cross_entropy(large, target).item())


class Reads(Term):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, step):
        return self.what(step)


@pytest.mark.parametrize(
    ("reads", "declaration"),
    [
        (lambda step: (step.student - step.teacher).mean(), "needs_teacher = True"),
        (lambda step: step.teacher.mean(), "needs_teacher = True"),
        (lambda step: step.target.float().mean(), "needs_target = True"),
        (lambda step: step.taps["deep"].student.mean(), r"taps = \('deep',\)"),
        (lambda step: step.members[0][0].mean(), "needs_teacher = True"),
        (lambda step: step.taps.get("deep").student.mean(), r": if it reads .*taps = \('deep',\)"),
        (lambda step: next(iter(step.taps.values())).student.mean(), r"taps = \('its name',\)"),
        (HintonKL(), "needs_teacher = True"),
        (LatentKL("deep"), r"taps = \('deep',\)"),
        (GroundTruth(), "needs_target = True"),
    ],
)
def test_a_term_that_reads_what_it_does_not_declare_learns_what_to_declare(reads, declaration):
    with pytest.raises(ObjectiveError, match=declaration):
        (1.0 * Reads(reads))(Step(torch.zeros(1, 2, 4)))


def test_a_term_is_not_told_to_declare_what_it_does_not_read():
    with pytest.raises(ObjectiveError) as refused:
        (1.0 * Reads(lambda step: step.taps.get("deep").student.mean()))(Step(torch.zeros(1, 2, 4)))
    assert "needs_" not in str(refused.value)


def test_other_errors_of_a_term_stay_what_they_are():
    with pytest.raises(KeyError):
        (1.0 * Reads(lambda step: {}["x"]))(step(taps={"x": None}))
    with pytest.raises(TypeError, match="len"):
        (1.0 * Reads(lambda step: len(3)))(Step(torch.zeros(1, 2, 4)))


class MMD(FeatureTerm):
    def compare(self, student, teacher):
        return (student.mean(2) - teacher.mean(2)).square().sum()


class Agreement(ResponseTerm):
    def compare(self, student, teacher, activation):
        assert activation == "softmax"
        return (student.softmax(1) * teacher.softmax(1)).sum(1).mean()


def test_a_new_feature_loss_is_its_formula():
    student, teacher = torch.randn(2, 3, 4).half(), torch.randn(2, 3, 4).requires_grad_()
    given = Step(student, taps={"deep": TapPair(student.requires_grad_(), teacher)})
    found, terms = (2 * MMD("deep"))(given)
    found.backward()
    assert list(terms) == ["mmd"]
    assert repr(MMD("deep")) == "MMD(tap='deep')"
    assert found.dtype == torch.float32
    assert teacher.grad is None
    with pytest.raises(ShapeMismatchError, match=r"mmd.*\(2, 3, 4\).*\(2, 3, 5\)"):
        MMD("deep")(Step(student, taps={"deep": TapPair(student, torch.zeros(2, 3, 5))}))


def test_a_new_loss_on_logits_is_its_formula():
    student, teacher = torch.randn(2, 3, 4).half(), torch.randn(2, 3, 4).requires_grad_()
    found, _ = (1.0 * Agreement())(Step(student.requires_grad_(), teacher))
    found.backward()
    assert found.dtype == torch.float32
    assert teacher.grad is None
    with pytest.raises(ShapeMismatchError, match=r"agreement.*\(2, 3, 4\).*\(2, 3, 8\)"):
        Agreement()(Step(student, torch.zeros(2, 3, 8)))


@pytest.mark.parametrize("base", [FeatureTerm, ResponseTerm])
def test_a_base_without_a_comparison_says_what_to_write(base):
    z = torch.zeros(1, 2, 4)
    with pytest.raises(ObjectiveError, match="def compare"):
        base()(Step(z, z, taps={"bottleneck": TapPair(z, z)}))


def forgetful(base):
    class Forgetful(base):
        def __init__(self):
            self.sharpness = 2.0

        def forward(self, step):
            return step.student.mean()

    return Forgetful


@pytest.mark.parametrize("base", [Term, FeatureTerm, ResponseTerm])
def test_a_term_that_forgets_its_base_s_init_is_told_so(base):
    with pytest.raises(ObjectiveError, match=r"Forgetful.*super\(\).__init__"):
        forgetful(base)() + MMD()


def distance(student, teacher, *, activation, power=2.0):
    assert activation == "softmax"
    return (student - teacher).abs().pow(power).mean()


@dataclass(eq=False, repr=False, kw_only=True)
class Distance(ResponseTerm, function=distance):
    power: float = 2.0


def test_a_loss_that_is_a_function_is_a_class_of_its_options():
    student, teacher = torch.randn(2, 2, 3, 4)
    found = Distance(power=3.0)(Step(student, teacher))
    assert found == distance(student, teacher, activation="softmax", power=3.0)
    assert repr(Distance(power=3.0)) == "Distance(power=3.0)"
