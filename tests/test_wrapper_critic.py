"""A critic beside a wrapper: its owner trains it, the wrapper knows nothing of it."""

import torch
from paths import IMAGE, LABELS, Deep

from privdistill import Critic, GroundTruth, HolisticAdversarial, critic_loss


def adversarial(build, critic, **options):
    return build(objective=GroundTruth() + 0.1 * HolisticAdversarial(critic), **options)


def test_student_and_critic_are_trained_in_turn(build):
    critic = Critic(3 + 1, axes=2)
    kd = adversarial(build, critic)
    optimizer = torch.optim.Adam(kd.parameters(), 0.01)
    critic_optimizer = torch.optim.Adam(critic.parameters(), 0.01)
    losses = []
    for _ in range(10):
        out = kd(IMAGE, LABELS)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        assert losses or all(p.grad is None for p in critic.parameters())
        critic_optimizer.zero_grad()
        loss = critic_loss(critic, out, kd.inputs.for_student(IMAGE))
        loss.backward()
        critic_optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_critic_is_no_part_of_the_wrapper(build):
    critic = Critic(3 + 1, axes=2)
    kd = adversarial(build, critic)
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in kd.parameters()}
    assert not [key for key in kd.state_dict() if "critic" in key]


def test_of_several_heads_the_critic_judges_the_finest(build, tiny_unet):
    critic = Critic(3 + 1, axes=2)
    kd = adversarial(build, critic, student=Deep(tiny_unet(1)))
    out, view = kd(IMAGE, LABELS), kd.inputs.for_student(IMAGE)
    found = []
    for given in (out, out._replace(student=out.student[0], teacher=out.teacher[0])):
        torch.manual_seed(1)
        found.append(critic_loss(critic, given, view))
    assert found[0] == found[1]
