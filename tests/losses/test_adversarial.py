import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from privdistill import GroundTruth, LifecycleError, ObjectiveError
from privdistill.losses import HolisticAdversarial
from privdistill.step import Step


def built(axes=2, classes=2, **options):
    term = HolisticAdversarial(**options)
    size = [8] * axes
    term.build(Step(torch.zeros(1, classes, *size), image=torch.zeros(1, 1, *size)))
    return term


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


def test_the_student_is_scored_by_the_formula():
    logits, image = torch.randn(2, 2, 5), torch.randn(2, 1, 5)
    term = HolisticAdversarial(linear([2.0, -1.0, 3.0]))
    p, x = softmax(logits), image.double().numpy()
    wanted = -np.mean(2 * p[:, 0] - p[:, 1] + 3 * x[:, 0] + 0.5)
    assert term(Step(logits, image=image)).item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("metric", ["rms", "euclidean"])
def test_the_critic_s_loss_equals_the_formula(metric):
    student, teacher, image = torch.randn(2, 2, 5), torch.randn(2, 2, 5), torch.randn(2, 1, 5)
    term = HolisticAdversarial(linear([2.0, -1.0, 3.0]), gradient_penalty=7.0, metric=metric)
    fake, real = softmax(student), softmax(teacher)
    distance = np.mean(2 * fake[:, 0] - fake[:, 1]) - np.mean(2 * real[:, 0] - real[:, 1])
    # A linear critic that averages 5 voxels has the slopes 2/5 and -1/5 everywhere; the image's
    # slope counts nothing. A step of root mean square h is one of length sqrt(5) h.
    length = np.sqrt(5 * (4 + 1)) / 5 * (np.sqrt(5) if metric == "rms" else 1)
    wanted = distance + 7 * (length - 1) ** 2
    found = term.critic_loss(student, teacher, image, "softmax")
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
    term = HolisticAdversarial(critic, conditional=False, activation="sigmoid")
    term.critic_loss(torch.full((3, 1, 4), -99.0), torch.full((3, 1, 4), 99.0), None, "softmax")
    fake, real, between = critic.inputs
    assert (fake == 0).all()
    assert (real == 1).all()
    assert (between == between[:, :, :1]).all()
    assert ((between > 0) & (between < 1)).all()
    assert between.unique().numel() == 3


def test_gradients_in_float64():
    term = built(1, metric="euclidean").double()
    student = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    image = torch.randn(1, 1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: term(Step(x, image=image)), (student,))
    critic = HolisticAdversarial(nn.Sequential(nn.Conv1d(3, 2, 2), nn.Tanh())).double()
    weight = next(critic.critic_parameters())

    def loss(_):
        torch.manual_seed(0)
        return critic.critic_loss(student, student * 2, image, "softmax")

    assert torch.autograd.gradcheck(loss, (weight,))


def test_the_student_s_term_leaves_the_critic_alone_and_the_critic_s_loss_the_student():
    term = built()
    student, teacher = (torch.randn(2, 2, 8, 8, requires_grad=True) for _ in range(2))
    image = torch.randn(2, 1, 8, 8)
    term(Step(student, teacher, image=image)).backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in term.critic_parameters())
    student.grad = None
    term.critic_loss(student, teacher, image, "softmax").backward()
    assert student.grad is None
    assert teacher.grad is None
    assert all(p.grad is not None for p in term.critic_parameters())


def test_the_critic_is_no_part_of_what_the_student_s_optimizer_trains():
    objective = GroundTruth() + built()
    assert list(objective.parameters()) == []
    assert list(objective.buffers()) == []
    assert {type(module).__name__ for module in objective.modules()} == {
        "Objective",
        "ModuleList",
        "GroundTruth",
        "HolisticAdversarial",
    }


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_the_built_critic_takes_any_number_of_axes_and_any_size(axes, size):
    term = built(axes, classes=3)
    step = Step(torch.randn(2, 3, *[size] * axes), image=torch.randn(2, 1, *[size] * axes))
    assert term(step).shape == ()
    loss = term.critic_loss(step.student, -step.student, step.image, "softmax")
    loss.backward()
    assert torch.isfinite(loss)


def test_an_image_of_another_resolution_is_resampled_to_the_logits():
    term = HolisticAdversarial(linear([0.0, 0.0, 1.0]))
    image = torch.tensor([[[1.0, 3.0, 5.0, 7.0]]])
    assert term(Step(torch.zeros(1, 2, 2), image=image)).item() == -4.5


def test_a_given_critic_is_kept_and_a_built_one_built_once():
    critic = linear([1.0, 1.0, 1.0])
    assert built(1, critic=critic).critic is critic
    term = built()
    first = term.critic
    term.build(Step(torch.zeros(1, 2, 8, 8), image=torch.zeros(1, 1, 8, 8)))
    assert term.critic is first
    assert term.named("other").critic is first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite(dtype):
    term = built().to(dtype)
    student = (1e4 * torch.randn(2, 2, 8, 8).sign()).to(dtype).requires_grad_()
    image = torch.randn(2, 1, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(Step(student, image=image))
        critic_loss = term.critic_loss(student, -student, image, "softmax")
    loss.backward()
    critic_loss.backward()
    assert loss.dtype == critic_loss.dtype == torch.float32
    assert {p.dtype for p in term.critic_parameters()} == {dtype}
    assert torch.isfinite(student.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in term.critic_parameters())


def test_autocast_changes_nothing():
    term, step = built(), Step(torch.randn(2, 2, 8, 8), image=torch.randn(2, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = term(step)
    assert found == term(step)


def test_neither_loss_changes_with_the_patch_size():
    term, found = built(3), []
    student, teacher = torch.randn(1, 2, 32, 32, 32), torch.randn(1, 2, 32, 32, 32) + 1
    image = torch.randn(1, 1, 32, 32, 32)
    for count in (1, 2):
        torch.manual_seed(1)
        tiled = [z.repeat(1, 1, count, count, count) for z in (student, teacher, image)]
        losses = term(Step(tiled[0], image=tiled[2])), term.critic_loss(*tiled, "softmax")
        found.append([loss.item() for loss in losses])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_alternating_steps_bring_the_critic_s_loss_down_and_the_student_to_the_teacher():
    labels = torch.randint(0, 2, (16, 1, 8))
    image = labels + 0.1 * torch.randn(16, 1, 8)
    teacher = 4.0 * torch.cat((1 - labels, labels), 1) - 2
    student, term = nn.Conv1d(1, 2, 1), built(1)
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    critic_optimizer = torch.optim.Adam(term.critic_parameters(), 0.003)

    def critic_step():
        loss = term.critic_loss(student(image), teacher, image, "softmax")
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        return loss.item()

    def distance():
        return (student(image).softmax(1) - teacher.softmax(1)).square().mean().item()

    losses = [critic_step() for _ in range(40)]
    assert losses[-1] < losses[0] - 1
    before = distance()
    for _ in range(60):
        optimizer.zero_grad()
        term(Step(student(image), teacher, image=image)).backward()
        optimizer.step()
        critic_step()
    assert distance() < 0.5 * before


def test_the_critic_is_saved_under_its_name_and_loaded():
    one, other = GroundTruth() + built(), GroundTruth() + built()
    state = one.state_dict()
    assert {name.rsplit(".", 2)[0] for name in state} == {"terms.1.critic"}
    other.load_state_dict(state)
    mine, theirs = ([*o.terms[1].critic_parameters()] for o in (one, other))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_critic_takes_assigned_values_as_they_are():
    one, other = built(), built()
    state = one.double().state_dict()
    other.load_state_dict(state, assign=True)
    assert {p.dtype for p in other.critic_parameters()} == {torch.float64}
    first = next(other.critic_parameters())
    assert first.data_ptr() == state["critic.0.weight"].data_ptr()
    assert first.requires_grad


def test_a_critic_with_batch_norm_computes_and_counts_in_half_precision():
    critic = nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 1, 1))
    term, logits = HolisticAdversarial(critic, conditional=False), torch.randn(2, 2, 64)
    wanted = term.critic_loss(logits, -logits, None, "softmax")
    mean = critic[0].running_mean.clone()
    critic[0].reset_running_stats()
    torch.manual_seed(0)
    found = term.half().critic_loss(logits.half(), -logits.half(), None, "softmax")
    found.backward()
    assert found.dtype == torch.float32
    assert found.isfinite()
    assert wanted.isfinite()
    torch.testing.assert_close(critic[0].running_mean, mean.half(), atol=1e-2, rtol=0)
    assert mean.abs().min() > 0.1
    assert critic[0].num_batches_tracked == 3


def test_keys_that_the_critic_misses_or_does_not_know_are_named():
    term = built()
    state = term.state_dict()
    state["critic.9.weight"] = state.pop("critic.0.weight")
    with pytest.raises(RuntimeError, match=r"critic\.0\.weight"):
        term.load_state_dict(state)
    missing, unexpected = term.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["critic.0.weight"], ["critic.9.weight"])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda term: pickle.loads(pickle.dumps(term))])
def test_copies_have_a_critic_of_their_own(twin):
    term = built()
    other = twin(term)
    step = Step(torch.randn(1, 2, 8, 8), image=torch.randn(1, 1, 8, 8))
    before = term(step)
    assert other(step) == before
    with torch.no_grad():
        for parameter in other.critic_parameters():
            parameter.zero_()
    assert term(step) == before
    assert other(step) == 0


def test_the_critic_moves_with_the_term():
    assert {p.dtype for p in built().double().critic_parameters()} == {torch.float64}
    term = built().to("meta")
    assert all(p.is_meta for p in term.critic_parameters())
    student, image = torch.empty(1, 2, 8, 8, device="meta"), torch.empty(1, 1, 8, 8, device="meta")
    assert term(Step(student, image=image)).is_meta
    assert term.critic_loss(student, student, image, "softmax").is_meta


def test_the_term_compiles_without_a_break():
    term, step = built(), Step(torch.randn(2, 2, 8, 8), image=torch.randn(2, 1, 8, 8))
    compiled = torch.compile(term.forward, fullgraph=True, backend="aot_eager")
    assert compiled(step).item() == pytest.approx(term(step).item(), abs=1e-6)


def test_the_critic_s_loss_can_be_watched_without_gradients():
    term, logits = built(conditional=False), torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        assert torch.isfinite(term.critic_loss(logits, -logits, None, "softmax"))


def test_what_is_missing_is_said():
    logits = torch.zeros(1, 2, 4)
    with pytest.raises(LifecycleError, match=r"there is no critic yet. Pass `example=`"):
        HolisticAdversarial(conditional=False)(Step(logits))
    with pytest.raises(ObjectiveError, match="no image for the critic to see"):
        HolisticAdversarial(linear([1.0] * 3))(Step(logits))
    with pytest.raises(ObjectiveError, match="a softmax over 1 channel is constant"):
        HolisticAdversarial(linear([1.0]), conditional=False)(Step(logits[:, :1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_penalty": 0}, "`gradient_penalty` must be positive"),
        ({"metric": "l1"}, "`metric` must be one of"),
        ({"activation": "tanh"}, "`activation` must be one of"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ObjectiveError, match=message):
        HolisticAdversarial(**options)


def test_repr_shows_what_was_chosen():
    assert repr(HolisticAdversarial()) == "HolisticAdversarial()"
    chosen = {"gradient_penalty": 5.0, "conditional": False, "metric": "euclidean"}
    assert repr(HolisticAdversarial(**chosen, activation="sigmoid")) == (
        "HolisticAdversarial(gradient_penalty=5.0, conditional=False, metric='euclidean', "
        "activation='sigmoid')"
    )


def test_a_critic_is_in_the_terms_mode():
    term = HolisticAdversarial(nn.Dropout())
    assert not term.eval().critic.training
    assert term.train().critic.training
