"""Networks that a module keeps out of sight of `nn.Module`, but loads with its own state."""

from typing import Any

from torch import nn


def load_apart(
    network: nn.Module, inner: str, state_dict: dict[str, Any], metadata: dict[str, Any], *rest: Any
) -> None:
    """Load a network from what `nn.Module._load_from_state_dict` is given.

    Args:
        network: The network.
        inner: Prefix of its keys.
        state_dict: Values by key; the network's are taken out, as the module does not know them.
        metadata: The module's, which says whether values are assigned or copied.
        rest: As torch passes them: strictness, then lists of missing and unexpected keys, which are
            extended, and of errors.
    """
    keys = [key for key in state_dict if key.startswith(inner)]
    own = {key.removeprefix(inner): state_dict.pop(key) for key in keys}
    assign = metadata.get("assign_to_params_buffers", False)
    loaded = network.load_state_dict(own, strict=False, assign=assign)
    _strict, missing, unexpected, _errors = rest
    missing += [inner + key for key in loaded.missing_keys]
    unexpected += [inner + key for key in loaded.unexpected_keys]
