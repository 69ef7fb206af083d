"""A frozen teacher, which several wrappers may share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from privdistill.taps import uncompiled

_CLAIM = "_privdistill_claim"


class _Claim:
    """What a teacher was like before it was frozen, and how many wrappers hold it."""

    def __init__(self, teacher: nn.Module) -> None:
        self.holders = 0
        self.training = {module: module.training for module in teacher.modules()}
        self.gradients = {p: p.requires_grad for p in teacher.parameters()}

    def restore(self) -> None:
        for module, mode in self.training.items():
            module.training = mode
        for parameter, needed in self.gradients.items():
            parameter.requires_grad_(needed)

    # A copy of a teacher is held by no wrapper, so the claim does not travel with it.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class FrozenTeacher:
    """Hold a teacher in eval mode without gradients, outside the wrapper's own modules.

    It is no `nn.Module` on purpose: so the teacher is in neither `parameters()` nor
    `state_dict()`, and `train()` cannot reach it. The claim is kept on the teacher itself, so that
    the last of several wrappers restores it and no global state is needed.

    Args:
        module: The teacher.
        moves: Whether `.to()` and its kin reach the teacher; a copied wrapper shares the teacher
            and must not move it under the original.
    """

    def __init__(self, module: nn.Module, *, moves: bool = True) -> None:
        self.module = module
        self.moves = moves
        self._holding = True
        # Compiled or not, it is one network with one claim.
        inner = uncompiled(module)
        claim = inner.__dict__.get(_CLAIM) or _Claim(module)
        claim.holders += 1
        # Kept in the instance dictionary: as a module attribute it would enter named_modules().
        inner.__dict__[_CLAIM] = claim
        module.eval().requires_grad_(False)

    def __call__(self, image: Tensor) -> Any:
        """Run the teacher; the caller holds `torch.no_grad()`.

        Args:
            image: The teacher's view, `(B, C, *spatial)`.

        Returns:
            Whatever the network returns.
        """
        if any(module.training for module in self.module.modules()):
            # Someone who shares the teacher called train() on it; batch statistics must not move.
            self.module.eval()
        return self.module(image)

    def apply(self, function: Callable[[Tensor], Tensor], *, recurse: bool = True) -> None:
        """Apply what `nn.Module.to()` and its kin apply to every tensor, while it is held.

        Args:
            function: Maps a tensor to the moved or cast one.
            recurse: As in `nn.Module._apply`.
        """
        if self.moves and self._holding:
            self.module._apply(function, recurse)  # type: ignore[no-untyped-call]  # noqa: SLF001

    def release(self) -> None:
        """Give up the claim; the last one to do so restores modes and gradient flags."""
        inner = uncompiled(self.module)
        claim = inner.__dict__.get(_CLAIM)
        if not self._holding or claim is None:
            return
        self._holding = False
        claim.holders -= 1
        if claim.holders == 0:
            del inner.__dict__[_CLAIM]
            claim.restore()
