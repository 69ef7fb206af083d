"""What the three trainings share: subjects, split, cache, device and settings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch.utils.data import ConcatDataset

from kdnet.configuration.config import Config
from kdnet.data.description import Description
from kdnet.data.layouts import Subject
from kdnet.data.loading import build_loader
from kdnet.data.sampling import moves, training_samples, validation_samples, whole_volumes
from kdnet.data.splits import Split
from kdnet.runs.folders import workers
from kdnet.runs.networks import build, describe_network
from kdnet.runs.preparation import prepare_parts
from kdnet.runs.splits import shared_out
from kdnet.runs.subjects import orientation_of
from kdnet.runs.views import view_of
from kdnet.files import FolderLock
from privdistill import TeacherCache
from kdnet.recipes.lesson import Setting
from kdnet.recipes.rows import Row
from kdnet.runs.run_folder import RunFolder
from kdnet.training.checkpoint import ModelMetadata
from kdnet.runs.trial import Performance
from kdnet.training.runtime import Stopwatch, peak_memory, torch_format


@dataclass
class Experiment:
    """One fold of one data set, ready for training.

    Attributes:
        config: The resolved configuration.
        run: The run folder.
        fabric: Launched.
        console: Where progress is shown.
        watch: Time per phase.
        description: The data set.
        modalities: What the subjects' images stack, in channel order.
        split: Names of training, validation, test and unlabelled subjects.
        subjects: Files by name.
        datasets: Preprocessed training, validation and unlabelled subjects.
        performance: How training steps are taken.
        samples: What networks are trained and validated on, by part; filled when first asked for,
            as slices are found by looking through all subjects.
        cache_counts: Hits, misses, entries not stored and bytes of the teacher cache, of the first
            process.
        teacher_files: Model files of the teachers, where those lie in other run folders.
        lock: Keeps other runs out of the folder; of the first process of train.py.
    """

    config: Config
    run: RunFolder
    fabric: Fabric
    console: Console
    watch: Stopwatch
    description: Description
    modalities: tuple[str, ...]
    split: Split
    subjects: dict[str, Subject]
    datasets: dict[str, Any]
    performance: Performance
    samples: dict[str, Any] = field(default_factory=dict)
    cache_counts: dict[str, int] = field(default_factory=dict)
    teacher_files: tuple[Path, ...] = ()
    lock: FolderLock | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also after an interruption, so that the continuation adds to these times.
        try:
            if self.fabric.is_global_zero:
                self.write_summary()
        finally:
            if self.lock is not None:
                self.lock.release()

    def write_summary(self) -> dict[str, Any]:
        """Write time per phase and peak memory to summary.json."""
        seconds = {name: round(value, 2) for name, value in self.watch.seconds.items()}
        summary = {
            "seconds": seconds,
            "total_seconds": round(sum(seconds.values()), 2),
            "peak_mib": peak_memory(),
        }
        if self.cache_counts:
            summary["teacher_cache"] = self.cache_counts
        self.run.write_summary(summary)
        return summary

    @contextmanager
    def counting(self, cache: TeacherCache | None) -> Iterator[None]:
        """Add what a cache did in the block to the counts, also if an exception leaves it."""
        try:
            yield
        finally:
            if cache is not None:
                now, before = cache.statistics, self.cache_counts
                self.cache_counts = {
                    "hits": before.get("hits", 0) + now.hits,
                    "misses": before.get("misses", 0) + now.misses,
                    "skipped": before.get("skipped", 0) + now.skipped,
                    "bytes": now.bytes,
                }

    def view(self, role: str) -> tuple[str, ...]:
        """Return the modalities that a network sees."""
        return view_of(role, self.config.data, self.description)

    def metadata(self, role: str, name: str = "") -> ModelMetadata:
        """Return the description of a network: its role's modalities and backbone, its own name."""
        return replace(
            describe_network(role, self.config, self.description, name),
            orientation=orientation_of(self.subjects.values(), self.split),
            seen_cases=(*self.split.train, *self.split.validation),
        )

    def build_network(self, role: str, name: str = "") -> torch.nn.Module:
        """Build the untrained network of a role."""
        self.fabric.seed_everything(self.config.training.seed, verbose=False)
        metadata = self.metadata(role, name)
        layout = torch_format(self.performance.memory_format, len(metadata.input_size))
        return build(metadata).to(memory_format=layout)

    def setting(
        self, role: str, network: torch.nn.Module, teachers: Sequence[torch.nn.Module] = ()
    ) -> Setting:
        """Return what a recipe is given for a network of a role."""
        return Setting(
            network=network,
            teachers=tuple(teachers),
            options=self.config.objective,
            modalities=self.modalities,
            view=self.view(role),
            teacher_view=self.view("teacher"),
        )

    def example(self) -> torch.Tensor:
        """Return an empty sample with every modality, (1, M, *spatial)."""
        metadata = describe_network("student", self.config, self.description)
        return torch.zeros(1, len(self.modalities), *metadata.input_size)

    def loader(
        self, part: Literal["train", "validation"], *, unlabelled: bool = False
    ) -> Any | None:
        """Return batches of a part of the training folds."""
        data, training = self.config.data, self.config.training
        on_cpu = self.fabric.device.type == "cpu"
        mixed = unlabelled and bool(self.split.unlabelled)
        if not getattr(self.split, part):
            return None
        samples = self._samples(part)
        if mixed:
            samples = ConcatDataset([samples, self._samples("unlabelled")])
        return build_loader(
            samples,
            training.batch_size,
            shuffle=part == "train",
            seed=training.seed,
            flips=data.flips and part == "train",
            moves=part == "train" and moves(data),
            per_epoch=training.samples_per_epoch,
            mixed=mixed,
            # On a CPU the processors are better spent on the training itself.
            workers=0 if on_cpu else min(4, workers(data)),
            replicas=self.fabric.world_size,
            rank=self.fabric.global_rank,
        )

    def of_row(self, row: Row, console: Console) -> Self:
        """Return the experiment as a row sees it, which may do without a part of the subjects."""
        if "leave_out" not in row.options:
            return self
        config = row.configure(self.config)
        data = replace(config.data, labelled=None, unlabelled=None)
        split = replace(shared_out(data, self.split), unlabelled=())
        subjects = list(self.subjects.values())
        datasets = prepare_parts(config, self.description, subjects, split, console)
        return replace(self, config=config, split=split, datasets=datasets, samples={})

    def _samples(self, part: str) -> Any:
        if part not in self.samples:
            samples_of = validation_samples if part == "validation" else training_samples
            data, seed = self.config.data, self.config.training.seed
            self.samples[part] = samples_of(self.datasets[part], data, seed)
        return self.samples[part]

    def volumes(self) -> Any | None:
        """Return whole validation subjects, where samples are parts of them."""
        return whole_volumes(self.datasets["validation"], self.config.data)
