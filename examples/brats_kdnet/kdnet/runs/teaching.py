"""One network of a run: built, taught as its recipe says, and kept in the run folder."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from kdnet.configuration.config import Config
from kdnet.data.sampling import cache_remark, moves
from kdnet.data.splits import Split
from kdnet.errors import UserError
from kdnet.errors import explained
from kdnet.runs.experiment import Experiment
from kdnet.runs.folders import cache_folder
from kdnet.runs.networks import build, describe_network
from kdnet.runs.subjects import find_description
from kdnet.runs.views import stacked, view_of
from privdistill import DistillationWrapper, Ensemble, TeacherCache
from kdnet.recipes.lesson import Lesson, Setting
from kdnet.recipes.recipe import lesson_of
from kdnet.recipes.rows import Row
from kdnet.files import file_digest
from kdnet.training.checkpoint import (
    ModelMetadata,
    check_compatible,
    load_model,
    read_metadata,
    save_model,
    save_state,
)
from kdnet.training.checkpoint import is_finished
from kdnet.training.loop import fit
from kdnet.training.checkpoint import Task


def teach(experiment: Experiment, row: Row, *teachers: nn.Module) -> nn.Module:
    """Train the network of a row, or read it if that is done."""
    run = experiment.run
    if is_finished(run.role(row.name)):
        experiment.console.print(
            f"{row.name}: finished, read from {run.model(row.name)}",
            highlight=False,
            soft_wrap=True,
        )
        return load_trained(experiment, run.model(row.name))
    given = experiment.config.network.teacher_model if row.name == "teacher" else None
    if given is not None:
        return adopt_teacher(experiment, given)

    network = experiment.build_network(row.role, row.name)
    if experiment.performance.compile:
        network, teachers = compiled(network), tuple(map(compiled, teachers))
    lesson = lesson_of(row, experiment.setting(row.role, network, teachers))
    with experiment.watch.phase(row.name), explained(f"The training of {row.name}"):
        carry_out(experiment, row, lesson)
    if experiment.fabric.is_global_zero:
        # A kill in what follows must not cost these times.
        experiment.write_summary()
    return load_model(run.model(row.name), trusted=_vouched(experiment, own=True))[0]


def carry_out(experiment: Experiment, row: Row, lesson: Lesson) -> None:
    """Train the network of a lesson."""
    config, run = experiment.config, experiment.run
    place = cache_place(config.training.teacher_cache, experiment.fabric.device.type)
    remark = cache_remark(config.data, place)
    if lesson.teacher is not None and remark is not None:
        experiment.console.print(remark, highlight=False, soft_wrap=True)
    with (
        DistillationWrapper(
            lesson.teacher,
            lesson.network,
            objective=lesson.objective,
            inputs=lesson.inputs,
            taps=lesson.taps,
            activation=config.network.activation,
            example=experiment.example(),
            cache=teacher_cache(config, lesson.teacher, place),
        ) as kd,
        experiment.counting(kd.cache),
    ):
        task = Task(
            metadata=describe_row(experiment, row),
            settings=config.training,
            folder=run.role(row.name),
            scalars=run.tensorboard(row.name),
            memory_format=experiment.performance.memory_format,
            console=experiment.console,
            volumes=experiment.volumes(),
            seen_by_teachers=tuple(map(frozenset, seen_by_teachers(experiment, row))),
        )
        fit(
            experiment.fabric,
            kd,
            experiment.loader("train", unlabelled=lesson.teacher is not None),
            experiment.loader("validation"),
            task,
        )


def describe_row(experiment: Experiment, row: Row) -> ModelMetadata:
    """Describe the network of a row as its model file will."""
    metadata = replace(
        experiment.metadata(row.role, row.name), any_subset=row.recipe == "missing_modality"
    )
    if row.teacher is None:
        return metadata
    taught = [name for seen in seen_by_teachers(experiment, row) for name in seen]
    seen = (*metadata.seen_cases, *experiment.split.unlabelled, *taught)
    return replace(metadata, seen_cases=tuple(dict.fromkeys(seen)))


def seen_by_teachers(experiment: Experiment, row: Row) -> list[tuple[str, ...]]:
    """Return the subjects that each teacher of a row has seen."""
    files = experiment.teacher_files or [experiment.run.model(name) for name in row.teachers]
    return [read_metadata(path).seen_cases for path in files]


def rehearse(config: Config, row: Row, teacher: ModelMetadata | None) -> None:
    """Put the networks of a row together once, before anything is read, written or trained."""
    description = find_description(config)
    metadata = describe_network(row.role, config, description, row.name)
    setting = Setting(
        network=build(metadata),
        teachers=() if teacher is None else tuple(build(teacher) for _ in row.teachers),
        options=config.objective,
        modalities=stacked(config.data, description),
        view=metadata.modalities,
        teacher_view=view_of("teacher", config.data, description),
    )
    lesson = lesson_of(row, setting)
    DistillationWrapper(
        lesson.teacher,
        lesson.network,
        objective=lesson.objective,
        inputs=lesson.inputs,
        taps=lesson.taps,
        activation=metadata.activation,
        example=torch.zeros(1, len(setting.modalities), *metadata.input_size),
    ).close()


def cache_place(wanted: str, device: str) -> str:
    """Choose where the teacher's outputs are kept, if that was left open."""
    if wanted != "auto":
        return wanted
    return "off" if device == "cuda" else "disk"


def teacher_cache(
    config: Config, teacher: nn.Module | Ensemble | None, place: str
) -> TeacherCache | None:
    """Open the place where the teacher's outputs are kept."""
    training = config.training
    networks = teacher.networks if isinstance(teacher, Ensemble) else [teacher]
    if (
        not any(True for network in networks if network is not None for _ in network.parameters())
        or place == "off"
        or moves(config.data)
    ):
        return None
    return TeacherCache(
        cache_folder(config) / "teacher" if place == "disk" else None,
        storage=training.teacher_cache_storage,
        max_bytes=int(training.teacher_cache_gib * 2**30),
    )


def compiled(network: nn.Module) -> nn.Module:
    """Return the compiled network; its weights stay those of the network."""
    return cast("nn.Module", torch.compile(network))


def load_trained(
    experiment: Experiment, path: Path, trusted: Collection[str] | None = None
) -> nn.Module:
    """Read a network that an earlier part of the run has trained."""
    vouched = _vouched(experiment, own=True) if trusted is None else trusted
    network, metadata = load_model(path, trusted=vouched)
    check_unseen(path, metadata, experiment.split)
    return network


def _vouched(experiment: Experiment, *, own: bool) -> Collection[str]:
    return experiment.config.network.vouched(own=own)


def adopt_teacher(experiment: Experiment, path: Path) -> nn.Module:
    """Take a trained teacher from a file into the run folder."""
    network, metadata = load_model(path, trusted=_vouched(experiment, own=False))
    check_compatible(path, metadata, experiment.metadata("teacher", "teacher"))
    check_unseen(path, metadata, experiment.split)
    if experiment.fabric.is_global_zero:
        # Whatever its own run called it, it is this run's teacher.
        model = experiment.run.model("teacher")
        save_model(model, network, replace(metadata, role="teacher"))
        files = {model.name: file_digest(model)}
        save_state(
            model.parent / "state.safetensors",
            {"finished": True, "epoch": metadata.epoch, "files": files},
        )
    experiment.fabric.barrier()
    experiment.console.print(f"teacher: read from {path}", highlight=False, soft_wrap=True)
    return network


def check_unseen(path: Path, metadata: ModelMetadata, split: Split) -> None:
    """Refuse a network that has seen what it, or its student, will be tested on."""
    known = sorted({*metadata.seen_cases} & {*split.unlabelled})
    if known and metadata.role == "teacher":
        raise UserError(
            f"{path} was trained on {len(known)} of the subjects that shall have no reference, "
            f"such as {known[0]}: it would bring their references in. Give a teacher that was "
            "trained on labelled subjects alone."
        )
    leaked = sorted({*metadata.seen_cases} & {*split.test})
    if leaked:
        raise UserError(
            f"{path} was trained on {len(leaked)} subjects of the held-out fold: "
            f"{', '.join(leaked[:5])}. Its knowledge of them would reach the scores. Give the "
            "network of this fold."
        )
