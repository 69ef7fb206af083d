"""`privdistill.functional`: every loss as a function, which its term calls."""

import inspect
import re

import pytest
import torch
from terms import KINDS, make

import privdistill.functional as F
from privdistill import (
    ContrastiveProjection,
    GroundTruth,
    HolisticAdversarial,
    ObjectiveError,
    PrototypeSimilarity,
    ReliableSoftTargetCE,
    ResponseTerm,
    ShapeMismatchError,
    Step,
    TapPair,
    VariationalInformation,
)

OPTIONS = {
    "AttentionTransfer": {"power": 3.0},
    "CenteredKernelAlignment": {"over": "samples"},
    "ChannelWise": {"temperature": 2.0},
    "FeatureL2": {"normalise": True},
    "GroundTruth": {"class_weights": (1.0, 2.0, 3.0), "batch_dice": True},
    "HintonKL": {"temperature": 2.0, "reduction": "sum"},
    "LatentKL": {"normalisation": "l1"},
    "LocalConsistency": {"reduction": "sum"},
    "LogitMSE": {"centre": True},
    "PairwiseSimilarity": {"scale": 1.0},
    "ReliableSoftTargetCE": {"temperature": 3.0, "ignore_index": 2},
    "SoftTargetDiceBCE": {"temperature": 2.0, "binarisation": "soft", "smoothing": 0.5},
}
# Their functions take what the term's own networks made.
LEARNT = (ContrastiveProjection, VariationalInformation)
PLAIN = [kind for kind in KINDS if kind not in LEARNT]
WITH_TEACHER = [kind for kind in PLAIN if kind not in (GroundTruth, HolisticAdversarial)]


def function(kind):
    return getattr(F, make(kind).name)


def step():
    logits = torch.randn(2, 2, 3, 4, 4)
    pair = TapPair(torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4))
    taps = {"bottleneck": pair, "decoder": pair}
    target = torch.randint(0, 3, (2, 4, 4))
    return Step(*logits, target=target, image=torch.randn(2, 1, 4, 4), taps=taps)


def arguments(kind, given, critic=None):
    if kind is HolisticAdversarial:
        return [given.student, critic, given.image]
    if kind is GroundTruth:
        return [given.student, given.target]
    of = [given.student, given.teacher] if issubclass(kind, ResponseTerm) else given.taps["decoder"]
    more = {
        PrototypeSimilarity: torch.nn.functional.one_hot(given.target, 3).movedim(-1, 1).float(),
        ReliableSoftTargetCE: given.target,
    }
    return [*of, more[kind]] if kind in more else [*of]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_object_equals_function(kind):
    options, given = OPTIONS.get(kind.__name__, {}), step()
    term = make(kind, **options)
    taken = arguments(kind, given, getattr(term, "critic", None))
    assert function(kind)(*taken, **options) == term(given)


@pytest.mark.parametrize("kind", WITH_TEACHER, ids=lambda kind: kind.__name__)
def test_no_gradient_flows_into_what_the_teacher_gave(kind):
    student, teacher, *more = arguments(kind, step())
    function(kind)(student.requires_grad_(), teacher.requires_grad_(), *more).backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize("kind", LEARNT, ids=lambda kind: kind.__name__)
def test_a_term_with_networks_calls_its_function(kind, monkeypatch):
    module = inspect.getmodule(kind)
    monkeypatch.setattr(module, make(kind).name, lambda *_args, **_options: torch.tensor(7.0))
    term, given = make(kind), step()
    term.build(given)
    assert term(given) == 7


@pytest.mark.parametrize("name", F.__all__)
def test_a_function_says_what_it_takes_and_where_it_comes_from(name):
    text = inspect.getdoc(getattr(F, name))
    assert re.search(r"\(B, ", text)
    assert "Example:\n" in text
    if name not in ("binarise", "resize"):
        assert "Source:\n" in text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_shapes_that_do_not_fit_are_refused_and_never_broadcast(kind):
    one, other = torch.zeros(1, 3, 4), torch.zeros(1, 3, 1)
    arguments = {GroundTruth: [one, other], HolisticAdversarial: [one[0], None]}
    three = (PrototypeSimilarity, ReliableSoftTargetCE, VariationalInformation)
    arguments |= {kind: [one, other, one] for kind in three}
    with pytest.raises(ShapeMismatchError):
        function(kind)(*arguments.get(kind, [one, other]))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ObjectiveError, match="'tanh'"):
        F.hinton_kl(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), activation="tanh")
