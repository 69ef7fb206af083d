"""Capture pairs of activations: where (`Tap`), how (`Recorder`) and in what shape (adapters)."""

from privdistill.taps.adapters import Resample, build_adapter, check_equal, short
from privdistill.taps.layout import as_map, find_layout
from privdistill.taps.location import Location, locate_bottleneck
from privdistill.taps.names import find_layer, layers, uncompiled, watched
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Layer, Tap, as_layer, brief

__all__ = [
    "Layer",
    "Location",
    "Recorder",
    "Resample",
    "Tap",
    "as_layer",
    "as_map",
    "brief",
    "build_adapter",
    "check_equal",
    "find_layer",
    "find_layout",
    "layers",
    "locate_bottleneck",
    "short",
    "uncompiled",
    "watched",
]
