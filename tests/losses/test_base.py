import pytest
import torch

from privdistill import GroundTruth, LatentKL, Objective, ObjectiveError, SoftTargetDiceBCE, Term
from privdistill.losses import as_objective
from privdistill.output import Step


class Constant(Term):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.tensor(value, requires_grad=True)

    def forward(self, step):
        return self.value * 1

    def extra_repr(self):
        return f"{self.value.item():g}"


STEP = Step(student=torch.zeros(1, 2, 4))


def test_sum_is_weighted_and_terms_are_not():
    total, terms = (0.5 * Constant(2.0) + Constant(3.0).named("other") * 2)(STEP)
    assert total.item() == 7
    assert {name: value.item() for name, value in terms.items()} == {"constant": 2, "other": 3}
    assert not any(value.requires_grad for value in terms.values())


def test_a_factor_reaches_every_term():
    total, _ = (2 * (Constant(1.0) + 3 * Constant(2.0)))(STEP)
    assert total.item() == 14


def test_repeated_names_are_numbered():
    _, terms = (Constant(1.0) + Constant(2.0) + Constant(3.0))(STEP)
    assert list(terms) == ["constant", "constant_2", "constant_3"]


def test_naming_leaves_the_original_alone():
    term = Constant(1.0)
    assert term.named("x").name == "x"
    assert term.name == "constant"


@pytest.mark.parametrize(
    ("term", "name"),
    [
        (SoftTargetDiceBCE(), "soft_target_dice_bce"),
        (GroundTruth(), "ground_truth"),
        (LatentKL(), "latent_kl"),
    ],
)
def test_default_names(term, name):
    assert term.name == name


def test_repr_is_the_formula():
    objective = 0.75 * SoftTargetDiceBCE(temperature=5.0) + 10 * LatentKL().named("z")
    assert repr(objective) == (
        "0.75 * SoftTargetDiceBCE(temperature=5.0) + 10 * LatentKL(tap='bottleneck').named('z')"
    )


def test_objective_knows_what_its_terms_read():
    objective = GroundTruth() + LatentKL("stage3") + LatentKL("stage3").named("again") + LatentKL()
    assert objective.taps == ("stage3", "bottleneck")
    assert objective.needs_target
    assert not objective.needs_teacher_logits
    assert (1 * SoftTargetDiceBCE()).needs_teacher_logits


def test_a_lone_term_is_an_objective_of_weight_one():
    assert repr(as_objective(GroundTruth())) == "1 * GroundTruth()"


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "2", None])
def test_weights_must_be_finite_numbers(weight):
    with pytest.raises(ObjectiveError, match="must be a finite number"):
        Objective([(weight, GroundTruth())])


def test_objective_of_nothing_is_refused():
    with pytest.raises(ObjectiveError, match="at least one term"):
        Objective([])


@pytest.mark.parametrize("name", ["", "a.b"])
def test_names_must_be_plain(name):
    with pytest.raises(ObjectiveError, match="must not be empty or hold a dot"):
        GroundTruth().named(name)


def test_something_else_is_no_objective():
    with pytest.raises(ObjectiveError, match="`objective` is a str"):
        as_objective("GroundTruth")


def test_a_term_that_is_no_scalar_is_refused():
    class Vector(Constant):
        def forward(self, step):
            return torch.ones(3)

    with pytest.raises(ObjectiveError, match=r"returned \(3,\); a term must return a scalar"):
        (1 * Vector(1.0))(STEP)
