"""Runs on the meta device: whatever would stay on the CPU beside a GPU is found without one."""

import copy

import pytest
import torch
from paths import EVERY, HOT, IMAGE, LABELS, NAMES, PATHS, PRESENT, target, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from privdistill import GroundTruth, LatentKL, PrivilegedInput, SoftTargetDiceBCE

META = torch.device("meta")


class NoStrays(TorchDispatchMode):
    """Refuse every operation that reads or makes a tensor elsewhere, 0-dim ones included.

    Python numbers reach operations as numbers, not as tensors.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = {leaf.device.type for leaf in tensors((args, kwargs, result))}
        assert found <= {"meta"}, f"{func} has tensors on {found}"
        return result


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def meta(tiny_unet, build):
    """Wrappers of networks, adapters and an example that were never anywhere else."""

    def unet(*args, **options):
        return tiny_unet(*args, **options).to(META)

    def make(path="usual", **options):
        options = {"teacher": unet(4), "student": unet(1), **PATHS[path](unet)} | options
        for role in ("student", "teacher"):
            if isinstance(options[role], torch.nn.Module):
                options[role].to(META)
        return build(example=torch.zeros(1, 4, 8, 8, device=META), **options)

    return make


def run(kd, reference=None, **options):
    """A step, its backward pass, an optimizer step and a prediction, all of it on meta."""
    image = IMAGE.to(META)
    reference = (target(kd) if reference is None else reference).to(META)
    optimizer = torch.optim.Adam(trained(kd), lr=0.1)
    with NoStrays():
        out = kd(image, reference, **options)
        out.loss.backward()
        prediction = kd.predict(image)
        kd.eval()(image, reference)
        kd.train()
    optimizer.step()
    gradients = [p.grad for p in trained(kd)]
    assert all(gradient is not None for gradient in gradients)
    everything = tensors((tuple(out), prediction, gradients, kd.state_dict()))
    assert {tensor.device.type for tensor in everything} == {"meta"}
    return out


def test_a_stray_tensor_is_found():
    with NoStrays(), pytest.raises(AssertionError, match="has tensors on"):
        torch.zeros(2, device=META) * torch.ones(())
    with NoStrays(), pytest.raises(AssertionError, match="has tensors on"):
        torch.zeros(2).to(META)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_the_wrapper_runs_where_its_inputs_are(meta, path):
    run(meta(path))


OBJECTIVES = {
    "soft": lambda options: SoftTargetDiceBCE(temperature=1.0, **options),
    "hard": lambda options: GroundTruth(**options),
}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "option", ["include_background", "squared_denominator", "batch_dice", "activation"]
)
def test_every_option_runs_where_its_inputs_are(meta, objective, activation, option):
    value = {"include_background": False, "activation": activation}.get(option, True)
    term = OBJECTIVES[objective]({option: value})
    kd = meta(objective=1.0 * term, activation=activation, validate="always")
    run(kd, HOT)


@pytest.mark.parametrize("normalisation", ["softmax", "softmax_channel", "softmax_spatial", "l1"])
def test_every_normalisation_runs_where_its_inputs_are(meta, normalisation):
    kd = meta(objective=1.0 * LatentKL(normalisation=normalisation, temperature=2.0))
    image = IMAGE.to(META)
    with NoStrays():
        out = kd(image)
        out.loss.backward()
    assert out.loss.is_meta


@pytest.mark.parametrize("form", [LABELS, LABELS[:, None], LABELS.to(torch.uint8), HOT])
def test_every_form_of_a_target_runs_where_it_is(meta, form):
    run(meta(), form)


def test_presence_masks_run_where_they_are(meta, tiny_unet):
    run(meta(student=tiny_unet(4), inputs=EVERY), present=PRESENT.to(META))


@pytest.mark.parametrize("present", [None, PRESENT])
def test_modality_dropout_runs_where_its_inputs_are(meta, tiny_unet, present):
    inputs = PrivilegedInput(NAMES, student=NAMES, dropout=0.5)
    kd = meta(student=tiny_unet(4), inputs=inputs)
    run(kd, present=None if present is None else present.to(META))


@pytest.mark.parametrize("path", ["adapter", "average", "joint", "ensemble"])
def test_copies_and_checkpoints_run_where_they_are(meta, path):
    kd = meta(path)
    run(copy.deepcopy(kd))
    state = kd.state_dict()
    assert {value.device.type for value in state.values()} == {"meta"}
    kd.load_state_dict(state)
    run(kd)


@pytest.mark.parametrize("path", PATHS)
def test_a_wrapper_built_elsewhere_moves_as_a_whole(build, tiny_unet, path):
    options = {"teacher": tiny_unet(4), "student": tiny_unet(1)} | PATHS[path](tiny_unet)
    run(build(**options).to(META))


def test_networks_built_under_a_default_device_are_wrapped_there(tiny_unet, build):
    with META:
        kd = build(teacher=tiny_unet(4), student=tiny_unet(1))
    run(kd)


def test_an_example_on_the_cpu_serves_networks_elsewhere(tiny_unet, build):
    kd = build(teacher=tiny_unet(4, width=6).to(META), student=tiny_unet(1).to(META))
    assert kd.adapters["bottleneck"].weight.is_meta
    kd.to(META)
    run(kd)
