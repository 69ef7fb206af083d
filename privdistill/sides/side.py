"""A side of a wrapper: networks that are given a view and answer with logits and features."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from privdistill import parallel
from privdistill.cache import TeacherCache
from privdistill.cache.fingerprint import Fingerprint, written
from privdistill.exceptions import LifecycleError, ObjectiveError, ShapeMismatchError
from privdistill.inputs import PrivilegedInput
from privdistill.losses import Objective
from privdistill.sides import trial
from privdistill.sides.frozen import Frozen, Resting
from privdistill.sides.teachers import JointTeacher, MovingAverage
from privdistill.step import Select, find_heads, undecided
from privdistill.taps.layout import as_map
from privdistill.taps.names import is_compiled, uncompiled
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Layer
from privdistill.text import sizes

Heads = list[Tensor]


class Answer(NamedTuple):
    """What a side says of a view.

    Attributes:
        heads: Logits of each network, `(B, C, *spatial)`, finest first; none where no term reads
            them.
        features: Captured tensors by tap name.
        output: All that the network returned, of the student alone.
    """

    heads: list[Heads]
    features: dict[str, Tensor]
    output: Any = None


class Side:
    """One network with its view and its taps. What can be fixed is fixed by the dry run.

    Args:
        network: The network; only hooks stay on it.
        layers: Layer by tap name.
        view: Its view of the example, or None without one.
        role: What messages call it.
        select: The user's own function that finds the logits in its output, given the number of
            spatial axes.
        reads_logits: Whether any term reads its logits.
        read: Taps whose features terms compare; these are read as maps.

    Raises:
        LayerNotFoundError: If a layer does not exist or no bottleneck can be told.
        ShapeMismatchError: If the view is no image.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Mapping[str, Layer],
        view: Tensor | None,
        *,
        role: str,
        select: Select | None,
        reads_logits: bool,
        read: Collection[str],
    ) -> None:
        #: The network, or what runs it frozen.
        self.run: nn.Module | Resting = network
        self.role = role
        self.select: Select = select or find_heads
        self._chosen = select is not None
        self.reads_logits = reads_logits
        self.example = None if view is None else tuple(view.shape)
        if view is not None:
            self.check(view)
        places, self.notes = trial.find_places(network, layers, view, role, self.select)
        self.shapes: dict[str, tuple[int, ...]] = {}
        # Taps that have to be laid out as maps in every step; the dry run leaves out what are maps.
        self._to_lay_out = [tap for tap in places if tap in read]
        self.recorder = Recorder(network, places, role=role)
        if view is None:
            # Without a dry run nothing tells which layers are overwritten in place.
            self.recorder.cloned.update(places)
            self.recorder.edits_input = True

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self.run.network if isinstance(self.run, Resting) else self.run

    @property
    def places(self) -> dict[str, Layer]:
        """Layer by tap name."""
        return self.recorder.places

    def __call__(self, view: Tensor, *, leave_early: bool = False) -> Answer:
        """Run the network and capture its features.

        Args:
            view: What it sees.
            leave_early: Stop the forward pass at the last tap, so that there are no logits.

        Returns:
            Its logits, features and output.

        Raises:
            LifecycleError: If a tap did not fire once, or was overwritten.
            ShapeMismatchError: If the view or the features have another form.
        """
        self.check(view)
        output = None
        with self.recorder.recording(leave_early=leave_early) as features:
            output = self.run(view.clone() if self.recorder.edits_input else view)
        self.recorder.check(features)
        for tap in self.recorder.corrupted(features):
            raise LifecycleError(
                f"Tap '{tap}': a layer behind '{self.places[tap].layer}' of the {self.role} "
                "changed its output in place, which the dry run did not show. Pass an example of "
                "the training size to the wrapper, or set inplace=False there."
            )
        for tap in self._to_lay_out:
            features[tap] = self._as_map(tap, features[tap], view)
        heads = []
        if self.reads_logits:
            alone = not self._chosen and isinstance(output, Tensor) and output.ndim == view.ndim
            heads.append([output] if alone else self.select(output, view.ndim - 2))
        return Answer(heads, features, output)

    def own(self, view: Tensor) -> Tensor:
        """Return a view that the network may change: the caller and others must not see it."""
        return view.clone() if self.recorder.edits_input else view

    def check(self, view: Tensor) -> None:
        """Refuse a view that the network could not run on, or that is not like the example.

        Args:
            view: What the network is about to see.

        Raises:
            ShapeMismatchError: If it is such a view.
        """
        shape, like = view.shape, self.example
        if len(shape) < 3 or 0 in shape:
            raise ShapeMismatchError(
                f"The {self.role}'s view of the input is {tuple(shape)}; expected (B, C, *spatial) "
                "with at least one spatial axis and no empty one. If the batch is empty, drop it "
                "before the step."
            )
        if not view.is_floating_point():
            raise ShapeMismatchError(
                f"The {self.role}'s view of the input is {view.dtype}; networks take "
                "floating-point images. Pass image.float()."
            )
        if like is not None and (len(shape) != len(like) or shape[1] != like[1]):
            raise ShapeMismatchError(
                f"The {self.role}'s view of the input is {tuple(shape)}, that of the example was "
                f"{like}; the number of axes and channels must be the same. Check the reader, or "
                "build the wrapper with an example like the batches."
            )

    def check_gradients(self, features: Mapping[str, Tensor]) -> None:
        """Refuse features, in training, from which nothing could be learnt.

        Args:
            features: The student's, by tap name.

        Raises:
            LifecycleError: If any carries no gradient.
        """
        for tap, tensor in features.items():
            if not tensor.requires_grad:
                raise LifecycleError(
                    f"Tap '{tap}': the output of layer '{self.places[tap].layer}' carries no "
                    "gradient in training, so its terms would teach nothing. Is that part of the "
                    "student frozen, or does activation checkpointing run with "
                    "use_reentrant=True? Use use_reentrant=False."
                )

    def try_out(self, view: Tensor, *, training: bool = False, asked: bool = False) -> trial.Trial:
        """Run once; note the shapes of the features, how they are laid out, and what are heads.

        Args:
            view: The network's view of the example.
            training: Run in train mode instead of eval mode.
            asked: Whether the user gave a weight to each of its heads.

        Returns:
            The trial, its features as maps.
        """
        found = trial.run(self.network, view, self.recorder, None, training=training)
        features = dict(found.features)
        for tap in self._to_lay_out:
            features[tap] = self._as_map(tap, features[tap], view)
        self._to_lay_out = [t for t in self._to_lay_out if features[t] is not found.features[t]]
        if not training:
            self.shapes = {tap: tuple(value.shape) for tap, value in features.items()}
        axes = view.ndim - 2
        if self.reads_logits and self.select is find_heads and undecided(found.output, axes):
            learns = self.role == "student"
            self.select = trial.settle(self.network, view, self.role, training=learns, asked=asked)
        heads = self.select(found.output, axes) if self.reads_logits else []
        if heads and not training:
            trial.check_heads(self.network, heads, self.select, view, self.role)
        return found._replace(features=features, heads=heads)

    def _as_map(self, tap: str, value: Tensor, view: Tensor) -> Tensor:
        found = as_map(value, view.shape[2:])
        if found is None:
            raise ShapeMismatchError(
                f"Tap '{tap}': layer '{self.places[tap]}' gives {tuple(value.shape)} for an image "
                f"of size {tuple(view.shape[2:])}; expected features (B, C, *spatial) or tokens "
                "(B, N, C) of a grid of square patches. Choose another layer, or bring them into "
                "that form with Layer(..., select=function)."
            )
        return found

    def describe(self, *, compiled: bool) -> str:
        """Say what the network is and how far it runs, perhaps in a compiled wrapper."""
        network = uncompiled(self.network)
        parts = [type(network).__name__]
        if is_compiled(self.network.modules()):
            parts.append("compiled")
        kinds = {type(part).__module__ for part in (*network.modules(), *network.parameters())}
        if any("quantiz" in kind or "torchao" in kind for kind in kinds):
            parts.append("quantised")
        if isinstance(self.run, Resting):
            parts.append("frozen" if isinstance(self.run, Frozen) else "average of the student")
        elif self.role != "student":
            parts.append("trained too")
        if not self.reads_logits:
            parts.append(self._how_far(compiled=compiled))
        return ", ".join(parts)

    def _how_far(self, *, compiled: bool) -> str:
        if not self.places:
            return "does not run, as no term reads it"
        why = why_not_left_early(self)
        if compiled:
            why = "the wrapper is compiled, and a graph cannot be left half-way"
        return (
            f"runs to its end, as {why}"
            if why
            else "stops at its last tap, as no term reads its logits"
        )

    def cells(self, tap: str) -> tuple[str, str, str]:
        """Return role, layer and shape of a tap, for the table that a wrapper prints."""
        shape = sizes(self.shapes[tap][1:]) if tap in self.shapes else "not run yet"
        return self.role, str(self.places[tap]), shape

    def twin(self) -> Self:
        """Return the same for a copied wrapper, with hooks and a claim of its own."""
        other = copy.copy(self)
        if isinstance(self.run, Frozen):
            other.run = self.run.twin()
        other.recorder = self.recorder.twin(self.network)
        return other

    def release(self) -> None:
        """Give the network back as it came; safe to call twice."""
        self.recorder.remove()
        if isinstance(self.run, Frozen):
            self.run.release()


class TeacherSide:
    """All networks of a teacher, one after the other; none, if there is no teacher.

    Args:
        members: Its networks.
    """

    def __init__(self, members: Sequence[Side]) -> None:
        self.members = members

    def __call__(self, view: Tensor) -> Answer:
        """Run the networks that a term reads.

        Args:
            view: What they see.

        Returns:
            The logits of each, and the features of all.

        Raises:
            ObjectiveError: If a teacher that learns returns several heads.
        """
        heads: list[Heads] = []
        features: dict[str, Tensor] = {}
        for member in self.members:
            if not member.reads_logits and not member.places:
                continue
            early = not member.reads_logits and not torch.compiler.is_compiling()
            early = early and not why_not_left_early(member)
            answer = member(view, leave_early=early)
            heads += answer.heads
            features |= answer.features
            if heads and len(heads[-1]) > 1 and not isinstance(member.run, Resting):
                raise ObjectiveError(
                    f"The JointTeacher returns {len(heads[-1])} heads, of which only the first "
                    "would be trained. Switch its deep supervision off, or choose a head with "
                    "`select_logits=`."
                )
        return Answer(heads, features)


def why_not_left_early(side: Side) -> str:
    """Say why a network's forward pass cannot be stopped at its last tap.

    Args:
        side: The network.

    Returns:
        The reason, or an empty text where it can be stopped.
    """
    if side.example is None:
        return "no example was given, and a layer that runs twice would not be noticed"
    if not isinstance(side.run, Resting):
        return "it is trained too"
    if parallel.any_sharded(side.run.parts):
        return "it is sharded by FSDP, which must see the end of each layer"
    if is_compiled(side.run.parts):
        return "it is compiled, and a graph cannot be left half-way"
    return ""


class CachedSide:
    """A cache before a teacher.

    Args:
        side: The teacher.
        cache: Keeps its answers by key.
        asked: What else than its weights decides them: views, taps, which logits are read.
    """

    def __init__(self, side: TeacherSide, cache: TeacherCache, asked: str) -> None:
        self._side = side
        self._cache = cache
        self._asked = asked
        self._fingerprint: Fingerprint | None = None

    def __call__(self, view: Tensor, key: Sequence[str]) -> Answer:
        """Serve what the teacher answered before, or run it.

        Args:
            view: What it sees.
            key: One text per sample.

        Returns:
            Its answer.

        Raises:
            CacheError: If a key comes back with another input.
        """
        # Files, digests and locks are nothing to compile. The import takes more than a second.
        from privdistill.cache.eager import eagerly  # noqa: PLC0415

        return eagerly(self._fetch, view, key)

    def _fetch(self, view: Tensor, key: Sequence[str]) -> Answer:
        if self._fingerprint is None:
            self._fingerprint = Fingerprint([member.network for member in self._side.members])
        teacher = self._fingerprint.current(self._asked)
        return _parted(self._cache.fetch(teacher, key, view, lambda: _named(self._side(view))))


def asked_of(inputs: Any, teachers: Sequence[Side], objective: Objective, select: Any) -> str:
    """Return what else than its weights decides what a teacher's outputs are.

    Args:
        inputs: How the input is divided.
        teachers: Its networks.
        objective: Says what is read of them.
        select: The user's own function that finds logits, bound, or None.

    Returns:
        The same text in every process.
    """
    seen = inputs.teacher if isinstance(inputs, PrivilegedInput) else type(inputs).__qualname__
    places = [(side.role, tap, str(p)) for side in teachers for tap, p in side.places.items()]
    own = select.args if select else ()
    chosen = [*own, *(layer.select for side in teachers for layer in side.places.values())]
    names = [written(function) for function in chosen]
    return repr((seen, places, objective.needs_teacher_logits, objective.taps, names))


def check_cache(
    cache: TeacherCache | None, teacher: object, networks: Sequence[nn.Module]
) -> TeacherCache | None:
    """Refuse to keep the outputs of a teacher that changes in every step.

    Args:
        cache: What the user passed.
        teacher: What the user declared.
        networks: What it consists of.

    Returns:
        The cache.

    Raises:
        LifecycleError: If it is no cache, the teacher changes, or FSDP has sharded it.
    """
    if cache is not None and not isinstance(cache, TeacherCache):
        raise LifecycleError(
            f"`cache` is {cache!r}; expected a TeacherCache, such as TeacherCache('runs/teacher')."
        )
    if cache is not None and isinstance(teacher, MovingAverage | JointTeacher):
        raise LifecycleError(
            f"A {type(teacher).__name__} changes in every step, so its outputs cannot be kept. "
            "Leave `cache` out, or pass a frozen teacher."
        )
    if cache is not None and any(parallel.any_sharded(network.modules()) for network in networks):
        raise LifecycleError(
            "The teacher is sharded by FSDP: where one process finds a sample and another does "
            "not, both would wait for each other for ever. Leave `cache` out, or pass the teacher "
            "unsharded; with a cache it hardly runs."
        )
    return cache


def _named(answer: Answer) -> dict[str, Tensor]:
    named = {f"logits.{i}.{j}": h for i, own in enumerate(answer.heads) for j, h in enumerate(own)}
    return named | {f"tap.{tap}": value for tap, value in answer.features.items()}


def _parted(outputs: Mapping[str, Tensor]) -> Answer:
    """The inverse of `_named`."""
    answer = Answer([], {})
    for name, value in outputs.items():
        kind, _, rest = name.partition(".")
        if kind == "tap":
            answer.features[rest] = value
            continue
        index = int(rest.split(".")[0])
        answer.heads.extend([[]] * (index == len(answer.heads)))
        answer.heads[index].append(value)
    return answer
