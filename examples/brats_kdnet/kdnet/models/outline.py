"""What a network would be made of, found out without the memory that it takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from kdnet.errors import UserError

#: MONAI's SwinUNETR reads one number for every block from such a row; it has 8 by default.
_LONGEST_ROW = 10_000


class _Rows(TorchFunctionMode):
    """Rows of numbers that a network reads while it is built are real, unless they are long."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        steps = args[2] if len(args) > 2 else given.get("steps", 0)
        if func is torch.linspace and steps <= _LONGEST_ROW:
            given.setdefault("device", "cpu")
        return func(*args, **given)


def outline(build: Callable[[], nn.Module], *, most: int) -> dict[str, tuple[int, ...]]:
    """Build a network on PyTorch's meta device, where tensors have shapes and no numbers."""
    count = 0

    def stop(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UserError(f"Building stopped after {most:,} parameters.")

    handle = register_module_parameter_registration_hook(stop)
    try:
        with torch.device("meta"), _Rows():
            state = build().state_dict()
    finally:
        handle.remove()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
