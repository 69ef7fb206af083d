"""Which activations are captured: a layer of each network, under one name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from privdistill.exceptions import LayerNotFoundError, ObjectiveError
from privdistill.taps.names import find_layers

Select = int | str | Callable[[Any], Any]
# A function of the user's own, from network and example (None without one) to a layer.
Finder = Callable[[nn.Module, Tensor | None], Any]


@dataclass(frozen=True)
class Layer:
    """One place in a network, where a name alone does not say enough.

    Args:
        layer: Dotted name from `named_modules()`, a glob that fits one layer, the module, or a
            function `(network, example)` that returns one of these. None lets the wrapper locate
            the bottleneck.
        select: Which tensor, where the layer gives several: an index into a tuple or list, a key
            of a mapping, an attribute, or a function of what the layer gave.
        at: Whether the layer's "output" or its "input" is captured.
        network: Which of several teachers, counted from 0.

    Raises:
        ObjectiveError: If an option has no meaning, or a function takes other arguments.

    Example:
        >>> from privdistill import Layer, Tap
        >>> deepest = Layer("encoder", select=-1)
        >>> Tap(teacher=deepest, student="down4").teacher.select
        -1
    """

    layer: str | nn.Module | Finder | None = None
    select: Select | None = None
    at: Literal["output", "input"] = "output"
    network: int = 0

    def __post_init__(self) -> None:
        known = self.at in ("output", "input")
        if not known or not isinstance(self.network, int) or self.network < 0:
            raise ObjectiveError(
                "Layer: `at` must be 'output' or 'input', and `network` the index of a teacher, "
                f"from 0; got at={self.at!r}, network={self.network!r}."
            )
        if callable(self.layer) and not isinstance(self.layer, nn.Module):
            try:
                signature(self.layer).bind(None, None)
            except TypeError as error:
                raise ObjectiveError(
                    f"Layer: the function {self.layer!r} is called with the network and the "
                    f"example ({error}). Declare both, as in `lambda network, example: 'layer4'`."
                ) from None

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
        # An index would cut the batch instead of choosing an entry.
        if isinstance(value, Tensor):
            raise LayerNotFoundError(
                f"Layer '{self.layer}' gives one tensor, {tuple(value.shape)}, from which "
                f"select={select!r} cannot choose. Leave `select` out."
            )
        # Outputs of Hugging Face are mappings with attributes; others have either.
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
            layer, the module, a `Layer` for entries of tuples and for inputs, or a function from
            the network and its view of the example (None without one) to any of these; it is
            called once, in eval mode. None lets the wrapper locate the bottleneck.
        student: Layer of the student, likewise.
        adapter: How student features get the teacher's shape. "auto" adds what is needed
            (nothing, a 1x1 convolution, resampling); None demands equal shapes; a module is used
            as it is and trained with the student.

    Raises:
        LayerNotFoundError: If `adapter` is none of these.

    Example:
        >>> Tap(teacher="encoder.stages.5", student="down4")
        Tap(teacher='encoder.stages.5', student='down4', adapter='auto')
        >>> last = Tap(teacher=lambda network, example: list(network.children())[-2])
    """

    teacher: str | nn.Module | Layer | Finder | None = None
    student: str | nn.Module | Layer | Finder | None = None
    adapter: Literal["auto"] | nn.Module | None = "auto"

    def __post_init__(self) -> None:
        if not (self.adapter in (None, "auto") or isinstance(self.adapter, nn.Module)):
            raise LayerNotFoundError(
                f"Tap: `adapter` must be 'auto', None or a module; got {self.adapter!r}."
            )

    @staticmethod
    def pairs(
        teacher: str | Layer, student: str | Layer, *, adapter: Literal["auto"] | None = "auto"
    ) -> "TapPairs":
        """Pair several levels at once: the layers that two globs fit, in order.

        The wrapper, which knows the networks, makes one tap of each pair. As `taps=Tap.pairs(...)`
        they are called "level1", "level2" and so on; as `taps={"stage": Tap.pairs(...)}`, "stage1"
        and so on.

        Args:
            teacher: Glob for layers of the teacher, in the order of its `named_modules()`, or a
                `Layer` with one. Layers inside another one that fits are left out.
            student: Glob for as many layers of the student.
            adapter: As for each `Tap`; a module of one's own belongs to a single one.

        Returns:
            What `taps=` takes.

        Example:
            >>> from privdistill import FeatureL2, GroundTruth
            >>> taps = Tap.pairs(teacher="encoder.stages.*", student="down*")
            >>> levels = [f"level{number}" for number in range(1, 5)]
            >>> objective = GroundTruth() + sum(0.1 * FeatureL2(tap).named(tap) for tap in levels)
        """
        return TapPairs(as_layer(teacher), as_layer(student), adapter)


class TapPairs(NamedTuple):
    """Two globs, of which `tap_table` makes taps; see `Tap.pairs`."""

    teacher: Layer
    student: Layer
    adapter: Literal["auto"] | None


def tap_table(
    taps: Mapping[str, Tap | TapPairs] | TapPairs | None,
    read: Sequence[str],
    teachers: Sequence[nn.Module],
    student: nn.Module,
) -> dict[str, Tap]:
    """Return the taps given, one for each level of two globs, and the bottleneck where it is read.

    `read` are the taps of terms; only the bottleneck need not be named.
    """
    table: dict[str, Tap] = {}
    named: Mapping[str, Any] = taps or {} if isinstance(taps, Mapping | None) else {"level": taps}
    for name, tap in named.items():
        # Adapters are kept under this name, as attributes of a module.
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise LayerNotFoundError(
                f"Tap name {name!r} must be a plain word, such as 'bottleneck' or 'stage3'."
            )
        if not isinstance(tap, Tap | TapPairs):
            raise LayerNotFoundError(
                f"Tap '{name}' is {tap!r}; expected Tap(teacher=..., student=...), each under a "
                "name of its own: taps={'deep': Tap(...)}."
            )
        number, count = as_layer(tap.teacher).network, len(teachers)
        if teachers and number >= count:
            raise LayerNotFoundError(
                f"Tap '{name}' reads teacher {number}, but there are {count}, counted from 0."
            )
        if isinstance(tap, Tap):
            table[name] = tap
        elif teachers:
            table.update(_levels(name, tap, teachers[number], student))
    for name in read:
        # The only one that a rule locates.
        if name == "bottleneck":
            table.setdefault(name, Tap())
        elif name not in table:
            raise LayerNotFoundError(
                f"A term reads tap '{name}', but `taps` names {sorted(table) or 'none'}. Add "
                f"taps={{'{name}': Tap(teacher=..., student=...)}}."
            )
    return table


def _levels(name: str, pairs: TapPairs, teacher: nn.Module, student: nn.Module) -> dict[str, Tap]:
    """One tap for each pair of layers that two globs fit, in order."""
    fitting = {}
    for role, place, network in (
        ("teacher", pairs.teacher, teacher),
        ("student", pairs.student, student),
    ):
        names = find_layers(network, place.layer, tap=name, role=role)
        fitting[role] = [brief(replace(place, layer=layer)) for layer in names]
    if len(fitting["teacher"]) != len(fitting["student"]):
        raise LayerNotFoundError(
            f"Tap '{name}': '{pairs.teacher}' and '{pairs.student}' fit different numbers of "
            f"layers, {fitting}. Write globs that fit as many, or one Tap per pair."
        )
    # Counted from 1, as levels of a network are.
    levels = enumerate(zip(fitting["teacher"], fitting["student"], strict=True), start=1)
    return {f"{name}{i}": Tap(one, other, pairs.adapter) for i, (one, other) in levels}


def as_layer(place: str | nn.Module | Layer | Finder | None) -> Layer:
    """Return a tap's layer in its full form."""
    return place if isinstance(place, Layer) else Layer(place)


def brief(place: Layer) -> Any:
    """Return a layer in its shortest form: its name, if nothing else is chosen."""
    return place.layer if place == Layer(place.layer) else place
