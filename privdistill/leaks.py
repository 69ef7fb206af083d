"""Show that a student cannot see what it must not see."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from privdistill.exceptions import ModalityError
from privdistill.inputs import Image, InputViews, PrivilegedInput
from privdistill.sides.trial import restored


def assert_no_leak(
    model: nn.Module, view: InputViews, example: Image, *, seen: Sequence[int | str] | None = None
) -> None:
    """Check that a student's output does not depend on modalities outside its view.

    The output's gradient with respect to every other channel must be zero, and the output must
    stay the same when these channels are replaced by noise, which also finds what no gradient
    shows, such as a normalisation by detached statistics of all channels.

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
        >>> from privdistill import PrivilegedInput
        >>> inputs = PrivilegedInput(("flair", "t1ce"), student=("t1ce",))
        >>> assert_no_leak(nn.Conv2d(1, 2, 1), inputs, torch.zeros(1, 2, 4, 4))
    """
    parts = _parts(example, view)
    known = view.student if seen is None and isinstance(view, PrivilegedInput) else seen
    if known is None or not set(known) <= set(parts):
        raise ModalityError(
            f"assert_no_leak: the student's view is {known}, the example holds {list(parts)}. Pass "
            f"a full input, and for a {type(view).__name__} also seen=... with some of these."
        )
    inputs = {name: _noise(part, model) for name, part in parts.items()}
    others = {n: v if n in known else torch.randn_like(v) for n, v in inputs.items()}
    whole = isinstance(example, Tensor)
    with restored(model):
        model.eval()
        output = _run(model, view, inputs, whole=whole)
        again = _run(model, view, others, whole=whole)
    leaking = [name for name in _reached(output, inputs) if name not in known]
    if leaking or not torch.equal(output, again):
        what = leaking or [name for name in parts if name not in known]
        how = "a gradient leads to it" if leaking else "it changes when these are replaced by noise"
        raise ModalityError(
            f"The student's output depends on {what}, which it must not see ({how}); its view is "
            f"{list(known)}. Look for statistics over all channels, or a view that returns more "
            "than it says."
        )


def _parts(example: Image, view: InputViews) -> dict[Any, Tensor]:
    """The example's modalities by name, or its channels by number."""
    if isinstance(example, Mapping):
        return dict(example)
    names: dict[Any, int] = dict(view.channels) if isinstance(view, PrivilegedInput) else {}
    if sum(names.values()) != example.shape[1]:
        names = dict.fromkeys(range(example.shape[1]), 1)
    return dict(zip(names, torch.split(example, list(names.values()), dim=1), strict=True))


def _noise(part: Tensor, model: nn.Module) -> Tensor:
    """Random values of a modality's shape, in the network's precision and where it is."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(part.shape, dtype=weight.dtype, device=weight.device).requires_grad_()


def _run(model: nn.Module, view: InputViews, parts: Mapping[Any, Tensor], *, whole: bool) -> Tensor:
    """All floating-point outputs in one; the same random numbers each time."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
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


def _reached(output: Tensor, parts: Mapping[Any, Tensor]) -> list[Any]:
    """Names to which a gradient leads."""
    if not output.requires_grad:
        return []
    found = torch.autograd.grad(output.sum(), list(parts.values()), allow_unused=True)
    return [n for n, slope in zip(parts, found, strict=True) if slope is not None and slope.any()]
