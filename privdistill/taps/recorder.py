"""Hooks that record layer outputs, and only while they are armed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from privdistill.exceptions import LifecycleError
from privdistill.taps.names import closest, layers
from privdistill.taps.tap import Layer, as_layer


class LastTapReached(BaseException):
    """Leaves a forward pass; no `Exception`, which a network might catch for reasons of its own."""


# Tells what stays of a hook in a copy or a file of its network.
_MARK = "a tap of privdistill"


class _Hook:
    """A forward hook as an object; a copy or a pickle of its network does not take it along."""

    def __init__(self, recorder: "Recorder", tap: str) -> None:
        self.recorder = recorder
        self.tap = tap

    def __reduce__(self) -> tuple[Any, ...]:
        # A function of the standard library that does nothing: the file loads without this package.
        return getattr, (nullcontext(_MARK), "__exit__")

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self.recorder.armed:
            self.recorder.record(self.tap, output)


class _InputHook(_Hook):
    """The same, before a layer runs and might overwrite what it was given."""

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        # One tensor is what most layers are given; only more of them leave a choice.
        alone = len(args) == 1 and not kwargs
        super().__call__(_module, args, args[0] if alone else dict(enumerate(args)) | kwargs)


def _sweep(layer: nn.Module) -> None:
    """Remove what stayed of the hooks of another wrapper, of whose network this is a copy."""
    own = vars(layer)
    for hooks, marks in (
        (own["_forward_hooks"], own["_forward_hooks_with_kwargs"]),
        (own["_forward_pre_hooks"], own["_forward_pre_hooks_with_kwargs"]),
    ):
        for key, hook in list(hooks.items()):
            context = getattr(hook, "__self__", None)
            if isinstance(context, nullcontext) and context.enter_result == _MARK:
                del hooks[key]
                marks.pop(key, None)


class Recorder:
    """Capture what named layers of one network give, or are given, while its forward runs.

    Hooks stay attached from construction to `remove()`, so that `torch.compile` sees them, but
    record only inside `recording()`: activation checkpointing recomputes outside of it, and
    nothing is pinned afterwards.

    Args:
        model: The network.
        places: Layer by tap name, or its name alone, as `find_layer` returns it.
        role: "student" or "teacher", for messages.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Layer | str], *, role: str) -> None:
        self.places = {tap: as_layer(place) for tap, place in places.items()}
        self.role = role
        # Taps whose output a later layer overwrites in place.
        self.cloned: set[str] = set()
        # Whether the network changes its input in place, which others still have to see.
        self.edits_input = False
        # Whether outputs are being recorded.
        self.armed = False
        self._leaves_early = False
        self._captured: dict[str, Any] = {}
        self._versions: dict[str, int] = {}
        self._repeated: set[str] = set()
        known = layers(model)
        self._names = list(known)
        self._handles = [self._attach(known[str(p.layer)], tap) for tap, p in self.places.items()]

    def _attach(self, layer: nn.Module, tap: str) -> RemovableHandle:
        _sweep(layer)
        if self.places[tap].at == "input":
            return layer.register_forward_pre_hook(_InputHook(self, tap), with_kwargs=True)
        return layer.register_forward_hook(_Hook(self, tap))

    def record(self, tap: str, value: Any) -> None:
        """Keep what one layer gave; called by the hooks while the recorder is armed."""
        place = self.places[tap]
        output = value if place.select is None else place.pick(value)
        # An overwritten capture would pass unseen: the second output has the same shape.
        if tap in self._captured:
            self._repeated.add(tap)
        if isinstance(output, Tensor):
            if tap in self.cloned:
                output = output.clone()
            # Tensors inside a compiled graph or in inference mode carry no version counter.
            if not torch.compiler.is_compiling() and not output.is_inference():
                self._versions[tap] = output._version  # noqa: SLF001
        self._captured[tap] = output
        if self._leaves_early and len(self._captured) == len(self.places):
            raise LastTapReached

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Record into the mapping that the block is given; it belongs to the caller afterwards."""
        captured = self.start()
        try:
            yield captured
        finally:
            self.stop()

    def start(self, *, leave_early: bool = False) -> dict[str, Tensor]:
        """Arm the hooks, and return what they will record into.

        `leave_early` raises `LastTapReached` once every tap has fired, as nothing behind is wanted.
        """
        if self.armed:
            raise LifecycleError(
                f"The {self.role} is already being recorded. Run one forward at a time: a wrapper "
                "cannot be called from inside its own networks or from several threads."
            )
        # A fresh mapping each time, so that the caller's captures are never cleared under it.
        captured: dict[str, Tensor] = {}
        self._captured, self._versions, self._repeated = captured, {}, set()
        self.armed = True
        # A graph cannot be left half-way.
        self._leaves_early = leave_early and not torch.compiler.is_compiling()
        return captured

    def stop(self) -> None:
        """Disarm the hooks."""
        self.armed = False
        self._captured = {}

    def check(self, captured: Mapping[str, Any]) -> None:
        """Refuse a forward pass in which a tap did not fire once, with a tensor."""
        for tap, place in self.places.items():
            problem = ""
            if tap not in captured:
                others = [name for name in self._names if name != place.layer]
                problem = (
                    "did not run in this forward pass. If it was replaced after the wrapper was "
                    "built (convert_sync_batchnorm, quantisation), build the wrapper after that. "
                    "If the network is compiled, build the wrapper before its first compiled call, "
                    "or call torch._dynamo.reset(). A TorchScript or exported program runs no "
                    "hooks. Otherwise choose a layer that the network calls. "
                    f"{closest(str(place.layer), others)}"
                )
            elif tap in self._repeated:
                problem = "ran more than once in one forward pass. Choose a layer that runs once."
            elif not isinstance(captured[tap], Tensor):
                problem = _several(place, captured[tap])
            if problem:
                raise LifecycleError(
                    f"Tap '{tap}': layer '{place.layer}' of the {self.role} {problem}"
                )

    def corrupted(self, captured: Mapping[str, Tensor]) -> list[str]:
        """Return the taps whose tensor was changed in place after it was captured.

        An in-place layer behind a tap (`ReLU(inplace=True)`) overwrites what the hook saw; the
        tensor's version counter tells. Compiled code keeps no counter, so the dry run asks on the
        uncompiled network and adds such taps to `cloned`.
        """
        # No comprehension, which is one more call in every step.
        changed = []
        for tap, version in self._versions.items():
            if captured[tap]._version != version:  # noqa: SLF001
                changed.append(tap)
        return changed

    def twin(self, model: nn.Module) -> "Recorder":
        """Return a second recorder of the same layers, with hooks of its own."""
        other = Recorder(model, self.places, role=self.role)
        other.cloned, other.edits_input = set(self.cloned), self.edits_input
        return other

    def __getstate__(self) -> dict[str, Any]:
        # Its hooks stay with the original; a copied wrapper makes a `twin`.
        return vars(self) | {"_handles": []}

    def remove(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()


def _several(place: Layer, value: Any) -> str:
    """Say what was captured instead of a tensor, and how to choose from it."""
    verb = "returned" if place.at == "output" else "was given"
    entries = dict(enumerate(value)) if isinstance(value, tuple | list) else value
    parts = entries if isinstance(entries, Mapping) else {}
    shapes = {key: tuple(getattr(part, "shape", ())) for key, part in parts.items()}
    wanted = "" if place.select is None else f", but no entry {place.select!r}"
    last = next((repr(k) for k in reversed(parts) if isinstance(parts[k], Tensor)), "function")
    return (
        f"{verb} no tensor but {type(value).__name__}{f' of {shapes}' if shapes else ''}{wanted}. "
        f"Choose an entry, Layer({place.layer!r}, select={last}), or a "
        "layer whose output is a tensor (B, C, *spatial)."
    )
