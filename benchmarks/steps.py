"""The contestants: training steps by hand and by the wrapper.

The objective of all that do the same work is one half of Dice and cross-entropy against the
target, a quarter of the same against the teacher's probabilities at T = 5 on both sides, and a
quarter of the divergence of the bottlenecks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contest import Contestant
from network import World
from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    Objective,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Step,
    TapPair,
    TeacherCache,
    Term,
)

TEMPERATURE = 5.0
# With the usual epsilon of 1e-8, Adam makes a full step of a gradient that is rounding alone, so
# that no two orders of summation lead to the same weights.
ADAM = {"lr": 1e-3, "eps": 1e-2}
MODALITIES = ("flair", "t1", "t1ce", "t2")


def dice_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Dice and cross-entropy as one writes them in a script."""
    probability, space = logits.sigmoid(), (2, 3, 4)
    overlap = 2 * (probability * target).sum(space) + 1
    dice = overlap / (probability.sum(space) + target.sum(space) + 1)
    return 1 - dice.mean() + F.binary_cross_entropy_with_logits(logits, target)


def soft_dice_bce(student: Tensor, teacher: Tensor) -> Tensor:
    """The same against the teacher's probabilities."""
    return dice_bce(student / TEMPERATURE, (teacher / TEMPERATURE).sigmoid())


def latent_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of two bottlenecks."""
    logs = (features.flatten(1).log_softmax(1) for features in (student, teacher))
    return F.kl_div(*logs, reduction="batchmean", log_target=True)


class PlainTarget(Term):
    """`dice_bce` as a user's own term."""

    needs_target = True

    def forward(self, step: Step) -> Tensor:
        return dice_bce(step.student, step.target)


class PlainSoft(Term):
    """`soft_dice_bce` as a user's own term."""

    needs_teacher = True

    def forward(self, step: Step) -> Tensor:
        return soft_dice_bce(step.student, step.teacher)


class PlainLatent(Term):
    """`latent_kl` as a user's own term."""

    taps = ("bottleneck",)

    def forward(self, step: Step) -> Tensor:
        return latent_kl(*step.taps["bottleneck"])


def plain_objective() -> Objective:
    """The objective from the functions that the loop by hand calls."""
    return 0.5 * PlainTarget() + 0.25 * PlainSoft() + 0.25 * PlainLatent()


def objective() -> Objective:
    """The objective from the library's terms."""
    soft = SoftTargetDiceBCE(
        temperature=TEMPERATURE,
        student_temperature=TEMPERATURE,
        binarisation="soft",
        smoothing=1.0,
    )
    return 0.25 * soft + 0.5 * GroundTruth(smoothing=1.0) + 0.25 * LatentKL()


def latent_objective() -> Objective:
    """What needs nothing behind the teacher's bottleneck."""
    return GroundTruth(smoothing=1.0) + LatentKL()


def finish(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Backward pass and update."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def listen(teacher: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """Freeze the teacher and put a plain hook on both bottlenecks."""
    teacher.eval().requires_grad_(False)
    features: dict[str, Tensor] = {}
    teacher.bottleneck.register_forward_hook(lambda _m, _i, out: features.update(teacher=out))
    student.bottleneck.register_forward_hook(lambda _m, _i, out: features.update(student=out))
    return features


def by_hand(world: World) -> Contestant:
    """Hooks, `no_grad` and functions: no library."""
    teacher, student = world.teacher, world.student
    features = listen(teacher, student)
    optimizer = torch.optim.Adam(student.parameters(), **ADAM)

    def step() -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher(world.image)
        logits = student(world.image[:, :1])
        loss = 0.5 * dice_bce(logits, world.target) + 0.25 * soft_dice_bce(logits, teacher_logits)
        loss = loss + 0.25 * latent_kl(features.pop("student"), features.pop("teacher"))
        return finish(loss, optimizer)

    return Contestant(step, student)


def wrapped(world: World, wanted: Objective, cache: TeacherCache | None) -> DistillationWrapper:
    """Both networks in a wrapper."""
    return DistillationWrapper(
        world.teacher,
        world.student,
        objective=wanted,
        inputs=PrivilegedInput(MODALITIES, student=MODALITIES[:1]),
        activation="sigmoid",
        example=world.image[:1],
        cache=cache,
    )


def by_wrapper(world: World, wanted: Objective, *, cache: TeacherCache | None = None) -> Contestant:
    """The wrapper, with a cache or without."""
    kd = wrapped(world, wanted, cache)
    optimizer = torch.optim.Adam(kd.parameters(), **ADAM)
    key = None if cache is None else [f"case{i}/flip0" for i in range(len(world.image))]
    return Contestant(
        lambda: finish(kd(world.image, world.target, key=key).loss, optimizer), world.student
    )


def by_hand_with_terms(
    world: World, loss_of: Objective | Term, teach: Callable[[], tuple[Tensor, Tensor]] | None
) -> Contestant:
    """A loop by hand around the library's loss objects.

    Args:
        world: Networks and batch.
        loss_of: What is minimised.
        teach: Returns the teacher's logits and bottleneck; None where nothing of it is read.

    Returns:
        The step.
    """
    student = world.student
    features: dict[str, Tensor] = {}
    student.bottleneck.register_forward_hook(lambda _m, _i, out: features.update(student=out))
    optimizer = torch.optim.Adam(student.parameters(), **ADAM)

    def step() -> Tensor:
        teacher_logits, latent = teach() if teach else (None, None)
        logits = student(world.image[:, :1])
        own = features.pop("student")
        taps = {} if latent is None else {"bottleneck": TapPair(own, latent)}
        read = Step(
            student=logits,
            teacher=teacher_logits,
            target=world.target,
            taps=taps,
            activation="sigmoid",
            validate=False,
        )
        loss = loss_of(read)
        return finish(loss if isinstance(loss, Tensor) else loss[0], optimizer)

    return Contestant(step, student)


def running_teacher(world: World) -> Callable[[], tuple[Tensor, Tensor]]:
    """Run the whole teacher in every step."""
    world.teacher.eval().requires_grad_(False)
    features: dict[str, Tensor] = {}
    world.teacher.bottleneck.register_forward_hook(lambda _m, _i, out: features.update(z=out))

    def teach() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return world.teacher(world.image), features.pop("z")

    return teach


def precomputed_teacher(world: World) -> Callable[[], tuple[Tensor, Tensor]]:
    """Run it once; what it returned is there from then on."""
    outputs = running_teacher(world)()
    return lambda: outputs
