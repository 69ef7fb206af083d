"""A side of a wrapper: networks that are given a view and answer with logits and features."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from privdistill import parallel
from privdistill.exceptions import LifecycleError, ObjectiveError, ShapeMismatchError
from privdistill.sides.frozen import Frozen, Resting
from privdistill.taps.layout import as_map
from privdistill.taps.location import HeadFinder
from privdistill.taps.names import is_compiled
from privdistill.taps.recorder import LastTapReached, Recorder
from privdistill.taps.tap import Layer

_ONE_INPUT = """ A network called as network(image, mask) goes into one of forward(image):
    class OneInput(nn.Sequential):
        def forward(self, image):
            return self[0](image, mask_of(image))
Then pass OneInput(network)."""


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
        places: Layer by tap name.
        role: What messages call it.
        select: Finds its heads in what it returns.
        reads_logits: Whether any term reads its logits.
        read: Taps whose features terms compare; these are read as maps.
        example: Shape of its view of the example, or None without one.
    """

    def __init__(
        self,
        network: nn.Module,
        places: Mapping[str, Layer],
        *,
        role: str,
        select: HeadFinder,
        reads_logits: bool,
        read: Collection[str],
        example: tuple[int, ...] | None,
    ) -> None:
        #: The network, or what runs it frozen.
        self.run: nn.Module | Resting = network
        self.role = role
        self.select = select
        self.reads_logits = reads_logits
        self.example = example
        #: How each bottleneck was located, and the shapes of features, by tap name.
        self.notes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        # Taps that have to be laid out as maps in every step; the dry run leaves out what are maps.
        self.to_lay_out = [tap for tap in places if tap in read]
        self.recorder = Recorder(network, places, role=role)
        if example is None:
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
        check_view(view, self.role, self.example)
        # No context manager, which costs more calls, and which the compiler of PyTorch 2.6 refuses.
        features, output = self.recorder.start(leave_early=leave_early), None
        try:
            # The caller and other networks must not see what this one does to its input.
            output = self.run(view.clone() if self.recorder.edits_input else view)
        except LastTapReached:
            pass
        except Exception as error:
            # A note, so that an error of memory stays one that can be caught as such.
            given = f"{view.dtype} {tuple(view.shape)}, example: {self.example}"
            error.add_note(f"The {self.role} was given {given}.{hint(error)}")
            raise
        finally:
            self.recorder.stop()
        self.recorder.check(features)
        for tap in self.recorder.corrupted(features):
            raise LifecycleError(
                f"Tap '{tap}': a layer behind '{self.places[tap].layer}' of the {self.role} "
                "changed its output in place, which the dry run did not show. Pass an example of "
                "the training size to the wrapper, or set inplace=False there."
            )
        if self.to_lay_out:
            self.lay_out(features, view)
        heads = [self.select(output, view.ndim - 2)] if self.reads_logits else []
        return Answer(heads, features, output)

    def check_gradients(self, features: Mapping[str, Tensor]) -> None:
        """Refuse features, in training, from which nothing could be learnt."""
        for tap, tensor in features.items():
            # Its terms would be numbers in the log that nothing learns from.
            if not tensor.requires_grad:
                raise LifecycleError(
                    f"Tap '{tap}': the output of layer '{self.places[tap].layer}' carries no "
                    "gradient in training, so its terms would teach nothing. Is that part of the "
                    "student frozen, or does activation checkpointing run with "
                    "use_reentrant=True? Use use_reentrant=False."
                )

    def lay_out(self, features: dict[str, Tensor], view: Tensor) -> None:
        """Bring features that terms compare into the form of maps, in place."""
        for tap in self.to_lay_out:
            found = as_map(features[tap], view.shape[2:])
            if found is None:
                raise ShapeMismatchError(
                    f"Tap '{tap}': layer '{self.places[tap]}' gives {tuple(features[tap].shape)} "
                    f"for an image of size {tuple(view.shape[2:])}; expected features "
                    "(B, C, *spatial) or tokens (B, N, C) of a grid of square patches. Choose "
                    "another layer, or bring them into that form with Layer(..., select=function)."
                )
            features[tap] = found

    def twin(self) -> Self:
        """Return the same for a copied wrapper, with hooks and a claim of its own."""
        other = copy.copy(self)
        # The claim counts its holders, of which the copy is another one.
        if isinstance(self.run, Frozen):
            other.run = self.run.twin()
        other.recorder = self.recorder.twin(self.network)
        return other

    def release(self) -> None:
        """Give the network back as it came; safe to call twice."""
        self.recorder.remove()
        if isinstance(self.run, Frozen):
            self.run.release()


def hint(error: Exception) -> str:
    """What to do about a network that takes more than an image, if this may be the error."""
    return _ONE_INPUT if isinstance(error, TypeError) else ""


def check_view(view: Tensor, role: str, like: Sequence[int] | None = None) -> None:
    """Refuse a view that the network could not run on, or that is not like the example."""
    shape = view.shape
    # A norm or an interpolation would fail later, with words of its own.
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
    raise ShapeMismatchError(f"The {role}'s view of the input is {problem}")


class TeacherSide:
    """All networks of a teacher, one after the other; none, if there is no teacher."""

    def __init__(self, members: Sequence[Side]) -> None:
        self.members = members

    def __call__(self, view: Tensor) -> Answer:
        """Run the networks that a term reads; the logits of each, and the features of all."""
        heads: list[list[Tensor]] = []
        features: dict[str, Tensor] = {}
        for member in self.members:
            # Of several teachers perhaps only one is tapped.
            if not member.reads_logits and not member.places:
                continue
            early = not member.reads_logits and not torch.compiler.is_compiling()
            early = early and not why_not_left_early(member)
            answer = member(view, leave_early=early)
            heads += answer.heads
            features.update(answer.features)
            if heads and len(heads[-1]) > 1 and not isinstance(member.run, Resting):
                raise ObjectiveError(
                    f"The JointTeacher returns {len(heads[-1])} heads, of which only the first "
                    "would be trained. Switch its deep supervision off, or choose a head with "
                    "`select_logits=`."
                )
        return Answer(heads, features)


def why_not_left_early(side: Side) -> str:
    """Say why a forward pass cannot be stopped at its last tap; nothing where it can."""
    # In each of these cases leaving would be wrong, or another process would wait for ever.
    if side.example is None:
        return "no example was given, and a layer that runs twice would not be noticed"
    if not isinstance(side.run, Resting):
        return "it is trained too"
    if parallel.any_sharded(side.run.parts):
        return "it is sharded by FSDP, which must see the end of each layer"
    if is_compiled(side.run.parts):
        return "it is compiled, and a graph cannot be left half-way"
    return ""
