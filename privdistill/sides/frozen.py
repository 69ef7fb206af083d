"""A network held frozen, out of sight of `nn.Module`."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from privdistill.sides.restored import modes_of, set_mode
from privdistill.taps.names import uncompiled

# Where a held network keeps its claim; a copy of one keeps None there.
CLAIM = "_privdistill_claim"


class _Claim:
    """What a network was like before it was frozen, and how many wrappers hold it."""

    def __init__(self, network: nn.Module) -> None:
        self.holders = 0
        self.training = modes_of(network)
        self.learning = [p for p in network.parameters() if p.requires_grad]

    def restore(self) -> None:
        for module, mode in self.training.items():
            module.training = mode
        for parameter in self.learning:
            # The flag of a tensor that was made in inference mode can only be set there.
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_()

    # A copy of a network is held by no wrapper, so the claim does not travel with it.
    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Resting:
    """Run a network in eval mode without gradients, whatever mode it was put into.

    Someone who shares a teacher may call `train()` on it, and batch statistics must not move.

    Args:
        network: The network, compiled or not.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.parts = list(modes_of(network))
        set_mode(network, training=False)
        for parameter in network.parameters():
            parameter.requires_grad = False

    def __call__(self, image: Tensor) -> Any:
        """Run the network at rest."""
        # Asked of each part: `train()` may have been called on any of them.
        for part in self.parts:
            if part.training:
                set_mode(self.network, training=False)
                break
        with torch.no_grad():
            return self.network(image)


class Frozen(Resting):
    """Hold a network in eval mode without gradients, until it is released.

    It is no `nn.Module` on purpose: so the network is in neither `parameters()` nor `state_dict()`,
    and `train()` cannot reach it. The claim is kept on the network itself, so that the last of
    several wrappers restores it and no global state is needed.

    Args:
        network: The network, compiled or not.
        moves: Whether `.to()` and its kin reach it; a deep copy of a wrapper shares it with the
            original, and must not move it there.
    """

    def __init__(self, network: nn.Module, *, moves: bool = True) -> None:
        # Compiled or not, it is one network with one claim.
        inner = uncompiled(network)
        claim = inner.__dict__.get(CLAIM) or _Claim(network)
        claim.holders += 1
        # Kept in the instance dictionary: as a module attribute it would enter named_modules().
        inner.__dict__[CLAIM] = claim
        super().__init__(network)
        self.moves = moves
        self.holding = True

    def apply(self, function: Callable[[Tensor], Tensor], *, recurse: bool) -> None:
        """Apply what `nn.Module.to()` and its kin apply to every tensor, while it is held."""
        if self.moves and self.holding:
            self.network._apply(function, recurse)  # type: ignore[no-untyped-call]  # noqa: SLF001

    def release(self) -> None:
        """Give up the claim; the last one to do so restores modes and gradient flags."""
        inner = uncompiled(self.network)
        claim = inner.__dict__.get(CLAIM)
        if not self.holding or claim is None:
            return
        self.holding = False
        claim.holders -= 1
        if claim.holders == 0:
            del inner.__dict__[CLAIM]
            claim.restore()

    def twin(self) -> "Frozen":
        """Hold the same network once more, for another wrapper."""
        return Frozen(self.network, moves=self.moves)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Frozen":
        """Share the network; the copy holds nothing until it gets a `twin`."""
        shared = copy.copy(self)
        shared.moves = shared.holding = False
        return shared
