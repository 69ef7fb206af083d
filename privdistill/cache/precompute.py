"""Fill a cache before training."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from privdistill.cache.teacher_cache import Statistics, TeacherCache, check_keys
from privdistill.exceptions import CacheError
from privdistill.inputs import Image


class HasTeacher(Protocol):
    """What `precompute` asks of a wrapper."""

    @property
    def cache(self) -> TeacherCache | None:
        """Where outputs are kept."""

    def teacher_outputs(self, image: Image, *, key: Sequence[str] | None = None) -> Any:
        """Run the teacher, or serve what it returned before."""


@torch.no_grad()
def precompute(
    kd: HasTeacher, batches: Iterable[tuple[Image, Sequence[str]]], *, flips: bool = False
) -> Statistics:
    """Run the teacher of a wrapper on every sample, so that training finds all of it cached.

    Batches of the size used in training give the very numbers of training; what is there already
    is not run again, so that a call that was stopped goes on where it was. Call it under the
    autocast of the training. Several processes may each take a part, into one folder.

    Args:
        kd: A wrapper with a cache.
        batches: Pairs of a full input and one key per sample; `tqdm(batches)` shows how far it is.
        flips: Whether each batch is run under every combination of axis flips, eight in 3-D; keys
            then end in "/flip0" to "/flip7", bit i for spatial axis i.

    Returns:
        Hits, misses and bytes of the cache.

    Raises:
        CacheError: If the wrapper has no cache, or keys do not fit.

    Example:
        >>> from torch import nn
        >>> from privdistill import DistillationWrapper, SoftTargetDiceBCE
        >>> kd = DistillationWrapper(
        ...     nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), objective=SoftTargetDiceBCE(),
        ...     cache=TeacherCache())
        >>> batches = [(torch.rand(2, 1, 4, 4), ["case1", "case2"])]
        >>> precompute(kd, batches, flips=True).stored
        8
    """
    if kd.cache is None:
        raise CacheError("precompute: the wrapper has no cache; build it with cache=TeacherCache()")
    for image, keys in batches:
        first = image if isinstance(image, Tensor) else next(iter(image.values()))
        check_keys(keys, len(first))
        for code in range(2 ** (first.ndim - 2) if flips else 1):
            axes = [axis for axis in range(2, first.ndim) if code >> (axis - 2) & 1]
            names = [f"{key}/flip{code}" for key in keys] if flips else keys
            kd.teacher_outputs(_flipped(image, axes), key=names)
    return kd.cache.statistics


def _flipped(image: Image, axes: list[int]) -> Image:
    if isinstance(image, Tensor):
        return image.flip(axes)
    return {name: part.flip(axes) for name, part in image.items()}
