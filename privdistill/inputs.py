"""Which modalities each network sees, and a check that it sees no more."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from privdistill.exceptions import ModalityError
from privdistill.sides.restored import restored

Image = Tensor | Mapping[str, Tensor]
#: Which modalities each sample has, `(B, modalities)`.
Presence = Tensor | Sequence[Sequence[bool]]


class InputViews(Protocol):
    """Two views of one input; `PrivilegedInput` is one, any object with these methods serves."""

    def for_teacher(self, image: Image) -> Tensor:
        """Return the teacher's view, `(B, C_teacher, *spatial)`."""

    def for_student(self, image: Image) -> Tensor:
        """Return the student's view, `(B, C_student, *spatial)`."""


class SameInput:
    """Both networks see the whole input: distillation without privileged modalities."""

    def for_teacher(self, image: Image) -> Tensor:
        """Return the image as it came."""
        return _as_tensor(image)

    for_student = for_teacher

    def __repr__(self) -> str:
        return "both networks see the whole input"


class PrivilegedInput:
    """Give each network its modalities, by name.

    The input is one tensor whose channels are the modalities in the order of `modalities`, or a
    mapping from modality name to a `(B, C, *spatial)` tensor with its channels. The student never
    touches a channel outside its view, so its output has no gradient with respect to the privileged
    ones.

    Args:
        modalities: Names of all channel groups, in the order in which the reader stacks them; a
            mapping gives the number of channels of each, which is 1 otherwise.
        student: Names the student sees, in the order its input layer expects.
        teacher: Names the teacher sees; all of `modalities` unless given.
        dropout: Probability with which each of the student's modalities is hidden from a sample in
            training, in [0, 1), so that a student of several modalities learns to do without some.
            At least one is kept; at 0.5 every set of modalities is equally likely.
        fill: Value of hidden and absent modalities.

    Raises:
        ModalityError: If a name is repeated, a view is empty, a view names an unknown modality, or
            an option has no meaning.

    Example:
        >>> inputs = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",))
        >>> image = torch.arange(4.0).reshape(1, 4, 1, 1, 1)
        >>> inputs.for_student(image).flatten()
        tensor([2.])
        >>> inputs.for_teacher(image).shape
        torch.Size([1, 4, 1, 1, 1])
        >>> inputs.for_teacher(image, torch.tensor([[True, False, True, True]])).flatten()
        tensor([0., 0., 2., 3.])
        >>> PrivilegedInput({"rgb": 3, "depth": 1}, student=("rgb",))
        teacher rgb (3 channels), depth | student rgb (3 channels)

    Source:
        Hu et al. 2020, arXiv:2106.09564, section 2: the teacher receives the concatenation of all
        modalities, the student one of them. Views of several modalities are a generalisation.
        Dropout: random subsets of modalities in training as in HeMIS, Havaei et al. 2016,
        arXiv:1607.05194, and U-HVED, Dorent et al. 2019, arXiv:1907.11150.
    """

    def __init__(
        self,
        modalities: Sequence[str] | Mapping[str, int],
        student: Sequence[str],
        teacher: Sequence[str] | None = None,
        *,
        dropout: float = 0.0,
        fill: float = 0.0,
    ) -> None:
        self.modalities = _names("modalities", modalities)
        #: Number of channels of each modality.
        self.channels = dict.fromkeys(self.modalities, 1)
        if isinstance(modalities, Mapping):
            self.channels |= modalities
        self.student = _names("student", student, self.modalities)
        seen = self.modalities if teacher is None else teacher
        self.teacher = _names("teacher", seen, self.modalities)
        self.dropout, self.fill = dropout, fill
        if any(type(count) is not int or count < 1 for count in self.channels.values()):
            raise ModalityError(
                f"PrivilegedInput: `modalities` gives the channel counts {self.channels}; each "
                "must be a whole number of at least 1."
            )
        if not 0 <= dropout < 1:
            raise ModalityError(f"PrivilegedInput: `dropout` must be in [0, 1); got {dropout}.")
        # What every step asks for: channels in all and of the student, and where each begins.
        self._all, self._own = (
            sum(self.channels[name] for name in names) for names in (self.modalities, self.student)
        )
        ends = accumulate(self.channels.values())
        self._starts = {
            n: end - self.channels[n] for n, end in zip(self.channels, ends, strict=True)
        }

    def for_teacher(self, image: Image, present: Tensor | None = None) -> Tensor:
        """Return the teacher's modalities of a full input.

        Args:
            image: `(B, channels, *spatial)`, or a mapping by modality name.
            present: Which of `modalities` each sample has, boolean `(B, len(modalities))`; the
                others are filled.

        Returns:
            `(B, channels of the teacher's, *spatial)`.

        Raises:
            ModalityError: If a modality is missing, the channel count is another, or `present` has
                another form.
        """
        view = self._view(image, self.teacher)
        return view if present is None else self._fill(view, self.teacher, present)

    def for_student(self, image: Image, present: Tensor | None = None) -> Tensor:
        """Return the student's modalities of a full input, or of one that holds nothing else.

        Args:
            image: `(B, channels, *spatial)`, the student's view alone, or a mapping by modality
                name. They are told apart by the number of channels: where the student sees all
                modalities in another order, a tensor is always read as the full input.
            present: Which of `modalities` each sample has, boolean `(B, len(modalities))`; the
                others are filled.

        Returns:
            `(B, channels of the student's, *spatial)`.

        Raises:
            ModalityError: If a modality is missing, the channel count is neither, or `present` has
                another form.
        """
        alone = isinstance(image, Tensor) and image.ndim > 1 and image.shape[1] == self._own
        # Equal counts say nothing: the order might be another.
        full = not alone or self._own == self._all
        view = self._view(image, self.student) if full else _as_tensor(image)
        return view if present is None else self._fill(view, self.student, present)

    def for_training(self, image: Image, present: Tensor | None = None) -> Tensor:
        """Return the student's modalities with some of them hidden at random.

        Args:
            image: As for `for_student`.
            present: As for `for_student`; what is absent stays so, and of the rest one is kept.

        Returns:
            `(B, channels of the student's, *spatial)`.

        Raises:
            ModalityError: As for `for_student`.
        """
        view = self.for_student(image, present)
        # Drawing would advance the random numbers of those who hide nothing.
        if not self.dropout:
            return view
        there = torch.ones(len(view), len(self.student), dtype=torch.bool, device=view.device)
        if present is not None:
            there = present[:, self._indices(self.student)].to(view.device)
        return self._hide(view, self.student, self._draw(there))

    def _draw(self, present: Tensor) -> Tensor:
        """Which modalities each sample keeps: `(B, M)`, drawn among the sets that are not empty."""
        # A sample that has nothing at all may draw anything: all of it is filled already.
        free = present | ~present.any(1, keepdim=True)
        # The first one that is kept, and those behind it one by one: no draw is ever empty.
        chance = torch.where(free, self.dropout ** (free.cumsum(1) - 1.0), 0.0)
        first = chance.multinomial(1)
        order = torch.arange(free.shape[1], device=free.device)
        kept = free & (torch.rand(free.shape, device=free.device) >= self.dropout)
        return (order == first) | (kept & (order > first))

    def _fill(self, view: Tensor, names: tuple[str, ...], present: Tensor) -> Tensor:
        wanted = (view.shape[0], len(self.modalities))
        if tuple(present.shape) != wanted or present.dtype != torch.bool:
            raise ModalityError(
                f"PrivilegedInput: `present` is {present.dtype} {tuple(present.shape)}; expected "
                f"torch.bool {wanted}, one value per sample and modality {self.modalities}."
            )
        return self._hide(view, names, present[:, self._indices(names)])

    def _hide(self, view: Tensor, names: tuple[str, ...], kept: Tensor) -> Tensor:
        groups = [kept[:, i : i + 1].expand(-1, self.channels[n]) for i, n in enumerate(names)]
        mask = torch.cat(groups, dim=1).reshape(*view.shape[:2], *[1] * (view.ndim - 2))
        # Not a product: what is absent may well be stored as NaN.
        return torch.where(mask.to(view.device), view, self.fill)

    def _indices(self, names: tuple[str, ...]) -> list[int]:
        return [self.modalities.index(name) for name in names]

    def _view(self, image: Image, names: tuple[str, ...]) -> Tensor:
        if isinstance(image, Mapping):
            return self._stack(image, names)
        image = image if type(image) is Tensor else _as_tensor(image)
        if image.ndim < 3 or image.shape[1] != self._all:
            raise ModalityError(
                f"PrivilegedInput: the input is {tuple(image.shape)}; expected (B, {self._all}, "
                f"*spatial) for the channels of `modalities`, {self.channels}. Pass the names in "
                "the order in which the reader stacks them."
            )
        if names == self.modalities:
            return image
        # A copy, since the other network must not see what this one does to its input.
        return torch.cat([image.narrow(1, self._starts[n], self.channels[n]) for n in names], 1)

    def _stack(self, image: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
        missing = [name for name in names if name not in image]
        if missing:
            raise ModalityError(
                f"PrivilegedInput: the input has no modality {missing}; it holds "
                f"{sorted(map(str, image))}, and this network needs {names}."
            )
        # In the order of the view, whatever that of the mapping.
        parts = [_as_tensor(image[name]) for name in names]
        # Channels must be those named, all other axes alike.
        found = [part.shape[1] if part.ndim > 2 else 0 for part in parts]
        alike = {(part.shape[0], *part.shape[2:]) for part in parts}
        if found != [self.channels[name] for name in names] or len(alike) > 1:
            shapes = {name: tuple(part.shape) for name, part in zip(names, parts, strict=True)}
            raise ModalityError(
                f"PrivilegedInput: the modalities have shapes {shapes}; expected (B, C, *spatial) "
                f"of one size, with the channels {self.channels}."
            )
        return torch.cat(parts, dim=1)

    def __repr__(self) -> str:
        listed = {n: n if c == 1 else f"{n} ({c} channels)" for n, c in self.channels.items()}
        teacher, student = (
            ", ".join(listed[name] for name in names) for names in (self.teacher, self.student)
        )
        hidden = f", each hidden with probability {self.dropout}" if self.dropout else ""
        return f"teacher {teacher} | student {student}{hidden}"


def as_views(inputs: InputViews | None) -> InputViews:
    """Return how an input is divided among the networks: as the user says, or both see all."""
    if inputs is None:
        return SameInput()
    if not (hasattr(inputs, "for_teacher") and hasattr(inputs, "for_student")):
        raise ModalityError(
            f"`inputs` is {inputs!r}; expected PrivilegedInput(modalities=..., student=...) or an "
            "object with the methods for_teacher(image) and for_student(image)."
        )
    return inputs


def view_of(
    inputs: Any, kind: str, image: Image, present: Presence | None = None, *, training: bool = False
) -> Tensor:
    """Return what one network, the "student" or the "teacher", is given of an input.

    In `training` some modalities may be hidden from the student.
    """
    view = inputs.for_student if kind == "student" else inputs.for_teacher
    if isinstance(inputs, PrivilegedInput):
        view = inputs.for_training if training and kind == "student" else view
        found: Tensor = view(image, None if present is None else torch.as_tensor(present))
        return found
    # Views of the user's own need know neither of masks nor of tensors with metadata.
    if present is not None:
        raise ModalityError(
            "`present` says which modalities each sample has, but the wrapper knows none. Pass "
            "`inputs=PrivilegedInput(modalities=..., student=...)` to it."
        )
    return plain(view(image))


def plain(tensor: Tensor) -> Tensor:
    """Take a tensor out of a subclass that carries metadata, such as MONAI's `MetaTensor`.

    Such a subclass slows every operation down and would come back as the loss.
    """
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


def _as_tensor(image: Image) -> Tensor:
    if isinstance(image, Tensor):
        return plain(image)
    raise ModalityError(
        f"The input is a {type(image).__name__}; expected a tensor (B, C, *spatial), which "
        "torch.as_tensor(image) makes. A mapping from modality name to tensor needs "
        "`inputs=PrivilegedInput(modalities=..., student=...)`."
    )


def _names(argument: str, names: Iterable[str], known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Check an option that holds names."""
    found = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else ()
    unknown = [name for name in found if not isinstance(name, str) or name not in (known or found)]
    if not found or unknown or len(set(found)) != len(found):
        of_these = f" of `modalities`, {known}" if known else ""
        raise ModalityError(
            f"PrivilegedInput: `{argument}` is {names!r}; expected a tuple of names{of_these}, "
            "each of them once, such as ('t1', 't1ce')."
        )
    return found


def assert_no_leak(
    model: nn.Module, view: InputViews, example: Image, *, seen: Sequence[int | str] | None = None
) -> None:
    """Check that a student's output does not depend on modalities outside its view.

    The output must stay the same, bit by bit, when another channel is replaced by noise. Besides
    what a gradient shows, this finds what it does not, such as a normalisation by detached
    statistics of all channels.

    Args:
        model: The student, which is called with `view.for_student(input)` in eval mode.
        view: What the wrapper was given as `inputs`.
        example: A full input; only its shape matters, values are drawn at random.
        seen: Channels (of a tensor) or names (of a mapping) that the student may see; known for
            `PrivilegedInput`.

    Raises:
        ModalityError: If anything else reaches the output; names it. Also if the output holds no
            floating-point tensor.

    Example:
        >>> inputs = PrivilegedInput(("flair", "t1ce"), student=("t1ce",))
        >>> assert_no_leak(nn.Conv2d(1, 2, 1), inputs, torch.zeros(1, 2, 4, 4))
    """
    parts = _groups(example, view)
    known = view.student if seen is None and isinstance(view, PrivilegedInput) else seen
    if known is None or not set(known) <= set(parts):
        raise ModalityError(
            f"assert_no_leak: the student's view is {known}, the example holds {list(parts)}. Pass "
            f"a full input, and for a {type(view).__name__} also seen=... with some of these."
        )
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = {name: torch.randn(part.shape).to(weight) for name, part in parts.items()}
    whole = isinstance(example, Tensor)
    with restored(model), torch.no_grad():
        model.eval()
        output = _run(model, view, inputs, whole=whole)
        others = {n: torch.randn_like(part) for n, part in inputs.items() if n not in known}
        # One at a time, so that the message can name the modality.
        leaking = [
            name
            for name, noise in others.items()
            if not torch.equal(output, _run(model, view, inputs | {name: noise}, whole=whole))
        ]
    if leaking:
        raise ModalityError(
            f"The student's output depends on {leaking}, which it must not see: it changes when "
            f"these are replaced by noise; its view is {list(known)}. Look for statistics over all "
            "channels, or a view that returns more than it says."
        )


def _groups(example: Image, view: InputViews) -> dict[Any, Tensor]:
    """The example's modalities by name, or its channels by number."""
    if isinstance(example, Mapping):
        return dict(example)
    names: dict[Any, int] = dict(view.channels) if isinstance(view, PrivilegedInput) else {}
    if sum(names.values()) != example.shape[1]:
        names = dict.fromkeys(range(example.shape[1]), 1)
    return dict(zip(names, torch.split(example, list(names.values()), dim=1), strict=True))


def _run(model: nn.Module, view: InputViews, parts: Mapping[Any, Tensor], *, whole: bool) -> Tensor:
    """All floating-point outputs in one; the same random numbers each time."""
    # Dropout that is left on in eval mode must draw the same for both inputs.
    torch.manual_seed(0)
    output = model(view.for_student(torch.cat([*parts.values()], 1) if whole else parts))
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    floats = [tensor.flatten() for tensor in tensors if tensor.is_floating_point()]
    if not floats:
        raise ModalityError(
            f"assert_no_leak: the model returned {type(output).__name__} without a floating-point "
            "tensor, of which nothing can be said. Pass a module that returns its logits."
        )
    return torch.cat(floats)
