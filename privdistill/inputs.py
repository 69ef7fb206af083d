"""Which modalities each network sees."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from privdistill.exceptions import ModalityError

Image = Tensor | Mapping[str, Tensor]


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
    mapping from modality name to a `(B, 1, *spatial)` tensor. The student never touches a channel
    outside its view, so its output has no gradient with respect to the privileged ones.

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
        self.channels = _channel_counts(modalities)
        self.student = _names("student", student, self.modalities)
        seen = self.modalities if teacher is None else teacher
        self.teacher = _names("teacher", seen, self.modalities)
        if not 0 <= dropout < 1:
            raise ModalityError(f"PrivilegedInput: `dropout` must be in [0, 1); got {dropout}.")
        self.dropout = dropout
        self.fill = fill
        # What every step asks for.
        self._all, self._own = self._count(self.modalities), self._count(self.student)
        self._spans = {names: self._span(names) for names in (self.student, self.teacher)}

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
        if not self.dropout:
            return view
        there = None if present is None else present[:, self._indices(self.student)].to(view.device)
        return self._hide(view, self.student, self._draw(view, there))

    def _draw(self, view: Tensor, present: Tensor | None) -> Tensor:
        """Which modalities each sample keeps: `(B, M)`, drawn among the sets that are not empty."""
        every = torch.ones(view.shape[0], len(self.student), device=view.device).bool()
        # A sample that has nothing at all may draw anything: all of it is filled already.
        free = every if present is None else present | ~present.any(1, keepdim=True)
        # The first one that is kept, and those behind it one by one: no draw is ever empty.
        chance = torch.where(free, self.dropout ** (free.cumsum(1) - 1.0), 0.0)
        first = chance.multinomial(1)
        order = torch.arange(len(self.student), device=view.device)
        kept = free & (torch.rand(every.shape, device=view.device) >= self.dropout)
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

    def _count(self, names: tuple[str, ...]) -> int:
        return sum(map(self.channels.__getitem__, names))

    def _span(self, names: tuple[str, ...]) -> tuple[int, int] | None:
        """First channel and number of channels, where modalities lie side by side."""
        first = self.modalities.index(names[0])
        if names != self.modalities[first : first + len(names)]:
            return None
        return self._count(self.modalities[:first]), self._count(names)

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
        span = self._spans[names]
        if span is not None:
            # A copy, since the other network must not see what this one does to its input.
            return image.narrow(1, *span).clone()
        groups = torch.split(image, list(self.channels.values()), dim=1)
        parts = dict(zip(self.channels, groups, strict=True))
        return torch.cat([parts[name] for name in names], dim=1)

    def _stack(self, image: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
        missing = [name for name in names if name not in image]
        if missing:
            raise ModalityError(
                f"PrivilegedInput: the input has no modality {missing}; it holds "
                f"{sorted(map(str, image))}, and this network needs {names}."
            )
        parts = {name: _as_tensor(image[name]) for name in names}
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        wrong = any(len(s) < 3 or s[1] != self.channels[name] for name, s in shapes.items())
        if wrong or len({(s[0], *s[2:]) for s in shapes.values()}) > 1:
            raise ModalityError(
                f"PrivilegedInput: the modalities have shapes {shapes}; expected (B, C, *spatial) "
                f"of one size, with the channels {self.channels}."
            )
        return torch.cat([parts[name] for name in names], dim=1)

    def __repr__(self) -> str:
        listed = {n: n if c == 1 else f"{n} ({c} channels)" for n, c in self.channels.items()}
        teacher, student = (
            ", ".join(listed[name] for name in names) for names in (self.teacher, self.student)
        )
        hidden = f", each hidden with probability {self.dropout}" if self.dropout else ""
        return f"teacher {teacher} | student {student}{hidden}"


def as_views(inputs: InputViews | None) -> InputViews:
    """Return how an input is divided among the networks.

    Args:
        inputs: What the user passed, or None for the whole input for both.

    Returns:
        An object with `for_teacher` and `for_student`.

    Raises:
        ModalityError: If it lacks these methods.
    """
    if inputs is None:
        return SameInput()
    if not (hasattr(inputs, "for_teacher") and hasattr(inputs, "for_student")):
        raise ModalityError(
            f"`inputs` is {inputs!r}; expected PrivilegedInput(modalities=..., student=...) or an "
            "object with the methods for_teacher(image) and for_student(image)."
        )
    return inputs


def view_of(
    inputs: Any, kind: str, image: Image, present: Tensor | None = None, *, training: bool = False
) -> Tensor:
    """Return what one network is given.

    Args:
        inputs: How the input is divided.
        kind: "student" or "teacher".
        image: The full input.
        present: Which of the modalities each sample has.
        training: Whether some modalities are to be hidden from the student.

    Returns:
        `(B, C, *spatial)`.

    Raises:
        ModalityError: If modalities are absent of which the views know nothing.
    """
    named = isinstance(inputs, PrivilegedInput)
    if present is not None and not named:
        raise ModalityError(
            "`present` says which modalities each sample has, but the wrapper knows none. Pass "
            "`inputs=PrivilegedInput(modalities=..., student=...)` to it."
        )
    view = inputs.for_student if kind == "student" else inputs.for_teacher
    if training and named:
        view = inputs.for_training
    # Views of the user's own need know neither of masks nor of tensors with metadata.
    found: Tensor = view(image) if present is None else view(image, present)
    return found if named else plain(found)


def plain(tensor: Tensor) -> Tensor:
    """Take a tensor out of a subclass that carries metadata, such as MONAI's `MetaTensor`.

    Such a subclass slows every operation down and would come back as the loss.

    Args:
        tensor: Any tensor.

    Returns:
        The same data as a plain tensor, with its graph.
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


def _channel_counts(modalities: Iterable[str]) -> dict[str, int]:
    """Channels of each modality."""
    counts = dict(modalities) if isinstance(modalities, Mapping) else dict.fromkeys(modalities, 1)
    if any(type(count) is not int or count < 1 for count in counts.values()):
        raise ModalityError(
            f"PrivilegedInput: `modalities` gives the channel counts {counts}; each must be a "
            "whole number of at least 1."
        )
    return counts
