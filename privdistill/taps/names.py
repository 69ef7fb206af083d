"""Layer names as the user knows them, whatever wraps the network."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from itertools import dropwhile
from typing import Any

import torch
from torch import fx, nn

from privdistill.exceptions import LayerNotFoundError

# torch.compile, DDP, FSDP and activation checkpointing put these into every name below them.
_WRAPPER_PARTS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module behind `torch.compile`, whose layers run without the compiler."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def is_compiled(parts: Iterable[nn.Module]) -> bool:
    """Whether any of some modules runs compiled, as a wrapper of another one or in place."""
    for part in parts:
        own = vars(part)
        if own.get("_compiled_call_impl") or "_orig_mod" in own.get("_modules", ()):
            return True
    return False


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer by the name it has in the user's own network."""
    found: dict[str, nn.Module] = {}
    paths: dict[str, str] = {}
    named = model.named_modules(remove_duplicate=False)
    # Unwrapped layers come first, so that they keep the names they have.
    for path, module in sorted(named, key=lambda item: item[0] != clean(item[0])):
        name = clean(path)
        # Of a wrapped layer the innermost module is meant; another layer of the same clean name
        # (a network kept under the attribute "module", say) keeps its full path.
        if name in found and not path.startswith(paths[name] + "."):
            name = path
        if name:
            found[name] = module
            paths[name] = path
    return found


@contextmanager
def watched(model: nn.Module, watch: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    """Put the forward hook that `watch` returns for a name and its layer on every layer."""
    with ExitStack() as stack:
        # Each module once: a shared layer has several names.
        known = {module: name for name, module in reversed(layers(model).items())}
        for module, name in known.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            stack.callback(module.register_forward_hook(watch(name, module)).remove)
        yield


def clean(path: str) -> str:
    """Remove the parts that wrappers add to a dotted name.

    Args:
        path: A name from `named_modules()`.

    Returns:
        The name as it is in the unwrapped network.

    Example:
        >>> clean("_orig_mod.encoder._checkpoint_wrapped_module.conv")
        'encoder.conv'
    """
    # A network may have a layer called "module" of its own: only leading ones are a wrapper's.
    inner = dropwhile(_WRAPPER_PARTS.__contains__, path.split("."))
    return ".".join(part for part in inner if part == "module" or part not in _WRAPPER_PARTS)


def is_program(model: nn.Module, *, parts: bool = False) -> bool:
    """Say whether a network is a torch.jit or torch.export program, whose layers run no hooks.

    With `parts` also whether it holds one of torch.jit.
    """
    inner = uncompiled(model)
    if not isinstance(inner, fx.GraphModule):
        asked = inner.modules() if parts else [inner]
        return any(isinstance(part, torch.jit.ScriptModule) for part in asked)
    # What torch.fx traced calls its layers; torch.export leaves operators, and guards as a module.
    calls = [node.target for node in inner.graph.nodes if node.op == "call_module"]
    return not any([*inner.get_submodule(str(name)).parameters()] for name in calls)


def find_layer(model: nn.Module, layer: Any, *, tap: str, role: str) -> str:
    """Return the clean name of the one layer that a name, a glob or a module fits."""
    names = find_layers(model, layer, tap=tap, role=role)
    if isinstance(layer, str) and len(names) > 1:
        raise LayerNotFoundError(
            f"Tap '{tap}': '{layer}' fits {len(names)} layers of the {role}: {_quoted(names[:8])}. "
            "Write a glob that fits one, or Tap.pairs(...) for one tap per layer."
        )
    return names[0]


def find_layers(model: nn.Module, layer: Any, *, tap: str, role: str) -> list[str]:
    """Return the names of all layers that fit, in the network's order, at least one."""
    known = layers(model)
    if isinstance(layer, str):
        exact = next((name for name in (layer, clean(layer)) if name in known), None)
        names = _fitting(layer, known) if exact is None else [exact]
        problem = f"has no layer '{layer}'.\n{closest(layer, known)}"
    elif isinstance(layer, nn.Module):
        names = [name for name, module in known.items() if module is layer]
        problem = f"has no such {type(layer).__name__}. Pass a module of its `named_modules()`."
    else:
        names, problem = [], f"is given {layer!r} as layer; expected a dotted name or a module."
    if any(isinstance(known[name], torch.jit.ScriptModule) for name in names):
        problem = f"runs '{names[0]}' as a torch.jit program, without hooks. Name a layer outside."
        names = []
    if not names:
        raise LayerNotFoundError(f"Tap '{tap}': the {role} {problem}")
    return names


def _fitting(pattern: str, known: Iterable[str]) -> list[str]:
    """Layers a glob fits; those inside another one that it fits are left out."""
    found = [name for name in known if fnmatchcase(name, pattern)]
    return [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]


def closest(name: str, known: Iterable[str]) -> str:
    """Say which layers come nearest to a name."""
    # Imported where it is needed: only a mistake waits for it.
    from difflib import get_close_matches  # noqa: PLC0415

    close = get_close_matches(name, known, n=5, cutoff=0.5)
    if close:
        return f"Closest names: {_quoted(close)}."
    return f"Its top layers are: {_quoted([item for item in known if '.' not in item])}."


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
