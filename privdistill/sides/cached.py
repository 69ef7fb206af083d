"""A cache before a teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privdistill import parallel
from privdistill.cache import TeacherCache
from privdistill.cache.fingerprint import Fingerprint
from privdistill.exceptions import CacheError, LifecycleError
from privdistill.inputs import PrivilegedInput
from privdistill.losses.objective import Objective
from privdistill.sides.side import Answer, Side, TeacherSide
from privdistill.sides.teachers import JointTeacher, MovingAverage


class CachedSide:
    """Serves what a teacher answered before; `asked` is what decides that besides its weights."""

    def __init__(self, side: TeacherSide, cache: TeacherCache, asked: str) -> None:
        self._side = side
        self._cache = cache
        self._asked = asked
        self._fingerprint: Fingerprint | None = None
        # Files, digests and locks are nothing to compile.
        self._eagerly = torch.compiler.disable(self._fetch)  # type: ignore[no-untyped-call]

    def __call__(self, view: Tensor, key: Sequence[str]) -> Answer:
        """Return the answer for the samples that the texts name, or run the teacher."""
        answer: Answer = self._eagerly(view, key)
        return answer

    def _fetch(self, view: Tensor, key: Sequence[str]) -> Answer:
        # Not before the first step: weights may still be loaded after the wrapper was built.
        if self._fingerprint is None:
            networks = [member.network for member in self._side.members]
            self._fingerprint = Fingerprint(networks)
            absent = any(p.is_meta for network in networks for p in network.parameters())
            if absent and not self._cache.version:
                raise CacheError(
                    "TeacherCache: weights on the meta device, as of an offloaded teacher, tell it "
                    "from no other. Name it: TeacherCache(version='teacher-v3'), each by its own."
                )
        teacher = self._fingerprint.current(self._asked)
        return _parted(self._cache.fetch(teacher, key, view, lambda: _named(self._side(view))))


def asked_of(inputs: Any, teachers: Sequence[Side], objective: Objective, select: Any) -> str:
    """Return what else than its weights decides a teacher's outputs, the same in every process."""
    # Another order of modalities is another input for the same weights.
    seen = inputs.teacher if isinstance(inputs, PrivilegedInput) else type(inputs).__qualname__
    places = [(side.role, tap, str(p)) for side in teachers for tap, p in side.places.items()]
    own = getattr(select, "args", ())
    chosen = [*own, *(layer.select for side in teachers for layer in side.places.values())]
    # An address in a function's name would be another one in each process.
    names = [getattr(function, "__qualname__", type(function).__qualname__) for function in chosen]
    return repr((seen, places, objective.needs_teacher_logits, objective.taps, names))


def check_cache(
    cache: TeacherCache | None, teacher: object, networks: Sequence[nn.Module]
) -> TeacherCache | None:
    """Refuse to keep the outputs of a teacher that changes, or of which a process has a part."""
    if cache is None:
        return None
    if not isinstance(cache, TeacherCache):
        raise LifecycleError(
            f"`cache` is {cache!r}; expected a TeacherCache, such as TeacherCache('runs/teacher')."
        )
    if isinstance(teacher, MovingAverage | JointTeacher):
        raise LifecycleError(
            f"A {type(teacher).__name__} changes in every step, so its outputs cannot be kept. "
            "Leave `cache` out, or pass a frozen teacher."
        )
    if any(parallel.any_sharded(network.modules()) for network in networks):
        raise LifecycleError(
            "The teacher is sharded by FSDP: where one process finds a sample and another does "
            "not, both would wait for each other for ever. Leave `cache` out, or pass the teacher "
            "unsharded; with a cache it hardly runs."
        )
    return cache


def _named(answer: Answer) -> dict[str, Tensor]:
    named = {f"logits.{i}.{j}": h for i, own in enumerate(answer.heads) for j, h in enumerate(own)}
    return named | {f"tap.{tap}": value for tap, value in answer.features.items()}


def _parted(outputs: Mapping[str, Tensor]) -> Answer:
    """The inverse of `_named`."""
    answer = Answer([], {})
    for name, value in outputs.items():
        kind, _, rest = name.partition(".")
        if kind == "tap":
            answer.features[rest] = value
            continue
        index = int(rest.split(".")[0])
        # Heads come back in the order in which they were named.
        answer.heads.extend([[]] * (index == len(answer.heads)))
        answer.heads[index].append(value)
    return answer
