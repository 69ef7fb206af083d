"""`TeacherCache`: a frozen teacher runs once per sample and augmentation."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from privdistill.cache.entries import Entry, Storage, decode, digest, distance, encode, join
from privdistill.cache.stores import DiskStore, MemoryStore
from privdistill.exceptions import CacheError
from privdistill.losses.options import is_number

_TOLERANCE = 1e-4  # share of the norm by which digests may differ through rounding
_AGREEMENT = 0.02  # share of the largest output by which a teacher may differ from itself
_EVERY = 500  # served batches between two comparisons with the teacher itself
_FORMAT = "2"

Outputs = Mapping[str, Tensor]


@dataclass
class Statistics:
    """What a cache has done in this process.

    Attributes:
        hits: Samples that were served.
        misses: Samples for which the teacher ran.
        stored: Entries written.
        skipped: Entries for which there was no room, or which could not be written.
        bytes: Size of all entries, for a folder those of other runs too.
        max_error: Largest difference between an output and what was kept of it.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    skipped: int = 0
    bytes: int = 0
    max_error: float = 0.0

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.0f} MiB" if self.bytes >= 2**20 else f"{self.bytes} bytes"
        rest = f", {self.skipped} not stored" * bool(self.skipped)
        return f"{self.hits} hits, {self.misses} misses{rest}, {size}"


class TeacherCache:
    """Keep what frozen teachers return, by a key that names the sample and its augmentation.

    `kd(image, target, key=["case12/flip5", ...])`, one key per sample; without keys nothing is
    cached. If any sample of a batch is missing, the teacher runs on the whole batch, so that with
    `storage="full"` a training with the cache gives the very weights of one without. Entries belong
    to one state of one teacher, its view, its taps and its precision; what another one left in the
    same folder is not served. What weights and code do not show (a forward that depends on the
    batch, on chance or on something outside) is found by comparing with the teacher itself: it runs
    for the first batch that is served, and for every 500th. Each entry remembers what its teacher
    saw, so that an augmentation that the key does not name is an error.

    Args:
        folder: Where entries are kept, for later runs and for other processes; None keeps them in
            this process's memory.
        storage: "full" keeps every bit, "half" float16, "8bit" 256 levels per channel. The largest
            error met is in `statistics`; a class may change where two logits were closer than that.
        max_bytes: Limit for all entries; for a folder, of all teachers and processes, and held
            approximately, as processes look at each other's files now and then. When it is reached,
            entries of other teachers are removed, the oldest first; those of a teacher that wrote
            within six hours stay, as another run may use them. Then nothing new is stored: a sample
            comes back once an epoch, so that the entry that was not used for longest, which caches
            usually remove, is the one that is needed next.
        share_flips: Keep one entry per sample for all axis flips: of a key that ends in "/flip5"
            the number is read as bits, bit i for spatial axis i, and the kept output is flipped
            alike. A teacher does not quite do that: an approximation that terms on logits bear and
            terms on features do not (docs/how-to/teacher-cache.md has the numbers).

    Raises:
        CacheError: If the folder cannot be made, or an option has no meaning.

    Example:
        >>> from torch import nn
        >>> from privdistill import DistillationWrapper, SoftTargetDiceBCE
        >>> kd = DistillationWrapper(
        ...     nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), objective=SoftTargetDiceBCE(),
        ...     cache=TeacherCache())
        >>> image = torch.rand(2, 1, 4, 4)
        >>> for epoch in range(3):
        ...     out = kd(image, key=["case1", "case2"])
        >>> kd.cache.statistics.hits, kd.cache.statistics.misses
        (4, 2)
    """

    def __init__(
        self,
        folder: str | PathLike[str] | None = None,
        *,
        storage: Storage = "full",
        max_bytes: int | None = None,
        share_flips: bool = False,
    ) -> None:
        if storage not in ("full", "half", "8bit"):
            raise CacheError(
                f"TeacherCache: `storage` must be 'full', 'half' or '8bit'; got {storage!r}."
            )
        if max_bytes is not None and not (is_number(max_bytes) and max_bytes > 0):
            raise CacheError(f"TeacherCache: `max_bytes` must be positive; got {max_bytes!r}.")
        self.folder = None if folder is None else Path(folder)
        self.storage: Storage = storage
        self.max_bytes = max_bytes
        self.share_flips = share_flips
        self._statistics = Statistics()
        self._served: dict[str, int] = {}
        self._store = self._opened()

    def _opened(self) -> MemoryStore | DiskStore:
        if self.folder is None:
            return MemoryStore(self.max_bytes)
        return DiskStore(self.folder, self.max_bytes)

    @property
    def statistics(self) -> Statistics:
        """Hits, misses and bytes so far."""
        self._statistics.bytes = self._store.bytes
        return self._statistics

    def fetch(
        self, teacher: str, keys: Sequence[str], view: Tensor, run: Callable[[], Outputs]
    ) -> Outputs:
        """Return the teacher's outputs for a batch, from the cache or by running it.

        Args:
            teacher: The teacher's fingerprint.
            keys: One per sample.
            view: The teacher's view, `(B, C, *spatial)`.
            run: Runs the teacher on the whole batch.

        Returns:
            Outputs by name, `(B, ...)`.

        Raises:
            CacheError: If there is not one key per sample, or a key comes back with another input.
        """
        check_keys(keys, len(view))
        axes = view.ndim - 2
        codes = [_flip_code(key, axes) if self.share_flips else 0 for key in keys]
        names = [self._name(key, view) for key in keys]
        digests = digest(mirror_each(view, codes, axes))
        _check_repeated(keys, digests)
        entries = [self._store.get(teacher, name) for name in names]
        for key, entry, own in zip(keys, entries, samples(digests), strict=True):
            if entry is not None:
                _check_input(key, entry, own)
        found = [entry for entry in entries if entry is not None]
        if len(found) == len(keys):
            self._statistics.hits += len(keys)
            batch = join(found, view.device, self.storage)
            served = {name: mirror_each(value, codes, axes) for name, value in batch.items()}
            self._check_now_and_then(teacher, served, run)
            return served
        self._statistics.misses += len(keys)
        outputs = run()
        if self.share_flips:
            _check_maps(outputs, axes)
        for index, entry in enumerate(entries):
            if entry is None:
                sample = {name: value[index : index + 1] for name, value in outputs.items()}
                kept = {name: mirror(value, codes[index], axes) for name, value in sample.items()}
                self._keep(teacher, names[index], digests[index : index + 1], kept)
        return outputs

    def _check_now_and_then(
        self, teacher: str, served: Outputs, run: Callable[[], Outputs]
    ) -> None:
        """Compare with the teacher itself: what changes it need not show in weights or code."""
        count = self._served.get(teacher, 0)
        self._served[teacher] = count + 1
        # Flipped outputs are not the teacher's, and the user knows.
        if count % _EVERY == 0 and not self.share_flips:
            _check_agreement(served, run())

    def _keep(self, teacher: str, name: str, own: Tensor, sample: Outputs) -> None:
        parts = {key: encode(value, self.storage) for key, value in sample.items()}
        if self.storage != "full":
            errors = [
                float((value.cpu().double() - decode(parts[key], self.storage)).abs().max())
                for key, value in sample.items()
            ]
            self._statistics.max_error = max(self._statistics.max_error, *errors)
        if self._store.put(teacher, name, Entry(own.clone(), parts)):
            self._statistics.stored += 1
        else:
            self._statistics.skipped += 1

    def _name(self, key: str, view: Tensor) -> str:
        """The file's name: keys may hold anything and must not become paths."""
        kind = view.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        sample = key.rpartition("/flip")[0] or key if self.share_flips else key
        parts = (_FORMAT, sample, str(view.dtype), str(autocast), self.storage)
        text = repr((*parts, self.share_flips, tuple(view.shape[1:])))
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        """A copied wrapper shares the cache as it shares the teacher."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_store"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._store = self._opened()

    def __repr__(self) -> str:
        parts = [] if self.folder is None else [repr(str(self.folder))]
        parts += [f"storage={self.storage!r}"] * (self.storage != "full")
        parts += [f"max_bytes={self.max_bytes}"] * (self.max_bytes is not None)
        parts += ["share_flips=True"] * self.share_flips
        return f"TeacherCache({', '.join(parts)})"


def mirror(values: Tensor, code: int, axes: int) -> Tensor:
    """Flip images along spatial axes.

    Args:
        values: `(B, C, *spatial)`.
        code: Bit i flips spatial axis i.
        axes: Number of spatial axes.

    Returns:
        The same shape; the values themselves for code 0.
    """
    flipped = [values.ndim - axes + axis for axis in range(axes) if code >> axis & 1]
    return values.flip(flipped) if flipped else values


def mirror_each(values: Tensor, codes: Sequence[int], axes: int) -> Tensor:
    """Flip each sample of a batch by a code of its own.

    Args:
        values: `(B, C, *spatial)`.
        codes: One per sample.
        axes: Number of spatial axes.

    Returns:
        The same shape; the values themselves where nothing is flipped.
    """
    if not any(codes):
        return values
    pairs = zip(samples(values), codes, strict=True)
    return torch.cat([mirror(sample, code, axes) for sample, code in pairs])


def samples(batch: Tensor) -> list[Tensor]:
    """Take a batch apart.

    Args:
        batch: `(B, ...)`.

    Returns:
        B tensors `(1, ...)`.
    """
    return [batch[index : index + 1] for index in range(len(batch))]


def check_keys(keys: Sequence[str], batch: int) -> None:
    """Refuse keys that do not name the samples of a batch.

    Args:
        keys: What the user passed.
        batch: Number of samples.

    Raises:
        CacheError: If there is not one text per sample.
    """
    listed = list(keys) if isinstance(keys, Iterable) and not isinstance(keys, str) else []
    if (
        not listed
        or len(listed) != batch
        or not all(isinstance(key, str) and key for key in listed)
    ):
        raise CacheError(
            f"TeacherCache: `key` is {keys!r} for a batch of {batch}; pass one text per sample "
            "that names it and its augmentation, e.g. ['case12/flip5', 'case40/flip0']."
        )


def _check_input(key: str, entry: Entry, own: Tensor) -> None:
    apart = distance(entry.digest, own)
    if apart > _TOLERANCE:
        raise CacheError(
            f"TeacherCache: the key {key!r} came back with another input (its digest differs by "
            f"{apart:.2g} of its largest value, and rounding by less than {_TOLERANCE:g}). Name "
            "every augmentation in the key, e.g. 'case12/flip5', and pass no key for one that "
            "never repeats. If the images were prepared anew, use another folder."
        )


def _check_repeated(keys: Sequence[str], digests: Tensor) -> None:
    first: dict[str, Tensor] = {}
    for key, own in zip(keys, samples(digests), strict=True):
        if distance(first.setdefault(key, own), own) > _TOLERANCE:
            raise CacheError(
                f"TeacherCache: the key {key!r} names two different images of one batch. Name "
                "every sample and augmentation in its key, e.g. 'case12/flip5'."
            )


def _check_agreement(served: Outputs, now: Outputs) -> None:
    for name, value in now.items():
        kept = served.get(name, torch.zeros(()))
        apart = (kept.float() - value.float()).abs().max() if kept.shape == value.shape else 1e9
        if not float(apart) <= _AGREEMENT * max(float(value.float().abs().max()), 1e-6):
            raise CacheError(
                f"TeacherCache: the teacher's {name} is no longer what was kept of it (they differ "
                f"by {float(apart):.3g}), though its weights, layers and code are the same. Does "
                "its forward depend on other samples of the batch, on chance, or on something "
                "outside of it? Then train without a cache; otherwise use another folder."
            )


def _flip_code(key: str, axes: int) -> int:
    _, found, code = key.rpartition("/flip")
    if not found:
        return 0
    if not code.isdecimal() or int(code) >= 2**axes:
        raise CacheError(
            f"TeacherCache: the key {key!r} ends in no flip of {axes} spatial axes; expected "
            f"'/flip0' to '/flip{2**axes - 1}', bit i for axis i. Or pass share_flips=False."
        )
    return int(code)


def _check_maps(outputs: Outputs, axes: int) -> None:
    wrong = {name: tuple(value.shape) for name, value in outputs.items() if value.ndim != axes + 2}
    if wrong:
        raise CacheError(
            f"TeacherCache: share_flips=True flips what is kept, but {wrong} have not {axes} "
            "spatial axes. Pass share_flips=False."
        )
