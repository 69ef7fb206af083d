"""Two gloo processes against one process on the joined batch."""

from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from versions import needs_fsdp

from privdistill import (
    ContrastiveProjection,
    DistillationWrapper,
    FeatureL2,
    GroundTruth,
    JointTeacher,
    LatentKL,
    LifecycleError,
    MovingAverage,
    PairwiseSimilarity,
    PrivDistillError,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Tap,
    VariationalInformation,
)

pytestmark = [pytest.mark.slow, needs_fsdp]
KDNET = SoftTargetDiceBCE() + GroundTruth() + 10 * LatentKL()
ONE = PrivilegedInput(("t1", "t1ce"), student=("t1ce",), teacher=("t1ce",))


class Net(nn.Module):
    """Down and up again; a second head in train mode if wanted."""

    def __init__(self, channels, width=4, heads=1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU())
        self.down = nn.Sequential(nn.Conv2d(width, width, 2, stride=2), nn.LeakyReLU())
        self.up, self.head = nn.Upsample(scale_factor=2), nn.Conv2d(width, 3, 1)
        self.coarse = nn.Conv2d(width, 3, 1) if heads > 1 else None

    def forward(self, x):
        deep = self.down(self.stem(x))
        fine = self.head(self.up(deep))
        return [fine, self.coarse(deep)] if self.coarse and self.training else fine


WRAPPERS = {
    "equal widths": {"width": 4},
    "adapter": {},
    "heads": {"heads": 2},
    "several taps": {
        "taps": {"bottleneck": Tap("down", "down"), "stem": Tap("stem", "stem")},
        "objective": KDNET + LatentKL("stem"),
    },
    "average": {"teacher": MovingAverage(0.5), "inputs": ONE},
    "joint": {
        "declare": JointTeacher,
        "objective": KDNET + GroundTruth(of="teacher").named("teacher"),
    },
    "batch dice": {"objective": 1.0 * GroundTruth(batch_dice=True)},
    "adapter of another term": {"objective": GroundTruth() + FeatureL2()},
    "networks of a term": {"objective": GroundTruth() + VariationalInformation()},
    "pairs": {"objective": GroundTruth() + PairwiseSimilarity()},
    "contrast": {"objective": GroundTruth() + ContrastiveProjection()},
}


def build(kind, wrap=None):
    options = dict(WRAPPERS[kind])
    torch.manual_seed(0)
    teacher, student = Net(2, options.pop("width", 6)), Net(1, heads=options.pop("heads", 1))
    usual = {
        "objective": KDNET,
        "inputs": PrivilegedInput(("t1", "t1ce"), student=("t1ce",)),
        "example": torch.zeros(1, 2, 8, 8),
    }
    options = usual | options
    teacher = options.pop("declare", lambda network: network)(options.pop("teacher", teacher))
    return DistillationWrapper(teacher, wrap(student) if wrap else student, **options)


def batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 2, 8, 8, generator=generator)
    return image, torch.randint(0, 3, (4, 8, 8), generator=generator)


def train(kd, model, part):
    """Gradients of the third step, the weights after it, and the student's checkpoint."""
    image, target = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(image[part], target[part]).loss.backward()
        optimizer.step()
    named = {name.replace("module.", ""): p for name, p in kd.named_parameters()}
    return {
        "gradients": {name: whole(p.grad) for name, p in named.items() if p.grad is not None},
        "teacher": {name: whole(p.detach()) for name, p in kd.teacher.named_parameters()},
        "checkpoint": {name: whole(p) for name, p in kd.student.state_dict().items()},
    }


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def student_first(kd):
    fully_shard(kd.student)
    return fully_shard(kd)


def layer_by_layer(kd):
    for layer in (kd.student.stem, kd.student.down):
        fully_shard(layer)
    return student_first(kd)


def student_alone(kd):
    fully_shard(kd.student)
    return kd


ddp = partial(DistributedDataParallel, find_unused_parameters=False)
CASES = {
    "ddp": ("adapter", ddp),
    "ddp, heads": ("heads", ddp),
    "ddp, several taps": ("several taps", ddp),
    "ddp, average": ("average", ddp),
    "ddp, joint": ("joint", ddp),
    "ddp, adapter of another term": ("adapter of another term", ddp),
    "ddp, networks of a term": ("networks of a term", ddp),
    "ddp, pairs": ("pairs", ddp),
    "fsdp, wrapper alone": ("adapter", fully_shard),
    "fsdp, student first": ("adapter", student_first),
    "fsdp, layer by layer": ("adapter", layer_by_layer),
    "fsdp, heads": ("heads", student_first),
    "fsdp, several taps": ("several taps", student_first),
    "fsdp, average": ("average", student_first),
    "fsdp, average, wrapper alone": ("average", fully_shard),
    "fsdp, joint": ("joint", student_first),
    "fsdp, adapter of another term": ("adapter of another term", student_first),
    "fsdp, networks of a term": ("networks of a term", student_first),
    "fsdp, networks of a term, wrapper alone": ("networks of a term", fully_shard),
    "fsdp, pairs": ("pairs", student_first),
    "fsdp, student alone without an adapter": ("equal widths", student_alone),
}


def step(kd, rank):
    image, target = batch()
    return kd(image[2 * rank : 2 * rank + 2], target[2 * rank : 2 * rank + 2])


def predict(rank, *, registered):
    kd = build("adapter")
    expected = kd.predict(batch()[0])
    model = student_first(kd)
    if registered:
        register_fsdp_forward_method(kd, "predict")
        # before and after a step
        assert torch.allclose(kd.predict(batch()[0]), expected)
        step(model, rank)
    assert torch.allclose(kd.predict(batch()[0]), expected)
    return "equal"


def predict_gathered(rank, *, arrange):
    kd = build("adapter")
    expected = kd.predict(batch()[0])
    arrange(kd)
    for part in (kd, kd.student):
        if isinstance(part, FSDPModule):
            part.unshard()
    # Each process at its own pace: the second one less often.
    for _ in range(3 - 2 * rank):
        assert torch.allclose(kd.predict(batch()[0]), expected)
    kd.reshard()
    with pytest.raises(LifecycleError, match=r"between kd.unshard\(\) and kd.reshard\(\)"):
        kd.predict(batch()[0])
    return "equal"


def local_gradients(rank, kind, arrange):
    kd = build(kind)
    # kept until after the backward pass, whose hooks live as long as it does
    model = arrange(kd)
    step(model, rank).loss.backward()
    return {name: whole(p.grad) for name, p in kd.named_parameters()}


LOCAL = {
    "batch dice": ("batch dice", ddp),
    "ddp, contrast": ("contrast", ddp),
    "fsdp, contrast": ("contrast", student_first),
}


ELSE = {
    **{
        name: partial(local_gradients, kind=kind, arrange=arrange)
        for name, (kind, arrange) in LOCAL.items()
    },
    "prediction": partial(predict, registered=True),
    "prediction unregistered": partial(predict, registered=False),
    "prediction gathered": partial(predict_gathered, arrange=fully_shard),
    "prediction in several units": partial(predict_gathered, arrange=student_first),
    "sharded already": lambda rank: build("equal widths", fully_shard),
    "adapters beside a sharded student": lambda rank: step(student_alone(build("adapter")), rank),
    "adapters beside a student in ddp": lambda rank: step(
        build("adapter", DistributedDataParallel), rank
    ),
    "a teacher that learns beside a student in ddp": lambda rank: step(
        build("joint", DistributedDataParallel), rank
    ),
    "networks of a term beside a student in ddp": lambda rank: step(
        build("networks of a term", DistributedDataParallel), rank
    ),
}


def work(rank, folder):
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for case, (kind, arrange) in CASES.items():
        kd = build(kind)
        found[case] = train(kd, arrange(kd), slice(2 * rank, 2 * rank + 2))
    for case, run in ELSE.items():
        try:
            found[case] = run(rank)
        except PrivDistillError as error:
            found[case] = f"{type(error).__name__}: {error}"
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found, by case."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_promise_12_gradients_equal_those_of_the_joined_batch(found, case):
    kd = build(CASES[case][0])
    wanted = train(kd, kd, slice(0, 4))
    adapters = {"equal widths": 0, "average": 0, "several taps": 2} | dict.fromkeys(
        ("networks of a term", "pairs"), 0
    )
    assert len(kd.adapters) == adapters.get(CASES[case][0], 1)
    assert bool(list(kd.objective.parameters())) == (CASES[case][0] == "networks of a term")
    for rank in found:
        for part, values in wanted.items():
            assert_close(rank[case][part], values)
        Net(1, heads=WRAPPERS[CASES[case][0]].get("heads", 1)).load_state_dict(
            rank[case]["checkpoint"]
        )


@pytest.mark.parametrize("case", LOCAL)
def test_promise_12_a_term_over_the_batch_is_each_processes_own(found, case):
    def gradients(parts):
        kd = build(LOCAL[case][0])
        image, target = batch()
        (sum(kd(image[p], target[p]).loss for p in parts) / len(parts)).backward()
        return {name: p.grad for name, p in kd.named_parameters()}

    for rank in found:
        assert_close(rank[case], gradients([slice(0, 2), slice(2, 4)]))
        with pytest.raises(AssertionError):
            assert_close(rank[case], gradients([slice(0, 4)]))


def test_networks_of_a_term_that_would_differ_between_processes_are_refused(found):
    for rank in found:
        text = rank["networks of a term beside a student in ddp"]
        assert "terms ['variational_information'] would differ between processes" in text


def test_a_joint_teacher_that_would_differ_between_processes_is_refused(found):
    for rank in found:
        text = rank["a teacher that learns beside a student in ddp"]
        assert "'teacher'] would differ between processes" in text


def test_a_sharded_wrapper_predicts_once_fsdp_knows_of_it(found):
    for rank in found:
        assert rank["prediction"] == "equal"
        assert "register_fsdp_forward_method(kd, 'predict')" in rank["prediction unregistered"]


def test_a_sharded_wrapper_predicts_at_its_own_pace_while_its_weights_are_gathered(found):
    for rank in found:
        assert rank["prediction gathered"] == "equal"
        # Layers with units of their own would gather in their forward.
        assert "LifecycleError: The wrapper is sharded" in rank["prediction in several units"]


def test_promise_12_a_student_that_is_sharded_already_is_refused(found):
    for rank in found:
        assert "LifecycleError: The student is sharded" in rank["sharded already"]
        assert "then call fully_shard(kd)" in rank["sharded already"]


@pytest.mark.parametrize(
    "case", ["adapters beside a sharded student", "adapters beside a student in ddp"]
)
def test_adapters_that_would_differ_between_processes_are_refused(found, case):
    for rank in found:
        assert "the adapters or terms ['bottleneck'] would differ between processes" in rank[case]
