"""What the wrapper needs to know of several processes: DistributedDataParallel and FSDP."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, distributed, nn

from privdistill.exceptions import LifecycleError


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def sharded(module: nn.Module) -> bool:
    """Whether FSDP has sharded a module."""
    return any_sharded([module])


def any_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether FSDP has sharded any of some modules."""
    # Whoever has sharded a network has imported this; nobody else should wait for the import.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in modules:
            if isinstance(module, fsdp.FSDPModule):
                return True
    return False


def like(value: Tensor, wanted: Tensor) -> Tensor:
    """Return a tensor that is sharded like another one, or whole like it."""
    # A copy made before sharding holds whole weights.
    if hasattr(value, "full_tensor") and not hasattr(wanted, "full_tensor"):
        whole: Tensor = value.full_tensor()
        return whole
    return value


def reshard(module: nn.Module) -> None:
    """Give up weights that FSDP has gathered: what is written to those is lost."""
    # The outermost alone would leave the gathered weights of inner ones.
    parts: list[Any] = [part for part in module.modules() if sharded(part)]
    for part in parts:
        part.reshard()


def check_not_sharded(student: nn.Module) -> None:
    """Refuse a student that was sharded before its wrapper was built."""
    if any_sharded(student.modules()):
        raise LifecycleError(
            "The student is sharded by FSDP already: the dry run would leave its weights gathered, "
            "and the wrapper's adapters would be left out. Build the wrapper from the plain "
            "student, then call fully_shard(kd)."
        )


def check_synchronised(student: nn.Module, others: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse to train what each process would train on its own, in silence."""
    # FSDP sets it on every module of what it manages; there is no public word.
    mark = "_is_fsdp_managed_module"
    ddp = nn.parallel.DistributedDataParallel
    if not any(isinstance(module, ddp) or hasattr(module, mark) for module in student.modules()):
        return
    apart = {
        name: None
        for name, other in others
        for module in other.modules()
        if next(module.parameters(recurse=False), None) is not None and not hasattr(module, mark)
    }
    if apart:
        raise LifecycleError(
            f"Only the student was given to DistributedDataParallel or FSDP, so the adapters or "
            f"terms {list(apart)} would differ between processes. Build the wrapper "
            "from the plain student, then call DistributedDataParallel(kd) or fully_shard(kd)."
        )


def check_gathered(wrapper: nn.Module) -> None:
    """Refuse to predict with weights of which this process has a part."""
    # Registering a method replaces it on the instance.
    if not sharded(wrapper) or "predict" in vars(wrapper) or _gathered(wrapper):
        return
    raise LifecycleError(
        "The wrapper is sharded by FSDP, which gathers weights for forward() alone. Call "
        "torch.distributed.fsdp.register_fsdp_forward_method(kd, 'predict') right after "
        "fully_shard(kd). Where processes predict at their own pace, shard the wrapper as one unit "
        "and predict between kd.unshard() and kd.reshard()."
    )


def _gathered(wrapper: nn.Module) -> bool:
    """Whether a sharded wrapper is one unit, of which this process has all weights now."""
    # Layers sharded on their own gather in their forward, for which FSDP must know the outermost.
    apart = any(sharded(part) for part in wrapper.modules() if part is not wrapper)
    # FSDP swaps the parameters: gathered they are plain tensors, else DTensors.
    return not apart and not any(hasattr(p, "full_tensor") for p in wrapper.parameters())
