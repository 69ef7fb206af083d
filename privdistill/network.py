"""One network of a wrapper: its hooks, its view, and what the dry run showed."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from privdistill import dry_run
from privdistill.checks import check_view, feature_map, sharded
from privdistill.step import Select, find_heads, undecided
from privdistill.taps.names import uncompiled
from privdistill.taps.recorder import Recorder
from privdistill.taps.tap import Layer
from privdistill.teachers import FrozenTeacher, Teacher, hold
from privdistill.text import sizes

Features = dict[str, Tensor]


class Network:
    """The student, or what it has in common with a teacher.

    Args:
        model: The network; only hooks stay on it.
        layers: Layer by tap name.
        view: Its view of the example, or None without one.
        role: What messages call it.
        select: The user's own function that finds the logits in what it returns.

    Raises:
        LayerNotFoundError: If a layer does not exist or no bottleneck can be told.
        ShapeMismatchError: If the view is no image.
    """

    side = "student"

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        view: Tensor | None,
        role: str = "student",
        *,
        select: Select | None,
    ) -> None:
        self.role = role
        self.example = None if view is None else tuple(view.shape)
        if view is not None:
            self.check(view)
        #: Finds the logits in what the network returns.
        self.select: Select = select or find_heads
        places, self.notes = dry_run.find_places(model, layers, view, role, self.select)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.recorder = Recorder(model, places, role=role)
        if view is None:
            # Without a dry run nothing tells which layers are overwritten in place.
            self.recorder.cloned.update(places)
            self.recorder.edits_input = True

    def check(self, view: Tensor) -> None:
        """Refuse a view that the network could not run on, or that is not like the example.

        Args:
            view: What the network is about to see.

        Raises:
            ShapeMismatchError: If it is such a view.
        """
        check_view(view, self.role, self.example)

    def try_out(
        self,
        model: nn.Module,
        view: Tensor,
        read: Collection[str],
        *,
        heads: bool = True,
        training: bool = False,
        asked: bool = False,
    ) -> dry_run.Trial:
        """Run once, and note the shapes of the features.

        Args:
            model: The network.
            view: Its view of the example.
            read: Taps whose features terms compare; these are read as maps.
            heads: Whether its logits are needed.
            training: Run in train mode instead of eval mode.
            asked: Whether the user gave a weight to each of its heads.

        Returns:
            The trial.
        """
        trial = dry_run.run(model, view, self.recorder, None, training=training)
        axes = view.ndim - 2
        if heads and self.select is find_heads and undecided(trial.output, axes):
            learns = self.side == "student"
            self.select = dry_run.settle(model, view, self.role, training=learns, asked=asked)
        found = self.select(trial.output, axes) if heads else []
        features = self._maps(trial.features, view, read)
        self.shapes = {tap: tuple(value.shape) for tap, value in features.items()}
        return trial._replace(features=features, heads=found)

    def run(
        self,
        model: Callable[[Tensor], Any],
        view: Tensor,
        read: Collection[str],
        *,
        leave_early: bool = False,
    ) -> tuple[Any, Features]:
        """Run the network and capture its features.

        Args:
            model: The network, or its holder.
            view: What it sees.
            read: Taps whose features terms compare; these are read as maps.
            leave_early: Stop the forward pass at the last tap.

        Returns:
            Its output, None if it was left early, and the features by tap name.

        Raises:
            LifecycleError: If a tap did not fire once, or was overwritten.
        """
        output = None
        with self.recorder.recording(leave_early=leave_early) as captured:
            # What a network does to its input must not reach the others.
            output = model(view.clone() if self.recorder.edits_input else view)
        self.recorder.check(captured)
        self.recorder.check_intact(captured)
        return output, self._maps(captured, view, read)

    def _maps(self, captured: Features, view: Tensor, read: Collection[str]) -> Features:
        size, places = view.shape[2:], self.recorder.places
        return {
            tap: feature_map(value, size, tap=tap, layer=places[tap]) if tap in read else value
            for tap, value in captured.items()
        }

    def cells(self, tap: str) -> tuple[str, str, str]:
        """Describe a tap in the table that a wrapper prints.

        Args:
            tap: Name of the tap.

        Returns:
            Role, layer and shape of the features.
        """
        shape = sizes(self.shapes[tap][1:]) if tap in self.shapes else "not run yet"
        return self.role, str(self.recorder.places[tap]), shape

    def release(self) -> None:
        """Give the network back as it came; safe to call twice."""
        self.recorder.remove()


class TeacherNetwork(Network):
    """A teacher and its holder.

    Args:
        declared: What the user passed as teacher.
        model: One of its networks.
        layers: Layer by tap name.
        view: Its view of the example, or None without one.
        index: Which of several teachers, from 0.
        select: Finds the logits in what it returns.
    """

    side = "teacher"

    def __init__(
        self,
        declared: Teacher | None,
        model: nn.Module,
        layers: Mapping[str, Layer],
        view: Tensor | None,
        index: int,
        *,
        select: Select | None,
    ) -> None:
        role = f"teacher {index + 1}" if index else "teacher"
        super().__init__(model, layers, view, role, select=select)
        self.holder = hold(declared, model)

    def runs_on(self) -> str:
        """Say why the forward pass cannot be left at the last tap, if it cannot."""
        if self.example is None:
            return "no example was given, and a layer that runs twice would not be noticed"
        return why_not_left_early(self.holder.module)

    def release(self) -> None:
        """Remove the hooks and give up the claim on the teacher."""
        super().release()
        self.holder.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherNetwork":
        """Copy a teacher that changes; share a frozen one, with hooks and a claim of its own."""
        twin = copy.copy(self)
        if self.holder.owned:
            twin.__dict__ |= copy.deepcopy(self.__dict__, memo)
        elif self.holder.holding:
            # Another holder, which must not move the teacher under the original.
            twin.holder = FrozenTeacher(self.holder.module, moves=False)
            twin.recorder = self.recorder.twin(self.holder.module)
        return twin


def why_not_left_early(model: nn.Module) -> str:
    """Say why a network's forward pass cannot be stopped at its last tap.

    Args:
        model: The network.

    Returns:
        The reason, or an empty text where it can be stopped.
    """
    parts = list(model.modules())
    if any(sharded(part) for part in parts):
        return "it is sharded by FSDP, which must see the end of each layer"
    if any(part is not uncompiled(part) or vars(part).get("_compiled_call_impl") for part in parts):
        return "it is compiled, and a graph cannot be left half-way"
    return ""
