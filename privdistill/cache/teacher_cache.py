"""`TeacherCache`: a frozen teacher runs once per sample and augmentation."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from privdistill.cache.fingerprint import digest, hashed
from privdistill.cache.stores import CacheStore, DiskStore, Entry, MemoryStore
from privdistill.exceptions import CacheError

_TOLERANCE = 1e-4  # share of the norm by which digests may differ through rounding
_AGREEMENT = 0.02  # share of the largest output by which a teacher may differ from itself
_EVERY = 500  # served batches between two comparisons with the teacher itself
_INPUT = "input"  # the name in an entry of the digest of what the teacher saw


@dataclass
class Statistics:
    """What a cache has done in this process.

    Attributes:
        hits: Samples that were served.
        misses: Samples for which the teacher ran.
        stored: Entries written.
        skipped: Entries for which there was no room, or which could not be written.
        bytes: Size of all entries, for a folder those of other runs too.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    skipped: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.0f} MiB" if self.bytes >= 2**20 else f"{self.bytes} bytes"
        rest = f", {self.skipped} not stored" * bool(self.skipped)
        return f"{self.hits} hits, {self.misses} misses{rest}, {size}"


@dataclass(eq=False)
class TeacherCache:
    """Keep what frozen teachers return, by a key that names the sample and its augmentation.

    `kd(image, target, key=["case12/flip5", ...])`, one key per sample; without keys nothing is
    cached. If any sample of a batch is missing, the teacher runs on the whole batch, so that with
    `storage="full"` a training with the cache gives the very weights of one without. Entries belong
    to one state of one teacher, its view, its taps and its precision; what another one left in the
    same folder is not served. What weights and class names do not show (an option, a forward that
    depends on the batch, on chance or on something outside) is found by comparing with the teacher
    itself: it runs for the first batch that is served, and for every 500th. Each entry remembers
    what its teacher saw, so that an augmentation that the key does not name is an error.

    Args:
        folder: Where entries are kept, for later runs and for other processes; None keeps them in
            this process's memory.
        store: A place of your own instead: any object with the methods of `CacheStore`.
        version: A name for what the teacher's weights and class names do not show, such as
            "teacher-v3" after a change of its forward or its preprocessing. Entries of another
            version are not served.
        storage: "full" keeps every bit, "half" float16; a class may change where two logits were
            closer than its rounding.
        max_bytes: Limit for all entries; for a folder, of all teachers and processes, and held
            approximately, as processes look at each other's files now and then. When it is reached,
            entries of other teachers are removed, the oldest first; those written within six hours
            stay, as another run may use them. Then nothing new is stored: a sample comes back once
            an epoch, so that the entry that was not used for longest, which caches usually remove,
            is the one that is needed next. With or without a limit, entries of other teachers go
            from a folder after two weeks.

    Raises:
        CacheError: If the folder cannot be made, a store lacks a method, or an option has no
            meaning.

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

    folder: str | PathLike[str] | None = None
    _: KW_ONLY
    store: CacheStore | None = None
    version: str = ""
    storage: Literal["full", "half"] = "full"
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.storage not in ("full", "half"):
            raise CacheError(f"TeacherCache: `storage` is {self.storage!r}; give 'full' or 'half'.")
        self._store: CacheStore = MemoryStore(self.max_bytes)
        if self.store is not None:
            alone = self.folder is None and self.max_bytes is None
            made = isinstance(self.store, CacheStore) and not isinstance(self.store, type)
            if not (alone and made):
                raise CacheError(
                    f"TeacherCache: `store` is a {type(self.store).__name__}; expected an object "
                    "with `get`, `put` and `bytes`, and neither `folder` nor `max_bytes` beside it."
                )
            self._store = self.store
        elif self.folder is not None:
            self._store = DiskStore(Path(self.folder), self.max_bytes)
        self._statistics = Statistics()
        self._served: Counter[str] = Counter()

    @property
    def statistics(self) -> Statistics:
        """Hits, misses and bytes so far."""
        self._statistics.bytes = self._store.bytes
        return self._statistics

    def fetch(
        self, teacher: str, keys: Sequence[str], view: Tensor, run: Callable[[], Entry]
    ) -> Entry:
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
        teacher = hashed([teacher, self.version, self.storage])
        names = [_name(key, view) for key in keys]
        digests = list(digest(view)[:, None])
        entries = [self._store.get(teacher, name) for name in names]
        found = [entry for entry in entries if entry is not None]
        for key, entry, own in zip(keys, entries, digests, strict=True):
            if entry is not None:
                _check_input(key, entry, own, self.store)
        # An empty batch was never seen, and has nothing to be put together from.
        if found and len(found) == len(keys):
            self._statistics.hits += len(keys)
            parts = {name: [entry[name] for entry in found] for name in found[0] if name != _INPUT}
            served = {name: self._joined(values, view.device) for name, values in parts.items()}
            # What changes a teacher need not show in its weights.
            if self._served[teacher] % _EVERY == 0:
                now = {name: self._narrowed(value) for name, value in run().items()}
                _check_agreement(served, now)
            self._served[teacher] += 1
            return served
        self._statistics.misses += len(keys)
        outputs = run()
        for index, entry in enumerate(entries):
            if entry is None:
                sample = {name: self._kept(value, index) for name, value in outputs.items()}
                stored = self._store.put(teacher, names[index], {_INPUT: digests[index]} | sample)
                # A store that refuses nothing may well return nothing.
                self._statistics.skipped += stored is False
                self._statistics.stored += stored is not False
        return outputs

    def _kept(self, value: Tensor, index: int) -> Tensor:
        # A copy: a slice would keep the whole batch, and the user may change its numbers.
        return self._narrowed(value[index : index + 1].detach().to("cpu", copy=True))

    def _narrowed(self, value: Tensor) -> Tensor:
        wide = value.dtype in (torch.float32, torch.float64)
        return value.clamp(-65504, 65504).half() if wide and self.storage == "half" else value

    def _joined(self, parts: list[Tensor], device: torch.device) -> Tensor:
        # cat, unlike stack, keeps channels-last samples channels-last.
        value = torch.cat(parts).to(device, non_blocking=True)
        return value.float() if self.storage == "half" and value.dtype == torch.float16 else value

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        """A copied wrapper shares the cache as it shares the teacher."""
        return self


def check_keys(keys: Sequence[str], batch: int) -> None:
    """Refuse keys that do not name the samples of a batch.

    Args:
        keys: What the user passed.
        batch: Number of samples.

    Raises:
        CacheError: If there is not one text per sample.
    """
    listed = list(keys) if isinstance(keys, Iterable) and not isinstance(keys, str) else []
    if len(listed) != batch or not all(isinstance(key, str) and key for key in listed):
        raise CacheError(
            f"TeacherCache: `key` is {keys!r} for a batch of {batch}; pass one text per sample "
            "that names it and its augmentation, e.g. ['case12/flip5', 'case40/flip0']."
        )


def _name(key: str, view: Tensor) -> str:
    """An entry's name: keys may hold anything and must not become paths."""
    kind = view.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return hashed([key, view.dtype, autocast, *view.shape[1:]])


def _check_input(key: str, entry: Any, own: Tensor, store: CacheStore | None) -> None:
    # A store of the user's own may give back anything.
    whole = isinstance(entry, Mapping) and all(isinstance(v, Tensor) for v in entry.values())
    kept = entry.get(_INPUT, own + torch.inf) if whole else own + torch.inf
    apart = float((kept - own).abs().max() / own[0, 0].clamp_min(1e-12))
    if apart > _TOLERANCE:
        raise CacheError(
            f"TeacherCache: the key {key!r} came back with another input. Name every augmentation "
            "in the key, e.g. 'case12/flip5', pass no key for one that never repeats, and another "
            "`version` where images were prepared anew."
            + f" Or does the store, {store!r}, not give back what it was given?"
            * (store is not None)
        )


def _check_agreement(served: Entry, now: Entry) -> None:
    for name, new in now.items():
        old = served.get(name, torch.zeros(()))
        # Logits may be infinite, and are then no distance apart.
        limit = _AGREEMENT * float(new.float().nan_to_num(0.0, 0.0, 0.0).abs().max()) + 1e-8
        if old.shape != new.shape or not torch.allclose(old.float(), new.float(), 0.0, limit):
            raise CacheError(
                f"TeacherCache: the teacher's {name} is no longer what was kept of it, though its "
                "weights and classes are the same. Pass another `version` if its code or an option "
                "has changed; train without a cache if it depends on the batch or on chance."
            )
