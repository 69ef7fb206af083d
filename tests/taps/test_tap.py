import dataclasses

import pytest

from privdistill import LayerNotFoundError, Tap


def test_layers_are_optional_and_the_adapter_automatic():
    assert Tap() == Tap(teacher=None, student=None, adapter="auto")


def test_a_tap_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tap().teacher = "x"


def test_unknown_adapters_are_refused():
    with pytest.raises(LayerNotFoundError, match="must be 'auto', None or a module"):
        Tap("a", "b", adapter="none")
