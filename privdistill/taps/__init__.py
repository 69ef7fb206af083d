"""Capture pairs of activations: where (`Tap`), how (`Recorder`) and in what shape (adapters)."""

from privdistill.taps.tap import Layer, Tap

__all__ = ["Layer", "Tap"]
