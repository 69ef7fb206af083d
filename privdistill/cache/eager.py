"""What must not be compiled. A module of its own, since the decorator imports torch's compiler.

That takes more than a second, so that this module is imported when a cache is first asked.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

Result = TypeVar("Result")


def _call(function: Callable[..., Result], *arguments: object) -> Result:
    return function(*arguments)


_disabled = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]


def eagerly(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function as Python runs it, where the caller is compiled too.

    Args:
        function: What to call.
        arguments: Its arguments.

    Returns:
        What it returns.
    """
    return cast("Result", _disabled(function, *arguments))
