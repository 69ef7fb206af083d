import numpy as np
import pytest
import torch

from privdistill import (
    AttentionTransfer,
    ChannelWise,
    ContrastiveProjection,
    FeatureCosine,
    FeatureL1,
    FeatureL2,
    Gram,
    ObjectiveError,
    Step,
    TapPair,
    VariationalInformation,
)

SHAPES = [(2, 3, 5), (2, 3, 4, 5), (2, 3, 3, 4, 2)]
PLAIN = [
    FeatureL1,
    FeatureL2,
    lambda: FeatureL2(normalise=True),
    FeatureCosine,
    AttentionTransfer,
    ChannelWise,
    Gram,
]
LEARNT = [VariationalInformation, ContrastiveProjection]


def name(make):
    return repr(make())


def step(student, teacher):
    return Step(student=student, taps={"bottleneck": TapPair(student, teacher)})


def features(shape=SHAPES[1], other=None, dtype=torch.float32):
    student, teacher = torch.randn(shape), torch.randn(other or shape)
    if other is None:
        student = student + teacher
    return student.to(dtype), teacher.to(dtype)


def built(make, student, teacher):
    term = make()
    term.build(step(student, teacher))
    return term


def flat(values):
    return values.detach().double().flatten(2).numpy()


def norm(vector):
    return np.sqrt((vector**2).sum() + 1e-12)


def l1(student, teacher):
    return np.abs(student - teacher).mean()


def l2(student, teacher):
    return ((student - teacher) ** 2).mean()


def normalised_l2(student, teacher):
    def score(z):
        return (z - z.mean(2, keepdims=True)) / np.sqrt(z.var(2, keepdims=True) + 1e-5)

    return l2(score(student), score(teacher))


def cosine(student, teacher):
    values = []
    for b in range(student.shape[0]):
        for i in range(student.shape[2]):
            s, t = student[b, :, i], teacher[b, :, i]
            values.append(1 - s @ t / (norm(s) * norm(t)))
    return np.mean(values)


def attention(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q_s, q_t = (s**2).sum(0), (t**2).sum(0)
        total += ((q_s / norm(q_s) - q_t / norm(q_t)) ** 2).sum()
    return total / len(student)


def channel_wise(student, teacher, temperature=4.0):
    total = 0.0
    for b in range(student.shape[0]):
        for c in range(student.shape[1]):
            p, q = (np.exp(z[b, c] / temperature) for z in (student, teacher))
            p, q = p / p.sum(), q / q.sum()
            total += (q * np.log(q / p)).sum() / student.shape[1]
    return temperature**2 * total / student.shape[0]


def gram(student, teacher):
    channels, space = student.shape[1:]
    s, t = (np.einsum("bci,bdi->bcd", z, z) for z in (student, teacher))
    return ((s - t) ** 2).sum((1, 2)).mean() / (4 * channels**2 * space**2)


REFERENCES = [l1, l2, normalised_l2, cosine, attention, channel_wise, gram]


def close(found, expected):
    return abs(found.item() - expected) <= 1e-6 * max(1.0, abs(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("make", "reference"), list(zip(PLAIN, REFERENCES, strict=True)))
def test_value_equals_the_formula(make, reference, shape):
    student, teacher = features(shape)
    assert close(make()(step(student, teacher)), reference(flat(student), flat(teacher)))


@pytest.mark.parametrize("shape", SHAPES)
def test_variational_information_equals_the_formula(shape):
    student, teacher = features(shape, (shape[0], 4, *shape[2:]))
    term = built(lambda: VariationalInformation(hidden=6), student, teacher)
    with torch.no_grad():
        term.likelihood.scale.add_(torch.randn(4, 1))
    hidden = flat(student)
    weights = [w.detach().double().numpy() for w in term.likelihood.mean.parameters()]
    assert [w.shape for w in weights] == [(6, 3, 1), (6, 6, 1), (4, 6, 1)]
    for index, weight in enumerate(weights):
        hidden = np.einsum("oi,bis->bos", weight[:, :, 0], np.maximum(hidden, 0 if index else -99))
    variance = np.log1p(np.exp(term.likelihood.scale.detach().double().numpy())) + 1e-5
    expected = ((flat(teacher) - hidden) ** 2 / variance + np.log(variance)).mean() / 2
    assert close(term(step(student, teacher)), expected)


def test_variances_begin_where_they_should():
    student, teacher = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    term = built(lambda: VariationalInformation(initial_variance=5.0), student, teacher)
    assert term(step(student, teacher)).item() == pytest.approx(np.log(5.0) / 2, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 2, 4, 5), (3, 2, 3, 4, 2)])
def test_contrast_equals_the_formula(shape):
    student, teacher = features(shape, (3, 4, *shape[2:]))
    term = built(lambda: ContrastiveProjection(margin=1.5), student, teacher)

    def embed(head, values):
        w1, b1, w2, b2 = (p.detach().double().numpy() for p in head.parameters())
        out = [w2 @ np.maximum(w1 @ v.mean(1) + b1, 0) + b2 for v in flat(values)]
        return [v / norm(v) for v in out]

    total = 0.0
    for i, s in enumerate(embed(term.student_head, student)):
        for j, t in enumerate(embed(term.teacher_head, teacher)):
            distance = np.sqrt(((s - t) ** 2).sum())
            total += distance**2 if i == j else max(0.0, 1.5 - distance) ** 2
    assert close(term(step(student, teacher)), total / 9)


@pytest.mark.parametrize("make", [*PLAIN, *LEARNT], ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_features_stay_finite(make, dtype):
    # the slope of a Gram matrix's square is cubic: at 1e4 fp16 has no number for it
    size = 1e2 if (make, dtype) == (Gram, torch.float16) else 1e4
    student, teacher = ((size * z.sign()).to(dtype) for z in features((2, 3, 4, 4)))
    student[0, :, 0] = 0
    term = built(make, student, teacher)
    for precision in (torch.float32, dtype):
        term.to(precision)
        leaf = student.clone().requires_grad_()
        value = term(step(leaf, teacher))
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert leaf.grad.isfinite().all()


def test_dead_features_have_no_direction_and_no_slope():
    student, teacher = torch.zeros(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4)
    FeatureCosine()(step(student, teacher)).backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("make", LEARNT, ids=name)
def test_without_a_dry_run_there_are_no_networks(make):
    with pytest.raises(ObjectiveError, match=r"dry run, and there was none. Pass example="):
        make()(step(*features()))


def test_a_named_twin_shares_the_networks():
    pair = features()
    term = VariationalInformation()
    twin = term.named("other")
    term.build(step(*pair))
    assert twin(step(*pair)) == term(step(*pair))


def test_a_single_sample_has_no_negatives():
    pair = features((1, 3, 4))
    with pytest.raises(ObjectiveError, match=r"holds 1 sample.*drop_last=True"):
        built(ContrastiveProjection, *pair)(step(*pair))


@pytest.mark.parametrize("power", [1.0, 4.0, 8.0])
def test_attention_of_any_power_does_not_depend_on_the_scale(power):
    student, teacher = features(dtype=torch.float64)
    term = AttentionTransfer(power=power)
    value = term(step(student, teacher)).item()
    assert term(step(1e4 * student, 1e-4 * teacher)).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelWise(temperature=0), "`temperature` must be positive and finite; got 0"),
        (lambda: AttentionTransfer(power=0.5), "`power` must be finite and >= 1; got 0.5"),
        (lambda: VariationalInformation(hidden=0), "`hidden` must be a whole number >= 1; got 0"),
        (
            lambda: VariationalInformation(min_variance=9.0),
            "must exceed `min_variance`; got 5.0 and",
        ),
        (lambda: ContrastiveProjection(dimensions=1.5), "`dimensions` must be a whole number"),
        (lambda: ContrastiveProjection(margin=-1.0), "`margin` must be positive"),
    ],
)
def test_options_without_meaning_are_refused(make, message):
    with pytest.raises(ObjectiveError, match=message):
        make()


def test_repr_shows_what_was_chosen():
    assert repr(Gram()) == "Gram(tap='bottleneck')"
    assert repr(FeatureL2("a", normalise=True)) == "FeatureL2(tap='a', normalise=True)"
    assert repr(ChannelWise()) == "ChannelWise(tap='bottleneck', temperature=4.0)"
    chosen = "VariationalInformation(tap='bottleneck', hidden=8)"
    assert repr(VariationalInformation(hidden=8)) == chosen


@pytest.mark.parametrize("make", [*PLAIN, *LEARNT], ids=name)
def test_terms_read_their_tap_once(make):
    assert make().taps == ("bottleneck",)
    assert not make().per_head
