import copy
import sys

import pytest
import torch

from privdistill import (
    ContrastiveProjection,
    GroundTruth,
    LatentKL,
    Objective,
    ObjectiveError,
    Ramp,
    SoftTargetDiceBCE,
    Term,
    VariationalInformation,
    kdnet,
)
from privdistill.losses.objective import as_objective
from privdistill.step import Step, TapPair


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


def two_terms(**fields):
    z = torch.tensor([[[3.0, -1.0], [0.0, 2.0]]])
    pair = TapPair(z.clone().requires_grad_(), z.flip(1))
    return Step(student=z.clone().requires_grad_(), taps={"bottleneck": pair}, **fields)


def test_without_a_target_terms_that_read_none_still_teach():
    loss, terms = (GroundTruth() + 2 * LatentKL())(two_terms())
    assert list(terms) == ["latent_kl"]
    assert loss.item() == pytest.approx(2 * terms["latent_kl"].item())


def test_without_a_target_an_objective_that_only_reads_it_says_so():
    with pytest.raises(ObjectiveError, match="the step has no target"):
        (GroundTruth() + GroundTruth().named("again"))(two_terms())


def test_balanced_terms_weigh_as_much_as_their_weights_say():
    step = two_terms(target=torch.tensor([[0, 1]]))
    loss, terms = (GroundTruth() + 1000 * LatentKL()).balanced()(step)
    assert loss.item() == pytest.approx(1 + 1000)
    assert terms["latent_kl"] == LatentKL()(step)


def test_balance_follows_a_running_mean_in_training_only():
    objective = (1.0 * LatentKL()).balanced(0.5)
    step = two_terms()
    first = LatentKL()(step).item()
    objective(step)
    other = TapPair(step.taps["bottleneck"].student, 3 * step.taps["bottleneck"].teacher)
    later = Step(student=step.student, taps={"bottleneck": other})
    second = LatentKL()(later).item()
    with torch.no_grad():
        assert objective(later)[0].item() == pytest.approx(second / first)
    assert objective(later)[0].item() == pytest.approx(second / (0.5 * first + 0.5 * second))
    assert objective.state_dict()["magnitudes"].item() == pytest.approx((first + second) / 2)


def test_a_term_that_is_zero_does_not_blow_up_a_balanced_objective():
    z = torch.zeros(1, 2, 2, requires_grad=True)
    objective = (1.0 * LatentKL()).balanced()
    loss, _ = objective(Step(student=z, taps={"bottleneck": TapPair(z, z.detach())}))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_balanced_and_unbalanced_objectives_do_not_add():
    with pytest.raises(ObjectiveError, match=r"\(a \+ b\).balanced\(\)"):
        (1.0 * GroundTruth()).balanced() + LatentKL()
    for wrong in (1.0, "0.9"):
        with pytest.raises(ObjectiveError, match=r"`decay` must be in \[0, 1\)"):
            (1.0 * GroundTruth()).balanced(wrong)


def test_balance_outlives_weights_and_sums():
    objective = 2 * ((1.0 * GroundTruth()).balanced(0.5) + (1.0 * LatentKL()).balanced(0.5))
    assert repr(objective) == ("(2 * GroundTruth() + 2 * LatentKL(tap='bottleneck')).balanced(0.5)")


def test_one_infinite_value_leaves_the_balance_as_it_was():
    objective = (1.0 * LatentKL()).balanced(0.5)
    step = two_terms()
    objective(step)
    size = objective.magnitudes.clone()
    far = TapPair(step.taps["bottleneck"].student * float("inf"), step.taps["bottleneck"].teacher)
    objective(Step(student=step.student, taps={"bottleneck": far}))
    assert torch.equal(objective.magnitudes, size)
    assert objective.half().magnitudes.dtype == torch.float32


def test_a_term_is_no_weight():
    with pytest.raises(ObjectiveError, match="finite number or a function of the step"):
        GroundTruth() * LatentKL()


def test_a_copy_keeps_what_its_terms_share_and_shares_nothing_with_the_original():
    term = VariationalInformation()
    objective = (term + 2 * term.named("again")).balanced()
    step = two_terms()
    objective.build(step)
    objective(step)
    twin = copy.deepcopy(objective)
    one, other = twin.terms
    assert one.likelihood is other.likelihood
    assert twin.named_terms["again"][1] is other
    assert twin(step)[0] == objective(step)[0]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in objective.parameters()}
    twin.magnitudes.zero_()
    assert objective.magnitudes.all()


def test_a_copy_made_before_networks_are_built_shares_them_among_its_own_names():
    term = VariationalInformation()
    twin = copy.deepcopy(term + term.named("again"))
    twin.build(two_terms())
    assert twin.terms[0].likelihood is twin.terms[1].likelihood
    assert term.likelihood is None


def test_terms_that_weigh_nothing_are_not_computed_and_need_nothing():
    class Broken(Constant):
        taps, needs_teacher, needs_target = ("deep",), True, True

        def build(self, step):
            raise AssertionError

        forward = build

    objective = 0 * (Broken(1.0) + Broken(2.0)) + Constant(3.0)
    objective.build(STEP)
    total, terms = objective(STEP)
    assert total.item() == 3
    assert list(terms) == ["constant"]


def test_a_schedule_that_is_zero_now_is_computed():
    _, terms = (Ramp(0, 1, steps=10) * Constant(3.0))(STEP)
    assert terms["constant"] == 3


def test_an_objective_in_which_nothing_weighs_anything_is_zero_with_a_graph():
    student = torch.full((1, 2, 4), float("inf"), requires_grad=True)
    total, terms = (0 * GroundTruth())(Step(student))
    total.backward()
    assert (total.item(), terms) == (0, {})
    assert not student.grad.any()


def test_a_balance_that_comes_from_meta_has_seen_no_term_yet():
    objective = (GroundTruth() + LatentKL()).balanced()
    step = two_terms(target=torch.tensor([[0, 1]]))
    objective(step)
    objective.to("meta").to_empty(device="cpu")
    assert torch.equal(objective.magnitudes, torch.zeros(2))
    assert objective(step)[0].item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("shape", "normalisation"),
    [
        ((2, 1, 1), "softmax"),
        ((2, 1, 1, 1), "l1"),
        ((2, 1, 4), "softmax_channel"),
        ((2, 4, 1), "softmax_spatial"),
    ],
)
def test_a_single_number_is_not_normalised(shape, normalisation):
    z = torch.randn(shape)
    term = LatentKL(normalisation=normalisation)
    with pytest.raises(ObjectiveError, match=r"\(2, .*always zero"):
        term.build(Step(z, taps={"bottleneck": TapPair(z, z)}))


def test_a_step_of_the_paper_s_objective_takes_few_calls():
    calls = []

    def count(frame, event, _argument):
        if event == "call" and "privdistill" in frame.f_globals.get("__name__", ""):
            calls.append(frame.f_code.co_name)

    student, teacher = torch.randn(2, 1, 3, 8, 8)
    features = TapPair(*torch.randn(2, 1, 4, 2, 2))
    target = torch.randint(0, 3, (1, 8, 8))
    step = Step(student, teacher, target=target, taps={"bottleneck": features}, validate=False)
    objective = kdnet()
    objective(step)
    sys.setprofile(count)
    objective(step)
    sys.setprofile(None)
    assert len(calls) <= 53, calls


def test_options_of_terms_with_networks_are_shown():
    assert repr(ContrastiveProjection(margin=2.0)) == (
        "ContrastiveProjection(tap='bottleneck', margin=2.0)"
    )
