"""Capture pairs of activations: where (`Tap`), how (`Recorder`) and in what shape (adapters)."""

from privdistill.taps.adapters import Resample, build_adapter, check_equal, short
from privdistill.taps.location import Location, locate_bottleneck
from privdistill.taps.names import find_layer, layers, uncompiled
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Tap

__all__ = [
    "Location",
    "Recorder",
    "Resample",
    "Tap",
    "build_adapter",
    "check_equal",
    "find_layer",
    "layers",
    "locate_bottleneck",
    "short",
    "uncompiled",
]
