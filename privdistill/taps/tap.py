"""Which activations are captured: a layer of each network, under one name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, ObjectiveError

Select = int | str | Callable[[Any], Any]


@dataclass(frozen=True)
class Layer:
    """One place in a network, where a name alone does not say enough.

    Args:
        layer: Dotted name from `named_modules()`, a glob that fits one layer, or the module. None
            lets the wrapper locate the bottleneck.
        select: Which tensor, where the layer gives several: an index into a tuple or list, a key
            of a mapping, an attribute, or a function of what the layer gave.
        at: Whether the layer's "output" or its "input" is captured.
        network: Which of several teachers, counted from 0.

    Raises:
        ObjectiveError: If an option has no meaning.

    Example:
        >>> from privdistill import Layer, Tap
        >>> deepest = Layer("encoder", select=-1)
        >>> Tap(teacher=deepest, student="down4").teacher.select
        -1
    """

    layer: str | nn.Module | None = None
    select: Select | None = None
    at: Literal["output", "input"] = "output"
    network: int = 0

    def __post_init__(self) -> None:
        if self.at not in ("output", "input"):
            raise ObjectiveError(f"Layer: `at` must be 'output' or 'input'; got {self.at!r}.")
        if not (self.select is None or isinstance(self.select, int | str) or callable(self.select)):
            raise ObjectiveError(
                f"Layer: `select` must be an index, a key or a function; got {self.select!r}."
            )
        if not isinstance(self.network, int) or self.network < 0:
            raise ObjectiveError(
                f"Layer: `network` must be the index of a teacher, from 0; got {self.network!r}."
            )

    def pick(self, value: Any) -> Any:
        """Return the tensor that `select` means.

        Args:
            value: What the layer gave.

        Returns:
            The entry chosen; the value itself where there is no such entry, so that the caller
            can say what there is.

        Raises:
            LayerNotFoundError: If the layer gives a single tensor.
        """
        select = self.select
        if select is None:
            return value
        if callable(select):
            return select(value)
        if isinstance(value, Tensor):
            raise LayerNotFoundError(
                f"Layer '{self.layer}' gives one tensor, {tuple(value.shape)}, from which "
                f"select={select!r} cannot choose. Leave `select` out."
            )
        try:
            return value[select]
        except (LookupError, TypeError):
            return getattr(value, str(select), value)

    def __str__(self) -> str:
        chosen = "function" if callable(self.select) else repr(self.select)
        details = [f"select={chosen}"] * (self.select is not None)
        details += [f"at={self.at!r}"] * (self.at != "output")
        return f"{self.layer} ({', '.join(details)})" if details else f"{self.layer}"


@dataclass(frozen=True)
class Tap:
    """A pair of layers, one in each network, captured under one name.

    Token features `(B, N, C)` and channels-last features are read as maps `(B, C, *spatial)`.

    Args:
        teacher: Layer of the teacher: a dotted name from `named_modules()`, a glob that fits one
            layer, the module, or a `Layer` for entries of tuples and for inputs. None lets the
            wrapper locate the bottleneck.
        student: Layer of the student, likewise.
        adapter: How student features get the teacher's shape. "auto" adds what is needed
            (nothing, a 1x1 convolution, resampling); None demands equal shapes; a module is used
            as it is and trained with the student.

    Raises:
        LayerNotFoundError: If `adapter` is none of these.

    Example:
        >>> Tap(teacher="encoder.stages.5", student="down4")
        Tap(teacher='encoder.stages.5', student='down4', adapter='auto')
    """

    teacher: str | nn.Module | Layer | None = None
    student: str | nn.Module | Layer | None = None
    adapter: Literal["auto"] | nn.Module | None = "auto"

    def __post_init__(self) -> None:
        if not (self.adapter in (None, "auto") or isinstance(self.adapter, nn.Module)):
            raise LayerNotFoundError(
                f"Tap: `adapter` must be 'auto', None or a module; got {self.adapter!r}."
            )


def as_layer(place: str | nn.Module | Layer | None) -> Layer:
    """Return a tap's layer in its full form.

    Args:
        place: What the user gave for one network.

    Returns:
        A `Layer`.
    """
    return place if isinstance(place, Layer) else Layer(place)


def brief(place: Layer) -> str | nn.Module | Layer | None:
    """Return a layer in the shortest form that says the same.

    Args:
        place: A layer.

    Returns:
        Its name, if nothing else was chosen.
    """
    return place.layer if place == Layer(place.layer) else place


def tap_table(taps: Mapping[str, Tap], read: tuple[str, ...], teachers: int) -> dict[str, Tap]:
    """Return the taps given, and the bottleneck where a term reads it and nobody named it.

    Args:
        taps: What the user passed.
        read: Names of the taps that terms read.
        teachers: Number of teachers.

    Returns:
        Taps by name.

    Raises:
        LayerNotFoundError: If a name or a tap has another form, or a tap that is read is missing.
    """
    table = dict(taps)
    for name, tap in table.items():
        if not isinstance(tap, Tap):
            raise LayerNotFoundError(
                f"Tap '{name}' is {tap!r}; expected Tap(teacher=..., student=...)."
            )
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise LayerNotFoundError(
                f"Tap name {name!r} must be a plain word, such as 'bottleneck' or 'stage3'."
            )
        network = as_layer(tap.teacher).network
        if teachers and network >= teachers:
            raise LayerNotFoundError(
                f"Tap '{name}' reads teacher {network}, but there are {teachers}, counted from 0."
            )
    for name in read:
        if name == "bottleneck":
            table.setdefault(name, Tap())
        elif name not in table:
            raise LayerNotFoundError(
                f"A term reads tap '{name}', but `taps` names {sorted(table) or 'none'}. Add "
                f"taps={{'{name}': Tap(teacher=..., student=...)}}."
            )
    return table
