"""Schedules, averages and checks count steps of the optimizer, in training."""

import pytest
import torch

from privdistill import (
    GroundTruth,
    LatentKL,
    MovingAverage,
    ObjectiveError,
    PrivilegedInput,
    Ramp,
    Term,
)

IMAGE = torch.randn(2, 4, 8, 8)
LABELS = torch.randint(0, 3, (2, 8, 8))
SAME = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",), teacher=("t1ce",))


def accumulated(kd, steps, parts):
    """Train with gradients accumulated over some micro-batches; the loss of each."""
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.1)
    losses = []
    for i in range(steps * parts):
        last = i % parts == parts - 1
        out = kd(IMAGE, LABELS, advance=last)
        (out.loss / parts).backward()
        losses.append(out)
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def test_promise_19_ramps_count_steps_of_the_optimizer(build):
    kd = build(objective=GroundTruth() + Ramp(0, 1, steps=2) * LatentKL())
    outs = accumulated(kd, steps=3, parts=2)
    assert kd.steps == 3
    for out, share in zip(outs, (0, 0, 0.5, 0.5, 1, 1), strict=True):
        wanted = out.terms["ground_truth"] + share * out.terms["latent_kl"]
        assert out.loss.item() == pytest.approx(wanted.item())


def test_promise_19_a_term_may_read_the_number_of_its_step(build):
    class Counted(Term):
        def forward(self, step):
            return step.student.mean() * step.index

    kd = build(objective=1.0 * Counted())
    for number in range(3):
        out = kd(IMAGE)
        # The counter has moved on by now.
        out.loss.backward()
        assert torch.equal(out.loss, number * out.student.mean())


def test_promise_19_an_average_follows_once_a_step(build, tiny_unet):
    student = tiny_unet(1)
    whole, parts = (
        build(teacher=MovingAverage(0.9), student=net, inputs=SAME)
        for net in (student, tiny_unet(1))
    )
    parts.load_state_dict(whole.state_dict())
    accumulated(whole, steps=4, parts=1)
    accumulated(parts, steps=4, parts=3)
    for one, other in zip(whole.teacher.parameters(), parts.teacher.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_promise_19_balanced_magnitudes_are_means_over_steps(build):
    kd = build(objective=(GroundTruth() + LatentKL()).balanced(0.5))
    kd(IMAGE, LABELS, advance=False)
    first = kd.objective.magnitudes.clone()
    assert first.all()
    for _ in range(3):
        kd(3 * IMAGE, LABELS, advance=False)
    assert torch.equal(kd.objective.magnitudes, first)
    kd(3 * IMAGE, LABELS)
    assert not torch.equal(kd.objective.magnitudes, first)


@pytest.mark.parametrize("context", ["eval mode", "no gradients"])
def test_promise_18_what_runs_before_training_does_not_use_up_the_check(build, context):
    kd = build()
    with torch.set_grad_enabled(context != "no gradients"):
        kd.train(context != "eval mode")(IMAGE, LABELS)
    with pytest.raises(ObjectiveError, match="label map holds"):
        kd.train()(IMAGE, LABELS + 5)


def test_an_objective_that_reads_a_target_needs_one_in_every_loop(build):
    for kd in (build(), build().eval()):
        with pytest.raises(ObjectiveError, match="labelled="):
            kd(IMAGE)
        with pytest.raises(ObjectiveError, match="labelled="):
            kd(IMAGE, labelled=torch.tensor([True, False]))
        assert torch.isfinite(kd(IMAGE, labelled=torch.zeros(2, dtype=torch.bool)).loss)
    assert torch.isfinite(build(objective=LatentKL())(IMAGE).loss)


def test_promise_18_a_later_mask_without_a_target_is_refused_too(build):
    kd, none = build(), torch.zeros(2, dtype=torch.bool)
    kd(IMAGE, LABELS)
    kd(IMAGE, labelled=none)
    with pytest.raises(ObjectiveError, match=r"names=\{'target': entry\}"):
        kd(IMAGE, labelled=~none)
    assert torch.isfinite(build(validate="never")(IMAGE, labelled=~none).loss)
