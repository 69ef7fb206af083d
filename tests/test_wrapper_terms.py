"""Every term through the wrapper: networks of its own, devices, precision, unlabelled batches."""

import pytest
import torch
from paths import IMAGE, LABELS
from terms import KINDS, make

from privdistill import ObjectiveError, Tap, losses
from privdistill.losses import GroundTruth, LatentKL, Term

EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
TAPS = {name: Tap("bottleneck", "bottleneck") for name in ("bottleneck", "decoder")}


def of(build, kind, **options):
    term = make(kind)
    taps = {name: TAPS[name] for name in term.taps}
    return build(objective=1.0 * term, taps=taps, **options)


@EVERY
def test_a_term_teaches_the_student(build, kind):
    kd = of(build, kind)
    out = kd(IMAGE, LABELS)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert kd.student.encoder[0].weight.grad.any()


@EVERY
def test_networks_of_a_term_train_with_the_student_except_critics(build, kind):
    kd = of(build, kind)
    own = sum(p.numel() for p in kd.objective.parameters())
    assert (own > 0) == (kind.__name__ in ("ContrastiveProjection", "VariationalInformation"))
    assert sum(p.numel() for p in kd.parameters()) == own + sum(
        p.numel() for p in (*kd.student.parameters(), *kd.adapters.parameters())
    )


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_term_is_finite_under_autocast(build, kind, dtype):
    kd = of(build, kind)
    with torch.autocast("cpu", dtype):
        out = kd(IMAGE, LABELS)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in kd.parameters())


@EVERY
def test_a_term_learns_from_labelled_samples_only_where_it_reads_labels(build, kind):
    kd = of(build, kind, validate="always")
    target = LABELS.clone()
    target[1] = 77
    out = kd(IMAGE, target, labelled=torch.tensor([True, False]))
    assert torch.isfinite(out.loss)
    if make(kind).needs_target:
        alone = kd(IMAGE[:1], LABELS[:1])
        assert out.loss.item() == pytest.approx(alone.loss.item(), rel=1e-4)


@EVERY
def test_a_term_runs_on_the_meta_device(build, kind):
    kd = of(build, kind, validate="never").to("meta")
    for critic in (term.critic for term in kd.objective.terms if hasattr(term, "critic")):
        critic.to("meta")
    out = kd(IMAGE.to("meta"), LABELS.to("meta"))
    assert out.loss.is_meta


@pytest.mark.parametrize("kind", ["ContrastiveProjection", "VariationalInformation"])
def test_promise_16_wrappers_of_one_objective_have_networks_of_their_own(build, tiny_unet, kind):
    objective = 1.0 * getattr(losses, kind)()
    one, other = (build(objective=objective, student=tiny_unet(1)) for _ in range(2))
    assert not list(objective.parameters())
    assert not {*one.objective.parameters()} & {*other.objective.parameters()}
    assert {*one.objective.parameters()} <= {*one.parameters()}


def test_promise_16_wrappers_of_one_objective_balance_apart(build, tiny_unet):
    objective = (GroundTruth() + LatentKL()).balanced()
    one, other = (build(objective=objective, student=tiny_unet(1)) for _ in range(2))
    one(IMAGE, LABELS)
    assert one.objective.magnitudes.all()
    assert not other.objective.magnitudes.any()


def test_a_step_without_a_target_does_not_use_up_the_check_of_targets(build):
    kd = build()
    kd(IMAGE, labelled=torch.zeros(2, dtype=torch.bool))
    kd(IMAGE, LABELS, labelled=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ObjectiveError, match="label map holds"):
        kd(IMAGE, LABELS + 7)


class Rebuilding(torch.nn.Module):
    """Returns the student's view beside the logits; another branch in train mode."""

    def __init__(self, network):
        super().__init__()
        self.network, self.rebuild = network, torch.nn.Conv2d(1, 1, 1)

    def forward(self, x):
        posterior = {"posterior": x.mean((2, 3))} if self.training else {}
        return {"out": self.network(x), "reconstruction": self.rebuild(x)} | posterior


class Reconstruction(Term):
    """What a term finds in the student's own output."""

    per_head = False

    def build(self, step):
        self.seen = set(step.student_output)

    def forward(self, step):
        return (step.student_output["reconstruction"] - step.image).square().mean()


def test_a_term_reads_all_that_the_student_returned(build, networks):
    kd = build(student=Rebuilding(networks[1]), objective=1.0 * Reconstruction())
    out = kd(IMAGE)
    out.loss.backward()
    view = IMAGE[:, 2:3]
    wanted = (kd.student.rebuild(view) - view).square().mean()
    assert out.terms["reconstruction"].item() == pytest.approx(wanted.item())
    wanted = torch.autograd.grad(wanted, kd.student.rebuild.weight)[0]
    assert torch.allclose(kd.student.rebuild.weight.grad, wanted)


def test_a_term_is_built_from_what_the_student_returns_in_train_mode(build, networks):
    kd = build(student=Rebuilding(networks[1]), objective=1.0 * Reconstruction())
    (term,) = kd.objective.terms
    assert term.seen == {"out", "reconstruction", "posterior"}


def test_every_head_comes_with_the_same_output(build, networks):
    networks[1].register_forward_hook(lambda _model, _args, out: [out, out[..., ::2, ::2]])

    class Seen(Term):
        def forward(self, step):
            assert [len(head) for head in step.student_output] == [2, 2]
            return step.student.mean()

    build(objective=1.0 * Seen())(IMAGE).loss.backward()
