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
    allowed = _allowed(view, parts, seen)
    with restored(model):
        model.eval()
        values = {name: torch.randn_like(part).requires_grad_() for name, part in parts.items()}
        output = _run(model, view, example, values)
        leaking = [name for name in _reached(output, values) if name not in allowed]
        noise = {n: v if n in allowed else torch.randn_like(v) for n, v in values.items()}
        changed = not torch.equal(output, _run(model, view, example, noise))
    if leaking or changed:
        what = leaking or [name for name in parts if name not in allowed]
        how = "a gradient leads to it" if leaking else "it changes when these are replaced by noise"
        raise ModalityError(
            f"The student's output depends on {what}, which it must not see ({how}); its view is "
            f"{sorted(allowed, key=str)}. Look for statistics over all channels, or a view that "
            "returns more than it says."
        )


def _parts(example: Image, view: InputViews) -> dict[int | str, Tensor]:
    if isinstance(example, Mapping):
        return {name: part.detach().float() for name, part in example.items()}
    names: dict[Any, int] = dict(view.channels) if isinstance(view, PrivilegedInput) else {}
    if sum(names.values()) != example.shape[1]:
        names = dict.fromkeys(range(example.shape[1]), 1)
    groups = torch.split(example.detach().float(), list(names.values()), dim=1)
    return dict(zip(names, groups, strict=True))


def _allowed(
    view: InputViews, parts: Mapping[int | str, Tensor], seen: Sequence[int | str] | None
) -> set[int | str]:
    if seen is None and isinstance(view, PrivilegedInput):
        seen = view.student
    if seen is None:
        raise ModalityError(
            f"assert_no_leak: what the student may see is not known for a {type(view).__name__}. "
            f"Pass seen=... with some of {list(parts)}."
        )
    if not set(seen) <= set(parts):
        raise ModalityError(
            f"assert_no_leak: the student's view is {sorted(seen, key=str)}, but the example "
            f"holds {list(parts)}. Pass a full input."
        )
    return set(seen)


def _run(
    model: nn.Module, view: InputViews, example: Image, values: Mapping[int | str, Tensor]
) -> Tensor:
    full = isinstance(example, Mapping)
    image = {str(k): v for k, v in values.items()} if full else torch.cat([*values.values()], 1)
    # The same random numbers each time, so that only the input differs.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.enable_grad():
            result = model(view.for_student(image))
    leaves = tree_leaves(result)
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not floats:
        raise ModalityError(
            f"assert_no_leak: the model returned {type(result).__name__} without a floating-point "
            "tensor, so that nothing can be said of what reaches it. Pass a module that returns "
            "its logits."
        )
    return torch.cat([leaf.flatten() for leaf in floats])


def _reached(output: Tensor, values: Mapping[int | str, Tensor]) -> list[int | str]:
    if not output.requires_grad:
        return []
    found = torch.autograd.grad(output.sum(), list(values.values()), allow_unused=True)
    return [n for n, slope in zip(values, found, strict=True) if slope is not None and slope.any()]
