import copy

import numpy as np
import pytest
import torch
from torch import nn

from privdistill import (
    Critic,
    GroundTruth,
    HolisticAdversarial,
    ObjectiveError,
    Output,
    ShapeMismatchError,
    Step,
)
from privdistill.functional import critic_loss, holistic_adversarial


def linear(slopes):
    """A critic that weighs each channel, and its bias."""
    critic = nn.Conv1d(len(slopes), 1, 1)
    with torch.no_grad():
        critic.weight.copy_(torch.tensor(slopes).reshape(1, -1, 1))
        critic.bias.fill_(0.5)
    return critic


def softmax(logits):
    powers = np.exp(logits.double().numpy())
    return powers / powers.sum(1, keepdims=True)


def out(student, teacher):
    return Output(torch.zeros(()), {}, student, teacher, {})


def test_the_student_is_scored_by_the_formula():
    logits, image = torch.randn(2, 2, 5), torch.randn(2, 1, 5)
    critic = linear([2.0, -1.0, 3.0])
    p, x = softmax(logits), image.double().numpy()
    wanted = -np.mean(2 * p[:, 0] - p[:, 1] + 3 * x[:, 0] + 0.5)
    found = HolisticAdversarial(critic)(Step(logits, image=image))
    assert found.item() == pytest.approx(wanted, abs=1e-6)
    assert found == holistic_adversarial(logits, critic, image)


@pytest.mark.parametrize("metric", ["rms", "euclidean"])
def test_the_critic_s_loss_equals_the_formula(metric):
    student, teacher, image = torch.randn(2, 2, 5), torch.randn(2, 2, 5), torch.randn(2, 1, 5)
    fake, real = softmax(student), softmax(teacher)
    distance = np.mean(2 * fake[:, 0] - fake[:, 1]) - np.mean(2 * real[:, 0] - real[:, 1])
    # A linear critic that averages 5 voxels has the slopes 2/5 and -1/5 everywhere; the image's
    # slope counts nothing. A step of root mean square h is one of length sqrt(5) h.
    length = np.sqrt(5 * (4 + 1)) / 5 * (np.sqrt(5) if metric == "rms" else 1)
    wanted = distance + 7 * (length - 1) ** 2
    critic = linear([2.0, -1.0, 3.0])
    found = critic_loss(critic, out(student, teacher), image, gradient_penalty=7.0, metric=metric)
    assert found.item() == pytest.approx(wanted, abs=1e-6 * max(1, wanted))


def test_the_penalty_is_on_points_between_student_and_teacher():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inputs = nn.Parameter(torch.ones(())), []

        def forward(self, x):
            self.inputs.append(x.detach())
            return self.scale * x

    critic = Seen()
    far = torch.full((3, 1, 4), 99.0)
    critic_loss(critic, out(-far, far), activation="sigmoid")
    fake, real, between = critic.inputs
    assert (fake == 0).all()
    assert (real == 1).all()
    assert (between == between[:, :, :1]).all()
    assert ((between > 0) & (between < 1)).all()
    assert between.unique().numel() == 3


def test_gradients_in_float64():
    term = HolisticAdversarial(Critic(3, axes=1))
    student = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    image = torch.randn(1, 1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: term(Step(x, image=image)), (student,))
    critic = nn.Sequential(nn.Conv1d(3, 2, 2), nn.Tanh()).double()

    def loss(_):
        torch.manual_seed(0)
        return critic_loss(critic, out(student, student * 2), image)

    assert torch.autograd.gradcheck(loss, (critic[0].weight,))


def test_each_loss_sends_gradients_to_its_own_side_alone():
    critic, image = Critic(3, axes=2), torch.randn(2, 1, 8, 8)
    student, teacher = (torch.randn(2, 2, 8, 8, requires_grad=True) for _ in range(2))
    HolisticAdversarial(critic)(Step(student, teacher, image=image)).backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    student.grad = None
    critic_loss(critic, out(student, teacher), image).backward()
    assert student.grad is None
    assert teacher.grad is None
    assert all(p.grad is not None for p in critic.parameters())


def test_the_critic_stays_its_owner_s_in_every_copy():
    critic = Critic(3, axes=2)
    objective = GroundTruth() + HolisticAdversarial(critic)
    twin = copy.deepcopy(objective).double().eval()
    assert twin.terms[1].critic is critic
    assert list(twin.parameters()) == []
    assert list(twin.state_dict()) == []
    assert critic.training
    assert next(critic.parameters()).dtype == torch.float32


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_the_small_critic_takes_any_size(axes, size):
    critic, image = Critic(4, axes), torch.randn(2, 1, *[size] * axes)
    logits = torch.randn(2, 3, *[size] * axes)
    assert HolisticAdversarial(critic)(Step(logits, image=image)).shape == ()
    loss = critic_loss(critic, out(logits, -logits), image)
    loss.backward()
    assert torch.isfinite(loss)


def test_an_image_of_another_resolution_is_resampled_to_the_logits():
    image = torch.tensor([[[1.0, 3.0, 5.0, 7.0]]])
    critic = linear([0.0, 0.0, 1.0])
    assert holistic_adversarial(torch.zeros(1, 2, 2), critic, image).item() == -4.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite(dtype):
    critic = Critic(3, axes=2).to(dtype)
    student = (1e4 * torch.randn(2, 2, 8, 8).sign()).to(dtype).requires_grad_()
    image = torch.randn(2, 1, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = HolisticAdversarial(critic)(Step(student, image=image))
        own = critic_loss(critic, out(student, -student), image)
    (loss + own).backward()
    assert loss.dtype == own.dtype == torch.float32
    assert torch.isfinite(student.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in critic.parameters())


def test_neither_loss_changes_with_the_patch_size():
    critic, found = Critic(3), []
    student, teacher = torch.randn(1, 2, 32, 32, 32), torch.randn(1, 2, 32, 32, 32) + 1
    image = torch.randn(1, 1, 32, 32, 32)
    for count in (1, 2):
        torch.manual_seed(1)
        one, other, view = (z.repeat(1, 1, count, count, count) for z in (student, teacher, image))
        term = holistic_adversarial(one, critic, view)
        found.append([term.item(), critic_loss(critic, out(one, other), view).item()])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_a_critic_with_batch_norm_computes_and_counts_in_half_precision():
    critic, logits = nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 1, 1)), torch.randn(2, 2, 64)
    critic_loss(critic, out(logits, -logits))
    mean = critic[0].running_mean.clone()
    critic[0].reset_running_stats()
    found = critic_loss(critic.half(), out(logits.half(), -logits.half()))
    assert found.dtype == torch.float32
    assert found.isfinite()
    torch.testing.assert_close(critic[0].running_mean, mean.half(), atol=1e-2, rtol=0)
    assert critic[0].num_batches_tracked == 3


def test_the_term_compiles_without_a_break():
    term = HolisticAdversarial(Critic(3, axes=2))
    step = Step(torch.randn(2, 2, 8, 8), image=torch.randn(2, 1, 8, 8))
    compiled = torch.compile(term.forward, fullgraph=True, backend="aot_eager")
    assert compiled(step).item() == pytest.approx(term(step).item(), abs=1e-6)


def test_the_critic_s_loss_can_be_watched_without_gradients():
    logits = torch.randn(1, 2, 8)
    with torch.no_grad():
        assert torch.isfinite(critic_loss(Critic(2, axes=1), out(logits, -logits)))


def test_what_is_missing_is_said():
    logits = torch.zeros(1, 2, 4)
    with pytest.raises(ObjectiveError, match="no image"):
        HolisticAdversarial(linear([1.0] * 3))(Step(logits))
    with pytest.raises(ObjectiveError, match="softmax over 1 channel"):
        HolisticAdversarial(linear([1.0]), conditional=False)(Step(logits[:, :1]))
    with pytest.raises(ObjectiveError, match="no teacher"):
        critic_loss(linear([1.0] * 2), out(logits, None))
    with pytest.raises(ObjectiveError, match="`critic` is None"):
        HolisticAdversarial(None)
    with pytest.raises(ObjectiveError, match="`metric`"):
        critic_loss(linear([1.0] * 2), out(logits, logits), metric="l1")


class Judge(nn.Module):
    """Scores what it is told."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, x):
        return self.score(x)


@pytest.mark.parametrize(
    "score",
    [
        lambda x: x.mean(),
        lambda x: x.mean().reshape(1),
        lambda x: (x.mean((1, 2)), 1),
        lambda _: None,
    ],
)
def test_a_critic_that_does_not_score_each_sample_is_refused(score):
    logits, critic = torch.randn(2, 2, 5), Judge(score)
    with pytest.raises(ShapeMismatchError, match="critic returned"):
        critic_loss(critic, out(logits, logits))
    with pytest.raises(ShapeMismatchError, match="critic returned"):
        holistic_adversarial(logits, critic)


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 3, 5), (2, 2, 4)])
def test_answers_of_other_shapes_are_never_broadcast(shape):
    with pytest.raises(ShapeMismatchError, match=r"critic_loss.*\(2, 2, 5\)"):
        critic_loss(linear([1.0, 1.0]), out(torch.randn(2, 2, 5), torch.randn(shape)))


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 5), (2, 1, 5, 5)])
def test_an_image_of_other_samples_or_axes_is_refused(shape):
    with pytest.raises(ShapeMismatchError, match="image"):
        holistic_adversarial(torch.randn(2, 2, 5), linear([1.0] * 3), torch.zeros(shape))


def test_nan_is_not_hidden_from_who_trains_the_critic():
    logits = torch.randn(2, 2, 5)
    assert critic_loss(linear([1.0, 1.0]), out(logits * torch.nan, logits)).isnan()


def test_an_activation_that_is_none_is_refused():
    logits = torch.randn(2, 2, 5)
    with pytest.raises(ObjectiveError, match="'relu'"):
        critic_loss(linear([1.0, 1.0]), out(logits, logits), activation="relu")


def test_a_critic_for_axes_that_have_no_convolution_is_refused():
    with pytest.raises(ObjectiveError, match="axes"):
        Critic(3, axes=4)
