"""Subjects preprocessed once into a cache on disk, and batches in a reproducible order.

`FlippedDataset` is the place where samples change from epoch to epoch: what augmentation does is
decided by the code that `EpochSampler` draws, so that a continued run and a teacher cache see it.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar, cast

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdnet.data.augmentation import augment
from kdnet.data.preprocessing import Preprocessing, Sample
from kdnet.data.subjects import Subject, file_states
from kdnet.errors import UserError, explained
from kdnet.files import first_line, remove_abandoned, write_tensors, written

#: One bit per spatial axis: 0 leaves the volume alone, 7 flips all three axes.
FLIP_CODES = 8
#: Numbers from which the position of a patch is drawn lie below it.
_DRAWS = 2**62
#: Seconds; a batch of whole volumes from a slow network drive takes a minute.
PATIENCE = 600.0
Item = TypeVar("Item")
Result = TypeVar("Result")


class Batch(TypedDict):
    """Samples: image (B, M, *spatial) float32, label (B, 1, *spatial) int64, names, keys."""

    image: Tensor
    label: NotRequired[Tensor]
    labelled: NotRequired[Tensor]
    name: list[str]
    key: NotRequired[list[str]]


def prepare(
    subjects: Sequence[Subject],
    preprocessing: Preprocessing,
    cache_dir: Path,
    workers: int,
    *,
    progress: bool = True,
) -> "PreparedSubjects":
    """Preprocess every subject once and keep the result on disk."""
    folder = Path(cache_dir) / preprocessing.fingerprint()[:16]
    prepared = PreparedSubjects(list(subjects), preprocessing, folder)
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    # In an order of its own, so that runs that share an empty cache share the work.
    order = random.SystemRandom().sample(subjects, len(subjects))
    map_parallel(
        prepared.fill, order, workers=workers, title="Preparing subjects", progress=progress
    )
    return prepared


def map_parallel(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    title: str,
    progress: bool = True,
) -> list[Result]:
    """Apply a function to every item with threads, behind one progress bar."""

    def named(item: Item) -> Result:
        with explained(f"{title}: {getattr(item, 'name', item)}"):
            return function(item)

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(named, item) for item in items]
        shown = track(futures, title, console=Console(stderr=True), disable=not progress)
        try:
            return [future.result() for future in shown]
        finally:
            for future in futures:
                future.cancel()


@dataclass(eq=False)
class PreparedSubjects(Dataset[Sample]):
    """Preprocessed subjects, each in a file of its own."""

    data: list[Subject]
    preprocessing: Preprocessing
    folder: Path

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        sample = {**self.read(index), "name": self.data[index].name}
        return cast("Sample", sample)

    def file(self, subject: Subject) -> Path:
        """Return where a subject lies in the present state of its files."""
        files = {r: (str(f.path.resolve()), f.channel) for r, f in subject.files.items()}
        state = repr((files, file_states([subject])))
        digest = hashlib.sha256(state.encode()).hexdigest()
        return self.folder / f"{subject.name}-{digest[:24]}.safetensors"

    def fill(self, subject: Subject) -> None:
        """Write the file of a subject, if there is none that is complete."""
        file = self.file(subject)
        try:
            # Its header is compared with the size of the file.
            with safe_open(file, framework="pt"):
                return
        except (SafetensorError, OSError):
            sample = self.preprocessing(subject)
        write_tensors(file, {key: t for key, t in sample.items() if isinstance(t, Tensor)})

    def read(self, index: int, *names: str) -> dict[str, Tensor]:
        """Read what a subject's file holds, or some of it; from a file that was removed, anew."""
        file = self.file(self.data[index])
        if not file.is_file():
            self.fill(self.data[index])
        try:
            # Mapped: of a volume that is cut, only the part is read from the disk.
            with safe_open(file, framework="pt") as content:
                return {name: content.get_tensor(name) for name in names or content.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is damaged ({first_line(error)}). Remove it; the subject is then "
                "preprocessed again."
            ) from error

    def typical(self, name: Literal["nonzero", "spacing"]) -> tuple[float, ...]:
        """Median over the subjects of what their files are like; empty if there are none."""
        if not self.data:
            return ()
        values = torch.stack([self.read(index, name)[name] for index in range(len(self))])
        return tuple(values.median(dim=0).values.tolist())


def build_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    *,
    workers: int,
    seed: int,
    mixed: bool = False,
    augmented: bool = False,
    moves: bool = False,
    **order: Any,
) -> DataLoader[Any]:
    """Batches whose order and flips, as `EpochSampler` takes them, follow from seed and epoch."""
    return DataLoader(
        FlippedDataset(dataset, mixed=mixed, moves=moves, augmented=augmented),
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), seed=seed, **order),  # type: ignore[arg-type]
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=PATIENCE if workers else 0,
        # A loader draws a number whenever it begins, which would make a run that goes on another.
        generator=torch.Generator().manual_seed(seed),
        pin_memory=torch.cuda.is_available(),
    )


def start_epoch(loader: DataLoader[Any], epoch: int, *, done: int = 0) -> None:
    """Choose the order and the flips of the coming epoch."""
    sampler = cast("EpochSampler", loader.sampler)
    sampler.epoch = epoch
    sampler.done = done * cast("int", loader.batch_size)


@dataclass(eq=False)
class EpochSampler(Sampler[tuple[int, int, int]]):
    """Index of a sample, flip code and a random number, a function of seed and epoch.

    The number decides where a sample lies in its subject, or how it is augmented.

    Attributes:
        size: Samples of the data set.
        shuffle: Whether their order changes; processes then get equally many.
        seed: Of order, flips and numbers.
        flips: Whether samples are flipped.
        per_epoch: Samples of an epoch in training; 0 takes each once.
        replicas: Processes that share an epoch.
        rank: Which of them this is.
        epoch: The coming one.
        done: Samples of it that have been taken.
    """

    size: int
    shuffle: bool
    seed: int
    flips: bool
    per_epoch: int = 0
    replicas: int = 1
    rank: int = 0
    epoch: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        longer = self.shuffle and self.per_epoch and self.size
        self.count = self.per_epoch if longer else self.size

    def __len__(self) -> int:
        return len(self._mine(list(range(self.count))))

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        generator = torch.Generator()
        text = f"{self.seed}:{self.epoch}".encode()
        generator.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
        places: list[tuple[int, int, int]] = []
        while len(places) < self.count:
            places += self._pass(generator)
        yield from self._mine(places[: self.count])[self.done :]

    def _pass(self, generator: torch.Generator) -> list[tuple[int, int, int]]:
        """Each sample once, with a flip code and a number."""
        order = torch.randperm(self.size, generator=generator)
        # Drawn even where they are not used, so that switching one on leaves the other alone.
        codes = torch.randint(FLIP_CODES, (self.size,), generator=generator)
        draws = torch.randint(_DRAWS, (self.size,), generator=generator)
        return [
            (index, int(codes[index]) if self.flips else 0, int(draws[index]))
            for index in (order.tolist() if self.shuffle else range(self.size))
        ]

    def _mine(self, places: list[Item]) -> list[Item]:
        missing = -len(places) % self.replicas if self.shuffle else 0
        # More than once where processes outnumber samples: none may be left without a step.
        repeated = itertools.islice(itertools.cycle(places), len(places) + missing)
        return list(repeated)[self.rank :: self.replicas]


@dataclass(eq=False)
class FlippedDataset(Dataset[dict[str, Tensor | str]]):
    """Samples under a flip, addressed by index, flip code and a number.

    Attributes:
        samples: As they are without.
        mixed: Whether some have no reference, which batches then say.
        moves: Whether the number says where the sample lies in its subject.
        augmented: Whether it says how the sample is augmented beyond flips.
    """

    samples: Dataset[Sample]
    mixed: bool = False
    moves: bool = False
    augmented: bool = False

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, address: tuple[int, int, int]) -> dict[str, Tensor | str]:
        index, code, draw = address
        # Samples that move are addressed by what decides their position as well.
        sample: Sample = self.samples[(index, draw) if self.moves else index]
        if self.augmented:
            sample = augment(sample, draw)
        axes = sample["image"].ndim - 1
        code %= 2**axes
        flipped: dict[str, Tensor | str] = {
            "image": flip(sample["image"], code, axes),
            "name": sample["name"],
        }
        if not (self.moves or self.augmented):
            flipped["key"] = f"{sample['name']}/flip{code}"
        if "label" in sample:
            flipped["label"] = flip(sample["label"], code, axes).long()
        if self.mixed:
            flipped["labelled"] = torch.tensor("label" in sample)
            flipped.setdefault("label", torch.zeros_like(sample["image"][:1], dtype=torch.long))
        return flipped


def flip(volume: Tensor, code: int, axes: int = 3) -> Tensor:
    """Mirror a volume or a slice; applying the same code twice gives it back."""
    mirrored = [axis - axes for axis in range(axes) if code >> axis & 1]
    return volume.flip(mirrored) if mirrored else volume
