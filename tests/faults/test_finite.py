"""A number that is not finite is named and stops the training before it does harm."""

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from faulty_training import INFINITY, NAN, Network, Samples, case, train, wrapper
from kdnet.training.checkpoint import load_state
from kdnet.training.runtime import NonFiniteError, check_step
from privdistill import Output


def fit(folder, samples, *, student=None, teacher=None):
    work = case(folder, epochs=3, schedule="constant")
    train(work, samples, Samples(2), kd=wrapper(student or Network(), teacher), shuffle=False)
    return work


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_an_image_is_named_with_its_modality_before_the_network_sees_it(tmp_path, value):
    student = Network()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(NonFiniteError, match="1 of 64 voxels of t2 of case1") as error:
        fit(tmp_path, Samples(2, case=1, value=value), student=student)
    assert "epoch 1, step 1" in str(error.value)
    assert "check_data.py" in str(error.value)
    # Not even the running statistics have changed.
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())


def test_the_cases_of_a_batch_whose_loss_is_not_finite_are_named(tmp_path):
    samples = Samples(4, case=3, modality="t1ce", value=100.0)
    words = r"epoch 1, step 2.*ground_truth (nan|inf).*Cases: case2, case3"
    with pytest.raises(NonFiniteError, match=words):
        fit(tmp_path, samples, student=Network(limit=50))


def test_the_term_that_is_not_finite_is_shown_beside_those_that_are(tmp_path):
    samples = Samples(2, case=0, modality="flair", value=100.0)
    with pytest.raises(NonFiniteError, match=r"ground_truth \d.*hinton_kl (nan|inf)"):
        fit(tmp_path, samples, teacher=Network(4, limit=50))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    student = Network(spoil_from=1)
    before = student.head.weight.clone()
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        fit(tmp_path, Samples(2), student=student)
    assert torch.equal(student.head.weight, before)


def test_the_state_before_is_kept_and_goes_on(tmp_path):
    # Two steps and one validation batch per epoch: the seventh call is the first of epoch 3.
    with pytest.raises(NonFiniteError, match="epoch 3, step 5"):
        fit(tmp_path, Samples(4), student=Network(spoil_from=7))
    work = case(tmp_path)
    state = load_state(work.folder.state)
    assert (state["epoch"], state["step"]) == (2, 4)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(work.folder.last).values())
    fit(tmp_path, Samples(4))
    assert load_state(work.folder.state)["finished"]


def test_under_a_loss_scaler_an_infinite_gradient_is_normal_and_an_infinite_loss_is_not():
    fabric = Fabric(accelerator="cpu", devices=1)

    def look(loss):
        out = Output(loss, {"ground_truth": loss}, torch.zeros(1), None, {})
        return check_step(fabric, {"name": ["a"]}, out, torch.tensor(INFINITY), "step 1")

    with pytest.raises(NonFiniteError, match="gradient norm inf"):
        look(torch.tensor(1.0))
    fabric.strategy.precision.scaler = object()
    assert look(torch.tensor(1.0)) == 1.0
    with pytest.raises(NonFiniteError, match="found loss inf"):
        look(torch.tensor(INFINITY))
