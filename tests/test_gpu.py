"""What only a CUDA device can show; run by `make gpu`."""

import copy

import pytest
import torch
from paths import (
    EVERY,
    IMAGE,
    LABELS,
    NAMES,
    PATHS,
    PRESENT,
    assert_close,
    target,
    train,
    trained,
)
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from privdistill import LifecycleError, PrivilegedInput, TeacherCache

DEVICE = "cuda"
BACKEND = "nccl"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # The compiler recommends what is switched off here.
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
]


@pytest.fixture(autouse=True)
def _exact_convolutions():
    # TensorFloat-32 keeps ten bits, which would hide small mistakes.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def make(build, tiny_unet):
    """The same wrapper each time, on the CPU."""

    def build_again(path="usual", **options):
        torch.manual_seed(0)
        usual = {"teacher": tiny_unet(4), "student": tiny_unet(1)}
        return build(**usual | PATHS[path](tiny_unet) | options)

    return build_again


def on_device(tree):
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {tensor.device.type for tensor in found} == {DEVICE}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_trains_as_on_the_cpu(make, path):
    # In double precision: three steps of a large term make much of rounding.
    double = {"dtype": torch.float64}
    found = train(make(path).to(DEVICE, torch.float64), device=DEVICE, **double)
    assert_close(found, train(make(path).double(), **double), 1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_begins_as_on_the_cpu_in_single_precision(make, path):
    found = train(make(path).to(DEVICE), device=DEVICE, steps=1)
    assert_close(found, train(make(path), steps=1), 1e-4)


@pytest.mark.parametrize("storage", ["full", "half"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_cache_gives_back_what_the_teacher_said(make, place, storage, tmp_path):
    cache = TeacherCache(tmp_path if place == "disk" else None, storage=storage)
    kd, keys = make(cache=cache).to(DEVICE), ["a", "b"]
    image, labels = IMAGE.to(DEVICE), LABELS.to(DEVICE)
    expected = kd(image, labels).loss
    kd(image, labels, key=keys)
    found = kd(image, labels, key=keys)
    assert cache.statistics.hits == 2
    assert on_device(tuple(found))
    bound = {"full": 1e-5, "half": 2e-3}[storage]
    torch.testing.assert_close(found.loss, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("path", PATHS)
def test_everything_that_comes_out_is_on_the_device(make, path):
    kd = make(path).to(DEVICE)
    out = kd(IMAGE.to(DEVICE), target(kd).to(DEVICE))
    assert on_device((tuple(out), kd.predict(IMAGE.to(DEVICE)), kd.state_dict()))


@pytest.mark.parametrize("path", ["usual", "adapter", "ensemble", "average"])
def test_networks_that_are_on_the_device_are_wrapped_there(build, tiny_unet, path):
    def unet(*args, **options):
        return tiny_unet(*args, **options).to(DEVICE)

    # the example stays on the CPU
    kd = build(**{"teacher": unet(4), "student": unet(1)} | PATHS[path](unet))
    out = kd(IMAGE.to(DEVICE), LABELS.to(DEVICE))
    assert on_device((tuple(out), kd.state_dict()))


def test_presence_masks_fill_as_on_the_cpu(make, tiny_unet):
    def every():
        torch.manual_seed(1)
        return make(student=tiny_unet(4), inputs=EVERY)

    wanted = train(every(), present=PRESENT)
    found = train(every().to(DEVICE), device=DEVICE, present=PRESENT.to(DEVICE))
    assert_close(found, wanted, 1e-3)


def test_modality_dropout_draws_on_the_device(make, tiny_unet):
    inputs = PrivilegedInput(NAMES, student=NAMES, dropout=0.5)
    kd = make(student=tiny_unet(4), inputs=inputs).to(DEVICE)
    losses = {kd(IMAGE.to(DEVICE), LABELS.to(DEVICE)).loss.item() for _ in range(8)}
    assert len(losses) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_a_scaled_mixed_precision_step_is_finite(make, path, dtype):
    kd = make(path).to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, enabled=dtype == torch.float16)
    optimizer = torch.optim.Adam(trained(kd), 1e-3)
    before = kd.student.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    with torch.autocast(DEVICE, dtype):
        out = kd(IMAGE.to(DEVICE), target(kd).to(DEVICE))
    scaler.scale(out.loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert out.loss.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in trained(kd))
    assert any(not torch.equal(v, before[name]) for name, v in kd.student.state_dict().items())


def test_a_compiled_student_trains_as_the_plain_one(make):
    kd = make().to(DEVICE)
    kd.student.compile()
    assert_close(train(kd, device=DEVICE), train(make()), 1e-3)


@pytest.mark.parametrize("path", ["usual", "adapter", "heads", "average"])
def test_a_compiled_wrapper_trains_as_the_plain_one(make, path):
    kd = make(path, validate="never").to(DEVICE)
    found = train(kd, torch.compile(kd), device=DEVICE)
    assert_close(found, train(make(path)), 1e-3)


@pytest.mark.parametrize("path", ["adapter", "average"])
def test_ddp_takes_a_wrapper_built_of_networks_on_the_device(build, tiny_unet, path, tmp_path):
    def unet(*args, **options):
        return tiny_unet(*args, **options).to(DEVICE)

    kd = build(**{"teacher": unet(4), "student": unet(1)} | PATHS[path](unet))
    store = f"file://{tmp_path}/store"
    distributed.init_process_group(BACKEND, init_method=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(kd)
        losses = train(kd, model, device=DEVICE)[:3]
        assert all(torch.isfinite(loss) for loss in losses)
    finally:
        distributed.destroy_process_group()


def test_a_copy_never_moves_the_teacher(make):
    kd = make()
    copy.deepcopy(kd).to(DEVICE)
    assert next(kd.teacher.parameters()).device.type == "cpu"
    with pytest.raises(LifecycleError, match="The teacher is on cpu, its view of the input on"):
        copy.deepcopy(kd).to(DEVICE)(IMAGE.to(DEVICE), LABELS.to(DEVICE))
