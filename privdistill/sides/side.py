"""A side of a wrapper: networks that are given a view and answer with logits and features."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from privdistill import parallel
from privdistill.exceptions import LifecycleError, ObjectiveError, ShapeMismatchError
from privdistill.sides import trial
from privdistill.sides.frozen import Frozen, Resting
from privdistill.sides.heads import find_heads, settle_heads, undecided
from privdistill.sides.probabilities import check_logits
from privdistill.taps.layout import as_map
from privdistill.taps.location import HeadFinder
from privdistill.taps.names import is_compiled
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Layer


class Answer(NamedTuple):
    """What a side says of a view.

    Attributes:
        heads: Logits of each network, `(B, C, *spatial)`, finest first; none where no term reads
            them.
        features: Captured tensors by tap name.
        output: All that the network returned, of the student alone.
    """

    heads: list[list[Tensor]]
    features: dict[str, Tensor]
    output: Any = None


class Side:
    """One network with its view and its taps. What can be fixed is fixed by the dry run.

    Args:
        network: The network; only hooks stay on it.
        layers: Layer by tap name.
        view: Its view of the example, or None without one.
        role: What messages call it.
        select: The user's own function that finds its heads, or None.
        reads_logits: Whether any term reads its logits.
        read: Taps whose features terms compare; these are read as maps.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Mapping[str, Layer],
        view: Tensor | None,
        *,
        role: str,
        select: HeadFinder | None,
        reads_logits: bool,
        read: Collection[str],
    ) -> None:
        #: The network, or what runs it frozen.
        self.run: nn.Module | Resting = network
        self.role = role
        self.select: HeadFinder = select or find_heads
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
        """Run the network, if need be only up to its last tap, and capture its features."""
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
            # The usual case, without a call.
            alone = not self._chosen and isinstance(output, Tensor) and output.ndim == view.ndim
            heads.append([output] if alone else self.select(output, view.ndim - 2))
        return Answer(heads, features, output)

    def own(self, view: Tensor) -> Tensor:
        """Return a view that the network may change: the caller and others must not see it."""
        return view.clone() if self.recorder.edits_input else view

    def check(self, view: Tensor) -> None:
        """Refuse a view that the network could not run on, or that is not like the example."""
        shape, like = view.shape, self.example
        if len(shape) < 3 or 0 in shape:
            problem = (
                f"{tuple(shape)}; expected (B, C, *spatial) with at least one spatial axis and no "
                "empty one. If the batch is empty, drop it before the step."
            )
        elif not view.is_floating_point():
            problem = f"{view.dtype}; networks take floating-point images. Pass image.float()."
        elif like is not None and (len(shape) != len(like) or shape[1] != like[1]):
            problem = (
                f"{tuple(shape)}, that of the example was {like}; the number of axes and channels "
                "must be the same. Check the reader, or build the wrapper with such an example."
            )
        else:
            return
        raise ShapeMismatchError(f"The {self.role}'s view of the input is {problem}")

    def check_gradients(self, features: Mapping[str, Tensor]) -> None:
        """Refuse features, in training, from which nothing could be learnt."""
        for tap, tensor in features.items():
            if not tensor.requires_grad:
                raise LifecycleError(
                    f"Tap '{tap}': the output of layer '{self.places[tap].layer}' carries no "
                    "gradient in training, so its terms would teach nothing. Is that part of the "
                    "student frozen, or does activation checkpointing run with "
                    "use_reentrant=True? Use use_reentrant=False."
                )

    def try_out(self, view: Tensor, *, training: bool = False, asked: bool = False) -> trial.Trial:
        """Run once; note shapes and layouts of features, and what are heads.

        `asked` says that the user gave a weight to each head, so that all of them count.
        """
        found = trial.run(self.network, view, self.recorder, training=training)
        features = dict(found.features)
        for tap in self._to_lay_out:
            features[tap] = self._as_map(tap, features[tap], view)
        self._to_lay_out = [t for t in self._to_lay_out if features[t] is not found.features[t]]
        if not training:
            self.shapes = {tap: tuple(value.shape) for tap, value in features.items()}
        if not self.reads_logits:
            return found._replace(features=features)
        axes = view.ndim - 2
        if not self._chosen and self.select is find_heads and undecided(found.output, axes):
            self.select = self._settle(view, asked=asked)
        heads = self.select(found.output, axes)
        if not training:
            check_logits(heads, self._heads, view, self.role)
        return found._replace(features=features, heads=heads)

    def _settle(self, view: Tensor, *, asked: bool) -> HeadFinder:
        """Find out which of several outputs of one size are heads."""
        learns = self.role == "student"

        def settle(network: nn.Module, image: Tensor) -> HeadFinder:
            return settle_heads(network, image, training=learns, asked=asked, role=self.role)

        return trial.attempt(self.network, view, self.role, settle)

    def _heads(self, view: Tensor) -> list[Tensor]:
        """Heads for another view, in eval mode; nothing is recorded."""

        def forward(network: nn.Module, image: Tensor) -> list[Tensor]:
            return self.select(network(image), image.ndim - 2)

        return trial.attempt(self.network, view, self.role, forward)

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
    """All networks of a teacher, one after the other; none, if there is no teacher."""

    def __init__(self, members: Sequence[Side]) -> None:
        self.members = members

    def __call__(self, view: Tensor) -> Answer:
        """Run the networks that a term reads; the logits of each, and the features of all."""
        heads: list[list[Tensor]] = []
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
    """Say why a forward pass cannot be stopped at its last tap; nothing where it can."""
    if side.example is None:
        return "no example was given, and a layer that runs twice would not be noticed"
    if not isinstance(side.run, Resting):
        return "it is trained too"
    if parallel.any_sharded(side.run.parts):
        return "it is sharded by FSDP, which must see the end of each layer"
    if is_compiled(side.run.parts):
        return "it is compiled, and a graph cannot be left half-way"
    return ""
