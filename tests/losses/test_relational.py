import math
from itertools import product

import numpy as np
import pytest
import torch

from privdistill import (
    CenteredKernelAlignment,
    LocalConsistency,
    ObjectiveError,
    PairwiseSimilarity,
    PrototypeSimilarity,
    TapPair,
)
from privdistill.step import Step

SIZES = [(6,), (4, 6), (4, 2, 4)]
TERMS = {
    "pairwise": PairwiseSimilarity("tap"),
    "pairwise, subset": PairwiseSimilarity("tap", max_positions=2),
    "prototype": PrototypeSimilarity("tap"),
    "local": LocalConsistency(),
    "local, sum": LocalConsistency(reduction="sum"),
    "alignment": CenteredKernelAlignment("tap"),
    "alignment over samples": CenteredKernelAlignment("tap", over="samples"),
}


def step_of(student, teacher, labels=None, **options):
    """A step whose logits and features are the same tensors."""
    labels = student.detach().argmax(1) if labels is None else labels
    taps = {"tap": TapPair(student, teacher)}
    return Step(student, teacher, target=labels, taps=taps, **options)


def seeded(name, step):
    """A term's value with the same positions drawn each time."""
    torch.manual_seed(0)
    return TERMS[name](step)


def cosine(a, b):
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def positions(size):
    return list(product(*map(range, size)))


def pairwise_reference(values):
    """Similarities after max-pooling with windows of two, of one sample `(C, *spatial)`."""
    size = values.shape[1:]
    pooled = []
    for corner in positions([n // 2 for n in size]):
        window = tuple(slice(2 * i, 2 * i + 2) for i in corner)
        pooled.append(values[(slice(None), *window)].reshape(len(values), -1).max(1))
    return np.array([[cosine(a, b) for b in pooled] for a in pooled])


@pytest.mark.parametrize("size", SIZES)
def test_pairwise_similarity_equals_the_formula(size):
    student, teacher = torch.randn(2, 3, *size), torch.randn(2, 5, *size)
    wanted = np.mean(
        [
            (pairwise_reference(t) - pairwise_reference(s)) ** 2
            for s, t in zip(student.double().numpy(), teacher.double().numpy(), strict=True)
        ]
    )
    found = PairwiseSimilarity("tap")(step_of(student, teacher))
    assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_a_drawn_subset_of_positions_gives_the_mean_over_all_pairs_on_average():
    step = step_of(torch.randn(2, 2, 16), torch.randn(2, 2, 16))
    term = PairwiseSimilarity("tap", scale=1, max_positions=3)
    found = np.array([term(step).item() for _ in range(2000)])
    wanted = PairwiseSimilarity("tap", scale=1)(step).item()
    assert found.std() > 0
    assert abs(found.mean() - wanted) < 4 * found.std() / math.sqrt(len(found))


def test_both_networks_are_compared_at_the_positions_drawn():
    z = torch.randn(1, 2, 64)
    assert PairwiseSimilarity("tap", scale=1, max_positions=4)(step_of(z, z.clone())) == 0


def test_as_many_positions_as_allowed_are_compared_in_a_fixed_order():
    step = step_of(torch.randn(1, 2, 16), torch.randn(1, 2, 16))
    state = torch.get_rng_state()
    assert PairwiseSimilarity("tap", max_positions=8)(step) == PairwiseSimilarity("tap")(step)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("scale", "window"), [(2 / 12, 6), (0.4, 3), (1 / 49, 49)])
def test_the_window_is_the_scale_s_inverse_whatever_the_size(scale, window):
    student, teacher = torch.randn(1, 2, 12, 9), torch.randn(1, 2, 12, 9)
    found = PairwiseSimilarity("tap", scale=scale)(step_of(student, teacher))
    pool = torch.nn.MaxPool2d(window, ceil_mode=True)
    wanted = PairwiseSimilarity("tap", scale=1)(step_of(pool(student), pool(teacher)))
    assert found == wanted


def prototype_reference(values, weights):
    """Maps of one sample: values `(C, *spatial)`, weights `(classes, *spatial)`."""
    flat = values.reshape(len(values), -1)
    maps = []
    for weight in weights.reshape(len(weights), -1):
        prototype = (flat * weight).sum(1) / weight.sum()
        maps.append([cosine(prototype, flat[:, v]) for v in range(flat.shape[1])])
    return np.array(maps)


@pytest.mark.parametrize("size", SIZES)
def test_prototype_similarity_equals_the_formula_for_classes_that_all_samples_have(size):
    student, teacher = torch.randn(2, 3, *size), torch.randn(2, 5, *size)
    labels = torch.randint(0, 2, (2, *size))
    labels[0].view(-1)[:3] = torch.tensor([0, 1, 2])  # class 2 in the first sample alone
    labels[1].view(-1)[:2] = torch.tensor([0, 1])
    errors = []
    for s, t, one in zip(student.double().numpy(), teacher.double().numpy(), labels, strict=True):
        hot = np.stack([(one == c).double().numpy() for c in (0, 1)])
        errors.append((prototype_reference(s, hot) - prototype_reference(t, hot)) ** 2)
    found = PrototypeSimilarity("tap")(step_of(student, teacher, labels))
    assert found.item() == pytest.approx(np.mean(errors), abs=1e-6)


def test_a_coarse_tap_weighs_its_voxels_by_their_share_of_the_class():
    student, teacher = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    labels = torch.tensor([[0, 0, 0, 1]])  # shares: (1, 1/2) of class 0, (0, 1/2) of class 1
    shares = np.array([[1, 0.5], [0, 0.5]])
    step = Step(torch.zeros(1, 2, 4), target=labels, taps={"tap": TapPair(student, teacher)})
    maps = [prototype_reference(z[0].double().numpy(), shares) for z in (student, teacher)]
    wanted = np.mean((maps[0] - maps[1]) ** 2)
    assert PrototypeSimilarity("tap")(step).item() == pytest.approx(wanted, abs=1e-6)


def test_prototypes_and_their_maps_leave_ignored_voxels_out():
    student, teacher = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    labels = torch.tensor([[0, 1, 0, 1, 0, 0]])
    wanted = PrototypeSimilarity("tap")(step_of(student[..., :4], teacher[..., :4], labels[:, :4]))
    labels[:, 4:] = 255
    found = PrototypeSimilarity("tap", ignore_index=255)(step_of(student, teacher, labels))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_prototypes_need_no_class_of_a_sample_that_is_ignored_altogether():
    student, teacher = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    labels = torch.tensor([[0, 1, 0, 1, 0, 0], [255] * 6])
    wanted = PrototypeSimilarity("tap")(step_of(student[:1], teacher[:1], labels[:1]))
    assert wanted > 0
    for weights in (None, torch.tensor([0.5, 2.0])):
        step = step_of(student, teacher, labels, sample_weights=weights)
        found = PrototypeSimilarity("tap", ignore_index=255)(step)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_coarse_tap_weighs_its_voxels_by_what_is_not_ignored():
    student, teacher = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    labels = torch.tensor([[0, 255, 0, 1]])  # shares: (1/2, 1/2) of class 0, (0, 1/2) of class 1
    shares, seen = np.array([[0.5, 0.5], [0, 0.5]]), np.array([0.5, 1.0])
    step = Step(torch.zeros(1, 2, 4), target=labels, taps={"tap": TapPair(student, teacher)})
    maps = [prototype_reference(z[0].double().numpy(), shares) for z in (student, teacher)]
    wanted = ((maps[0] - maps[1]) ** 2 @ seen / seen.sum()).mean()
    found = PrototypeSimilarity("tap", ignore_index=255)(step)
    assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_without_a_common_class_prototypes_cost_nothing_and_keep_their_graph():
    student = torch.randn(2, 2, 4, requires_grad=True)
    labels = torch.tensor([[0] * 4, [1] * 4])
    loss = PrototypeSimilarity("tap")(step_of(student, torch.randn(2, 2, 4), labels))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def local_reference(p):
    """Sum of distances and number of neighbours, of one sample `(C, *spatial)`."""
    size = p.shape[1:]
    total, count = np.zeros(size), np.zeros(size)
    for x in positions(size):
        for y in positions(size):
            if x != y and max(abs(a - b) for a, b in zip(x, y, strict=True)) == 1:
                total[x] += np.linalg.norm(p[(slice(None), *x)] - p[(slice(None), *y)])
                count[x] += 1
    return total, count


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", SIZES)
def test_local_consistency_equals_the_formula(size, reduction):
    student, teacher = torch.randn(2, 3, *size), torch.randn(2, 3, *size)
    errors = []
    for s, t in zip(student.double().softmax(1), teacher.double().softmax(1), strict=True):
        (mine, count), (theirs, _) = local_reference(s.numpy()), local_reference(t.numpy())
        errors.append(((mine - theirs) / (count if reduction == "mean" else 1)) ** 2)
    found = LocalConsistency(reduction=reduction)(step_of(student, teacher)).item()
    wanted = np.mean(errors)
    assert found == pytest.approx(wanted, abs=1e-6 * max(1, wanted))


def test_local_consistency_of_a_single_voxel_is_zero():
    assert LocalConsistency()(step_of(torch.randn(1, 2, 1), torch.randn(1, 2, 1))) == 0


def test_local_consistency_follows_its_own_activation():
    student, teacher = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    own = LocalConsistency(activation="sigmoid")(step_of(student, teacher))
    assert own == LocalConsistency()(step_of(student, teacher, activation="sigmoid"))
    assert own != LocalConsistency()(step_of(student, teacher))


def alignment_reference(x, y):
    """HSIC of the centred Gram matrices of `(n, p)` and `(n, q)`."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m))


@pytest.mark.parametrize("channels", [(3, 2), (20, 30)])  # fewer than examples, and more
@pytest.mark.parametrize("size", SIZES)
def test_alignment_over_voxels_equals_the_formula(size, channels):
    student, teacher = torch.randn(2, channels[0], *size), torch.randn(2, channels[1], *size)
    rows = [z.double().flatten(2).mT.numpy() for z in (student, teacher)]
    wanted = 1 - np.mean([alignment_reference(*pair) for pair in zip(*rows, strict=True)])
    found = CenteredKernelAlignment("tap")(step_of(student, teacher))
    assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_alignment_over_samples_equals_the_formula():
    student, teacher = torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2)
    wanted = 1 - alignment_reference(*(z.double().flatten(1).numpy() for z in (student, teacher)))
    found = CenteredKernelAlignment("tap", over="samples")(step_of(student, teacher))
    assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_alignment_sees_neither_scale_nor_rotation_nor_offset():
    student = torch.randn(1, 3, 20)
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    teacher = 1e4 * torch.einsum("ij,bjn->bin", rotation, student) + 7
    assert CenteredKernelAlignment("tap")(step_of(student, teacher)).item() < 1e-6


def tissue(size):
    """Logits, features at half of their resolution, and labels, of stationary statistics."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (1, size, size, size), generator=generator)
    classes = torch.nn.functional.one_hot(labels, 2).movedim(-1, 1).float()
    shared = classes + torch.randn(1, 2, *[size] * 3, generator=generator)
    logits = [
        shared + torch.randn(1, 2, *[size] * 3, generator=generator).mul(scale)
        for scale in (0.5, 1)
    ]
    pair = TapPair(*(torch.nn.functional.avg_pool3d(z, 2) for z in logits))
    return Step(logits[0], logits[1], target=labels, taps={"tap": pair})


@pytest.mark.parametrize("name", ["pairwise", "prototype", "local", "alignment"])
def test_value_does_not_change_with_the_patch_size(name):
    small, large = TERMS[name](tissue(32)).item(), TERMS[name](tissue(64)).item()
    assert small > 1e-3
    assert large == pytest.approx(small, rel=0.05)


def test_pairs_at_a_tap_of_full_resolution_do_not_change_with_the_patch_size():
    field, term = tissue(64), TERMS["pairwise"]

    def value(corner, size):
        part = (..., *(slice(start, start + size) for start in corner))
        return term(step_of(field.student[part], field.teacher[part])).item()

    # 16^3 positions are all compared, of 32^3 those that are drawn
    small = np.mean([value(corner, 32) for corner in product((0, 32), repeat=3)])
    torch.manual_seed(0)
    drawn = [value((0, 0, 0), 64) for _ in range(6)]
    assert small > 1e-3
    assert np.mean(drawn) == pytest.approx(small, rel=0.02)
    assert drawn == pytest.approx([small] * 6, rel=0.08)


@pytest.mark.parametrize("name", ["local", "pairwise, subset"])
def test_terms_that_write_in_place_or_draw_compile_without_a_break(name):
    # "aot_eager" traces forward and backward as any backend would, without generating code.
    step = step_of(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), validate=False)
    compiled = torch.compile(TERMS[name].forward, fullgraph=True, backend="aot_eager")
    expected = seeded(name, step).item()
    torch.manual_seed(0)
    assert compiled(step).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairwiseSimilarity(scale=1.5), r"`scale` must be in \(0, 1\]; got 1.5"),
        (lambda: PairwiseSimilarity(max_positions=0), "`max_positions` must be a whole number"),
        (lambda: LocalConsistency(reduction="max"), "`reduction` must be one of"),
        (lambda: LocalConsistency(activation="tanh"), "`activation` must be one of"),
        (lambda: CenteredKernelAlignment(over="rows"), "`over` must be one of"),
    ],
)
def test_options_without_meaning_are_refused(make, message):
    with pytest.raises(ObjectiveError, match=message):
        make()


def test_an_alignment_of_one_example_is_refused():
    step = step_of(torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4))
    with pytest.raises(ObjectiveError, match=r"over='samples' features \(1, 3, 4, 4\) hold 1"):
        CenteredKernelAlignment("tap", over="samples")(step)
    with pytest.raises(ObjectiveError, match="Pass a larger batch, or the other `over`"):
        CenteredKernelAlignment("tap")(step_of(torch.randn(2, 3, 1), torch.randn(2, 3, 1)))


def test_prototypes_need_a_target_and_local_consistency_classes():
    z = torch.randn(1, 1, 4)
    with pytest.raises(ObjectiveError, match=r"no target. Call the wrapper as kd\(image, target\)"):
        PrototypeSimilarity("tap")(Step(z, taps={"tap": TapPair(z, z)}))
    with pytest.raises(ObjectiveError, match="a softmax over 1 channel is constant"):
        LocalConsistency()(Step(z, z))


def test_repr_shows_what_was_chosen():
    assert repr(PairwiseSimilarity()) == "PairwiseSimilarity(tap='bottleneck')"
    chosen = PairwiseSimilarity("a", scale=0.25, max_positions=8)
    assert repr(chosen) == "PairwiseSimilarity(tap='a', scale=0.25, max_positions=8)"
    assert repr(PrototypeSimilarity()) == "PrototypeSimilarity(tap='decoder')"
    assert repr(LocalConsistency()) == "LocalConsistency()"
    chosen = LocalConsistency(reduction="sum", activation="sigmoid")
    assert repr(chosen) == "LocalConsistency(activation='sigmoid', reduction='sum')"
    chosen = CenteredKernelAlignment(over="samples")
    assert repr(chosen) == "CenteredKernelAlignment(tap='bottleneck', over='samples')"
