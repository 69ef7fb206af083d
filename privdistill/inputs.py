"""Which modalities each network sees."""

from collections.abc import Mapping, Sequence
from typing import Protocol

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

    def for_student(self, image: Image) -> Tensor:
        """Return the image as it came."""
        return _as_tensor(image)

    def __repr__(self) -> str:
        return "both networks see the whole input"


class PrivilegedInput:
    """Give each network its modalities, by name.

    The input is one tensor whose channels are the modalities in the order of `modalities`, or a
    mapping from modality name to a `(B, 1, *spatial)` tensor. The student never touches a channel
    outside its view, so its output has no gradient with respect to the privileged ones.

    Args:
        modalities: Names of all channels, in the order in which the reader stacks them.
        student: Names the student sees, in the order its input layer expects.
        teacher: Names the teacher sees; all of `modalities` unless given.

    Raises:
        ModalityError: If a name is repeated, a view is empty, or a view names an unknown modality.

    Example:
        >>> inputs = PrivilegedInput(("flair", "t1", "t1ce", "t2"), student=("t1ce",))
        >>> image = torch.arange(4.0).reshape(1, 4, 1, 1, 1)
        >>> inputs.for_student(image).flatten()
        tensor([2.])
        >>> inputs.for_teacher(image).shape
        torch.Size([1, 4, 1, 1, 1])

    Source:
        Hu et al. 2020, arXiv:2106.09564, section 2: the teacher receives the concatenation of all
        modalities, the student one of them. Views of several modalities are a generalisation.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        student: Sequence[str],
        teacher: Sequence[str] | None = None,
    ) -> None:
        self.modalities = _names("modalities", modalities)
        self.student = _names("student", student, self.modalities)
        everything = self.modalities if teacher is None else teacher
        self.teacher = _names("teacher", everything, self.modalities)

    def for_teacher(self, image: Image) -> Tensor:
        """Return the teacher's modalities of a full input.

        Args:
            image: `(B, len(modalities), *spatial)`, or a mapping by modality name.

        Returns:
            `(B, len(teacher), *spatial)`.

        Raises:
            ModalityError: If a modality is missing or the channel count is another.
        """
        return self._view(image, self.teacher)

    def for_student(self, image: Image) -> Tensor:
        """Return the student's modalities of a full input, or of one that holds nothing else.

        Args:
            image: `(B, len(modalities), *spatial)`, the student's view alone
                `(B, len(student), *spatial)`, or a mapping by modality name.

        Returns:
            `(B, len(student), *spatial)`.

        Raises:
            ModalityError: If a modality is missing or the channel count is neither.
        """
        alone = isinstance(image, Tensor) and image.ndim > 1 and image.shape[1] == len(self.student)
        if alone and len(self.student) != len(self.modalities):
            return _as_tensor(image)
        return self._view(image, self.student)

    def _view(self, image: Image, names: tuple[str, ...]) -> Tensor:
        if isinstance(image, Mapping):
            return _stack(image, names)
        image = _as_tensor(image)
        self._check_channels(image)
        if names == self.modalities:
            return image
        return image[:, [self.modalities.index(name) for name in names]]

    def _check_channels(self, image: Tensor) -> None:
        if image.ndim < 3:
            raise ModalityError(
                f"PrivilegedInput: the input has shape {tuple(image.shape)}; "
                "expected (B, C, *spatial) with at least one spatial axis."
            )
        if image.shape[1] != len(self.modalities):
            raise ModalityError(
                f"PrivilegedInput: the input has {image.shape[1]} channels, but `modalities` names "
                f"{len(self.modalities)} {self.modalities}. Pass the names in the order in which "
                "the reader stacks them."
            )

    def __repr__(self) -> str:
        return f"teacher {', '.join(self.teacher)} | student {', '.join(self.student)}"


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
    if not isinstance(image, Mapping):
        raise ModalityError(
            f"The input is a {type(image).__name__}; expected a tensor (B, C, *spatial) or a "
            "mapping from modality name to tensor. torch.as_tensor(image) makes one."
        )
    raise ModalityError(
        f"The input is a mapping with keys {sorted(image)}, but no modality names were given. "
        "Pass `inputs=PrivilegedInput(modalities=..., student=...)` to the wrapper."
    )


def _names(
    argument: str, names: Sequence[str], known: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ModalityError(
            f"PrivilegedInput: `{argument}` is the string {names!r}; pass a tuple, ({names!r},)."
        )
    found = tuple(names)
    if not found:
        raise ModalityError(f"PrivilegedInput: `{argument}` is empty; name at least one modality.")
    if len(set(found)) != len(found):
        raise ModalityError(f"PrivilegedInput: `{argument}` repeats a name: {found}.")
    unknown = [name for name in found if known is not None and name not in known]
    if unknown:
        raise ModalityError(
            f"PrivilegedInput: `{argument}` names {unknown}, which `modalities` {known} does not "
            "hold. Use names from `modalities`."
        )
    return found


def _stack(image: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    missing = [name for name in names if name not in image]
    if missing:
        raise ModalityError(
            f"PrivilegedInput: the input has no modality {missing}; it holds {sorted(image)}, and "
            f"this network needs {names}."
        )
    parts = {name: _as_tensor(image[name]) for name in names}
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    if len(set(shapes.values())) > 1 or any(len(s) < 3 or s[1] != 1 for s in shapes.values()):
        raise ModalityError(
            f"PrivilegedInput: the modalities have shapes {shapes}; each must be (B, 1, *spatial) "
            "and all must be equal."
        )
    return torch.cat([parts[name] for name in names], dim=1)
