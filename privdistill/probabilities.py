"""Tell a network that gives probabilities from one that gives logits, which every loss reads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from privdistill.exceptions import ObjectiveError

_SQUASHING = ("sigmoid", "hardsigmoid", "softmax", "_softmax", "_safe_softmax")


def check_logits(
    heads: Sequence[Tensor], run: Callable[[Tensor], list[Tensor]], image: Tensor, role: str
) -> None:
    """Refuse a network that ends in a sigmoid or softmax.

    Logits may lie in [0, 1] by chance, so where those of the example do, the network runs again
    on large random values. It gives probabilities if it stays in [0, 1] and, besides, comes out
    of a sigmoid or softmax, sums to one over channels, or reaches from 0 to 1.

    Args:
        heads: What the network gave for the example.
        run: Runs it again and returns its heads.
        image: Its view of the example.
        role: What messages call the network.

    Raises:
        ObjectiveError: If any head holds probabilities.
    """
    if not any(map(_in_unit_interval, heads)):
        return
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    with _SquashedOutputs() as squashed:
        again = run(100 * noise.to(image))
    inside = filter(_in_unit_interval, again)
    if any(squashed.holds(head) or _looks_squashed(head) for head in inside):
        raise ObjectiveError(
            f"The {role} returns probabilities: for large random inputs of shape "
            f"{tuple(image.shape)}, too, every value lies in [0, 1]. Losses read logits, and would "
            "take every voxel for foreground. Leave its last sigmoid or softmax out, for instance "
            "by network.activation = nn.Identity(), or undo it by a hook, network."
            "register_forward_hook(lambda *call: call[-1].logit(eps=1e-6)), for a softmax "
            "call[-1].clamp_min(1e-6).log(). If both networks end so, "
            "select_logits=lambda output: output.logit(eps=1e-6) does the same."
        )


def _in_unit_interval(head: Tensor) -> bool:
    return not head.is_meta and bool(((head >= 0) & (head <= 1)).all())


def _looks_squashed(head: Tensor) -> bool:
    """Whether values in [0, 1] reach from end to end, or sum to one without being constant."""
    least, most, total = head.min(), head.max(), head.float().sum(1)
    one = head.shape[1] > 1 and bool(((total - 1).abs() < 0.02).all())
    return bool(least < most) and (one or bool((least < 0.01) & (most > 0.99)))


class _SquashedOutputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mark tensors that a sigmoid or softmax gave and that were only resampled or joined since."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._squashed = WeakIdKeyDictionary()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is marked."""
        return tensor in self._squashed and bool(self._squashed[tensor])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A weight or another map among the inputs makes it features; a logarithm, logits again.
        keeps = bool(inputs) and all(map(self.holds, inputs))
        marks = name in _SQUASHING or (keeps and not name.startswith("log"))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._squashed[leaf] = marks
        return result
