import pytest
import torch
from torch import nn

from privdistill import LayerNotFoundError
from privdistill.taps.names import clean, find_layer, layers, uncompiled


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


@pytest.fixture
def net():
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Conv2d(1, 1, 1)), "head": nn.Conv2d(1, 1, 1)})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("encoder.0", "encoder.0"),
        ("module.encoder.0", "encoder.0"),
        ("_orig_mod.module.encoder.0", "encoder.0"),
        ("encoder._fsdp_wrapped_module.0", "encoder.0"),
        ("encoder._checkpoint_wrapped_module", "encoder"),
        ("module", ""),
        ("encoder.module.0", "encoder.module.0"),
    ],
)
def test_names_are_cleaned_of_wrappers(path, name):
    assert clean(path) == name


def test_layers_of_a_wrapped_network_have_their_own_names(net):
    assert set(layers(Wrapped(net))) == {"encoder", "encoder.0", "head"}


def test_layers_of_a_compiled_network_have_their_own_names(net):
    compiled = torch.compile(net, backend="eager")
    assert set(layers(compiled)) == {"encoder", "encoder.0", "head"}
    assert uncompiled(compiled) is net


def test_layer_by_name_by_wrapped_name_and_as_module(net):
    for layer in ("encoder.0", "module.encoder.0", net["encoder"][0]):
        assert find_layer(net, layer, tap="t", role="student") == "encoder.0"


def test_misspelt_layer_names_the_closest(net):
    with pytest.raises(LayerNotFoundError, match=r"Tap 't': the student has no layer 'encodr'"):
        find_layer(net, "encodr", tap="t", role="student")
    with pytest.raises(LayerNotFoundError, match=r"Closest names: 'encoder'"):
        find_layer(net, "encodr", tap="t", role="student")


def test_unlike_any_layer_lists_the_top_ones(net):
    with pytest.raises(LayerNotFoundError, match=r"top layers are: 'encoder', 'head'"):
        find_layer(net, "zzz", tap="t", role="teacher")


def test_module_of_another_network_is_refused(net):
    with pytest.raises(LayerNotFoundError, match="teacher has no such ReLU"):
        find_layer(net, nn.ReLU(), tap="t", role="teacher")


def test_a_network_under_the_name_module_does_not_hide_its_neighbours(net):
    outer = Wrapped(net)
    outer.encoder = nn.Identity()
    assert find_layer(outer, "module.encoder", tap="t", role="student") == "module.encoder"
    assert layers(outer)["module.encoder"] is net["encoder"]
    assert layers(outer)["encoder"] is outer.encoder


def test_a_layer_with_two_names_is_found_by_both():
    shared = nn.Conv2d(1, 1, 1)
    net = nn.ModuleDict({"first": shared, "second": shared})
    assert find_layer(net, "second", tap="t", role="student") == "second"
