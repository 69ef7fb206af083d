"""A number that is not finite is named and stops the training before it does harm."""

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import nn

from faults.tiny import GRID, Network, Samples, task, wrapper
from kdnet.data.loading import build_loader
from kdnet.training import loop
from kdnet.training.checkpoint import load_state
from kdnet.training.finite import Guard, Here, NonFiniteError, Seen
from privdistill import Output

NAN, INFINITY = float("nan"), float("inf")


def fit(folder, samples, *, student=None, teacher=None):
    work = task(folder)
    loaders = [
        build_loader(dataset, 2, shuffle=False, seed=3, flips=False, workers=0)
        for dataset in (samples, Samples(2))
    ]
    with wrapper(student, teacher) as kd:
        loop.fit(Fabric(accelerator="cpu", devices=1), kd, *loaders, work)
    return work


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_an_image_is_named_with_its_modality_before_the_network_sees_it(tmp_path, value):
    student = Network()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(NonFiniteError, match="1 of 64 voxels of t2 of case1") as error:
        fit(tmp_path, Samples(2, case=1, value=value), student=student)
    assert "student, epoch 1, step 1" in str(error.value)
    assert "check_data.py" in str(error.value)
    # Not even the running statistics have changed.
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())


def test_the_case_whose_loss_is_not_finite_is_found_among_those_of_its_batch(tmp_path):
    samples = Samples(4, case=3, modality="t1ce", value=100.0)
    with pytest.raises(NonFiniteError, match=r"one by one, it comes from case3\.") as error:
        fit(tmp_path, samples, student=Network(limit=50))
    assert "Not finite: ground_truth." in str(error.value)
    assert "epoch 1, step 2" in str(error.value)


def test_the_term_that_is_not_finite_is_named_and_no_other(tmp_path):
    samples = Samples(2, case=0, modality="flair", value=100.0)
    with pytest.raises(NonFiniteError, match=r"Not finite: hinton_kl\.") as error:
        fit(tmp_path, samples, teacher=Network(4, limit=50))
    assert "it comes from case0." in str(error.value)


def test_the_parameter_whose_gradient_is_not_finite_is_named(tmp_path):
    with pytest.raises(NonFiniteError, match=r"Gradients that are not finite: .*head\.weight\."):
        fit(tmp_path, Samples(2), student=Network(spoil_from=1))


def test_the_state_before_is_kept_and_goes_on(tmp_path):
    # Two steps and one validation batch per epoch: the seventh call is the first of epoch 3.
    with pytest.raises(NonFiniteError, match="epoch 3, step 5"):
        fit(tmp_path, Samples(4), student=Network(spoil_from=7))
    state = load_state(tmp_path / "student" / "state.pt")
    assert (state["epoch"], state["step"]) == (2, 4)
    weights = load_file(tmp_path / "student" / "last.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    work = fit(tmp_path, Samples(4))
    assert load_state(work.state_file)["finished"]


class Later:
    """Numbers that may be read only when the device has had another step to compute."""

    log: list

    def __init__(self, values):
        self.values = [float(value) for value in values]
        self.log.append("sent")

    def read(self):
        self.log.append("read")
        return self.values


def a_step(loss, *, image=0.0, norm=1.0, number=1):
    batch = {"image": torch.full((1, 4, *GRID), image), "name": [f"case{number}"]}
    total = torch.tensor(loss)
    out = Output(total, {"ground_truth": total}, torch.zeros(1), None, {})
    target = nn.functional.one_hot(torch.zeros(1, *GRID).long(), 4).movedim(-1, 1).float()
    return Seen(batch, target, out, torch.tensor(norm), f"student, epoch 1, step {number}")


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(Later, "log", [], raising=False)
    fabric = Fabric(accelerator="cpu", devices=1)
    with wrapper() as kd:
        yield Guard(fabric, kd, send=Later, late=True)


def test_a_late_guard_reads_a_step_only_when_the_next_one_is_under_way(late):
    assert late.look(a_step(1.0, number=1)) is None
    assert late.look(a_step(2.0, number=2)) == 1.0
    assert late.look(a_step(3.0, number=3)) == 2.0
    assert late.settle() == 3.0
    assert late.settle() is None
    assert Later.log == ["sent", "sent", "read", "sent", "read", "read"]


@pytest.mark.parametrize("bad", [{"loss": NAN}, {"loss": 1.0, "norm": INFINITY}])
def test_a_late_guard_is_one_step_late_and_names_the_step_that_was_bad(late, bad):
    late.look(a_step(**bad, number=1))
    with pytest.raises(NonFiniteError, match=r"step 1\).*\n.*case1"):
        late.look(a_step(NAN, number=2))


def test_a_late_guard_leaves_the_image_to_the_device_and_names_it_all_the_same(late):
    bad = a_step(1.0, image=NAN)
    late.look_at_image(bad.batch, bad.where)
    late.look(bad)
    with pytest.raises(NonFiniteError, match="64 of 64 voxels of flair of case1"):
        late.settle()


def test_nothing_is_written_while_a_step_is_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(Later, "log", [], raising=False)

    def guard(fabric, kd):
        return Guard(fabric, kd, send=Later, late=True)

    monkeypatch.setattr(loop, "Guard", guard)
    # The last step of epoch 1 is the bad one: it is found before the epoch's files are written.
    with pytest.raises(NonFiniteError, match="epoch 1, step 2"):
        fit(tmp_path, Samples(4), student=Network(spoil_from=2))
    assert load_state(tmp_path / "student" / "state.pt") is None
    assert not (tmp_path / "student" / "last.safetensors").exists()


def test_under_a_loss_scaler_an_infinite_gradient_is_normal_and_an_infinite_loss_is_not(late):
    late.scaled = True
    late.late, late.send = False, Here
    assert late.look(a_step(1.0, norm=INFINITY)) == 1.0
    with pytest.raises(NonFiniteError, match="found loss inf"):
        late.look(a_step(INFINITY))
