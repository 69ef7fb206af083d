"""The second call of a step that trains a critic."""

import pytest
import torch
from paths import HOT, IMAGE, LABELS, Deep
from torch import nn

from privdistill import GroundTruth, LifecycleError, Output
from privdistill.losses import HolisticAdversarial


@pytest.fixture
def adversarial(build):
    def make(**options):
        term = HolisticAdversarial(nn.Conv2d(3, 1, 3, padding=1), conditional=False)
        return build(objective=GroundTruth() + 0.1 * term, **options)

    return make


def test_student_and_critic_are_trained_in_turn(adversarial):
    kd = adversarial()
    optimizer = torch.optim.Adam(kd.parameters(), 0.01)
    critic_optimizer = torch.optim.Adam(kd.critic_parameters(), 0.01)
    assert not set(kd.parameters()) & set(kd.critic_parameters())
    losses = []
    for _ in range(10):
        out = kd(IMAGE, LABELS)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        critic_optimizer.zero_grad()
        loss = kd.critic_loss(IMAGE, out)
        loss.backward()
        critic_optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_student_s_backward_gives_the_critic_nothing_and_the_other_way_round(adversarial):
    kd = adversarial()
    out = kd(IMAGE, LABELS)
    out.loss.backward()
    assert all(p.grad is None for p in kd.critic_parameters())
    kd.zero_grad()
    kd.critic_loss(IMAGE, out).backward()
    assert all(p.grad is None for p in (*kd.parameters(), *kd.teacher.parameters()))
    assert all(p.grad is not None for p in kd.critic_parameters())


def test_the_critic_judges_the_finest_heads_by_the_wrapper_s_activation(adversarial, tiny_unet):
    kd = adversarial(student=Deep(tiny_unet(1)), activation="sigmoid")
    (term,) = (t for _, t in kd.objective.named_terms.values() if "Holistic" in repr(t))
    out = kd(IMAGE, HOT)
    torch.manual_seed(1)
    found = kd.critic_loss(IMAGE, out)
    torch.manual_seed(1)
    assert found == term.critic_loss(out.student[0], out.teacher[0], None, "sigmoid")


def test_the_critic_sees_the_student_s_view(build):
    term = HolisticAdversarial(nn.Conv2d(3 + 1, 1, 1))
    kd = build(objective=GroundTruth() + term)
    logits = torch.randn(2, 3, 8, 8)
    out = Output(torch.zeros(()), {}, logits, -logits, {})
    torch.manual_seed(1)
    found = kd.critic_loss(IMAGE, out)
    torch.manual_seed(1)
    assert found == term.critic_loss(logits, -logits, IMAGE[:, 2:3], "softmax")


def test_a_shared_critic_is_trained_once(build):
    term = HolisticAdversarial(nn.Conv2d(3, 1, 1), conditional=False)
    kd = build(objective=GroundTruth() + term + term.named("again"))
    assert len(list(kd.critic_parameters())) == 2


def test_the_critic_is_in_the_checkpoint_and_moves_with_the_wrapper(adversarial):
    kd = adversarial()
    assert [key for key in kd.state_dict() if "critic." in key] == [
        "objective.terms.1.critic.weight",
        "objective.terms.1.critic.bias",
    ]
    assert {p.dtype for p in kd.double().critic_parameters()} == {torch.float64}


def test_without_a_critic_the_error_names_the_term_that_brings_one(build):
    kd = build()
    with pytest.raises(LifecycleError, match=r"HolisticAdversarial\(\) brings one"):
        kd.critic_parameters()
    with pytest.raises(LifecycleError, match=r"HolisticAdversarial\(\) brings one"):
        kd.critic_loss(IMAGE, kd(IMAGE, LABELS))


def test_several_processes_are_refused(adversarial, monkeypatch):
    kd = adversarial()
    out = kd(IMAGE, LABELS)
    monkeypatch.setattr("privdistill.wrapper.several_processes", lambda: True)
    with pytest.raises(LifecycleError, match="each process would train another one"):
        kd.critic_loss(IMAGE, out)
    with pytest.raises(LifecycleError, match="each process would train another one"):
        kd.critic_parameters()
