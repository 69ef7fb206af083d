"""KD-Net from data to table: teacher, baseline, student, and what the student gained.

    python examples/brats_kdnet/train.py                        phantoms, a few minutes
    python examples/brats_kdnet/train.py --data-root BraTS2021  real subjects

Source: Hu, Maillard et al. 2020, "Knowledge distillation from multi-modal to mono-modal
segmentation networks", arXiv:2106.09564.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor, nn

from config import Config, ObjectiveConfig, parse_config
from data.sampling import moves
from errors import UserError
from evaluation.inference import volume_predictor
from evaluation.scoring import Score, evaluate, read_scores, write_scores
from evaluation.slices import save_slices
from evaluation.tables import render_tables
from experiment import (
    Experiment,
    build,
    cache_folder,
    describe_network,
    find_description,
    open_experiment,
    stacked,
)
from privdistill import (
    DistillationWrapper,
    GroundTruth,
    LatentKL,
    Objective,
    PrivDistillError,
    PrivilegedInput,
    SoftTargetDiceBCE,
    Tap,
    TeacherCache,
    Term,
)
from report import write_report
from run_folder import ROLES
from training.checkpoint import (
    check_compatible,
    load_model,
    read_metadata,
    save_model,
    save_state,
)
from training.interruption import TrainingStoppedError
from training.loop import Task, fit, is_finished
from training.progress import counting


def distil(config: Config, console: Console) -> None:
    """Carry out the experiment of the paper on one fold.

    Args:
        config: The resolved configuration.
        console: Where progress and results are shown.

    Raises:
        UserError: If the configuration or the data cannot be used.
        TrainingStoppedError: After SIGTERM, SIGUSR1 or Ctrl-C.
    """
    options = config.objective
    rehearse(config)
    with open_experiment(config, console) as experiment:
        # 2 KD-Net: first the teacher, with every modality and the reference segmentation alone.
        teacher = train(experiment, "teacher", ground_truth(options))
        # 3.3 The baseline sees what the student sees, and learns like the teacher.
        train(experiment, "baseline", ground_truth(options))
        # 2.3 The student learns from the frozen teacher's predictions and bottleneck as well.
        train(experiment, "student", student_objective(options), teacher=teacher)

        if experiment.fabric.is_global_zero:
            scores = score(experiment)
            show(experiment, scores)


def rehearse(config: Config) -> None:
    """Put teacher and student together once, before anything is read, written or trained.

    Args:
        config: The resolved configuration.

    Raises:
        UserError: If there is no such network, or a given teacher does not fit the run.
        PrivDistillError: If the network cannot run on the grid, or has no bottleneck to be found.
    """
    description = find_description(config)
    teacher, student = (
        describe_network(role, config, description) for role in ("teacher", "student")
    )
    if config.network.teacher_model is not None:
        path = config.network.teacher_model
        found = read_metadata(path)
        check_compatible(path, found, teacher)
        teacher = found
    network, objective = build(student), student_objective(config.objective)
    teaching = build(teacher)
    modalities = stacked(config.data, description)
    DistillationWrapper(
        teaching,
        network,
        objective=objective,
        inputs=PrivilegedInput(modalities, student=student.modalities, teacher=teacher.modalities),
        taps=taps(config.objective, network, objective, teaching),
        activation=student.activation,
        example=torch.zeros(1, len(modalities), *student.input_size),
    ).close()


def ground_truth(options: ObjectiveConfig) -> Term:
    """Equation (4): Dice and cross-entropy against the reference.

    Args:
        options: What the paper leaves open about Dice and cross-entropy.

    Returns:
        L_GT.
    """
    return GroundTruth(
        include_background=options.include_background,
        squared_denominator=options.squared_denominator,
        batch_dice=options.batch_dice,
        smoothing=options.smoothing,
    )


def student_objective(options: ObjectiveConfig) -> Objective:
    """Equation (5): lambda L_KD + (1 - lambda) L_GT + alpha L_KL.

    Args:
        options: lambda, T, alpha, and what the paper leaves open.

    Returns:
        The objective; a term of weight zero is left out, and with it its cost.
    """
    soft_targets = SoftTargetDiceBCE(
        temperature=options.temperature,
        include_background=options.include_background,
        squared_denominator=options.squared_denominator,
        batch_dice=options.batch_dice,
        smoothing=options.smoothing,
    )
    latent = LatentKL(
        normalisation=options.latent_normalisation, temperature=options.latent_temperature
    )
    weighted = (
        (options.imitation, soft_targets),
        (1 - options.imitation, ground_truth(options)),
        (options.latent_weight, latent),
    )
    return Objective([(weight, term) for weight, term in weighted if weight > 0])


def train(
    experiment: Experiment,
    role: str,
    objective: Term | Objective,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Train one of the three networks, or read it if that is done.

    Args:
        experiment: Subjects, settings, run folder.
        role: "teacher", "baseline" or "student".
        objective: What it minimises.
        teacher: A trained network that is frozen and imitated.

    Returns:
        The network with the selected weights.

    Raises:
        UserError: If a given teacher does not fit or the training diverges.
        TrainingStoppedError: After SIGTERM, SIGUSR1 or Ctrl-C.
    """
    config, run = experiment.config, experiment.run
    if is_finished(run.role(role)):
        experiment.console.print(
            f"{role}: finished, read from {run.model(role)}", highlight=False, soft_wrap=True
        )
        return load_model(run.model(role))[0]
    given = config.network.teacher_model if role == "teacher" else None
    if given is not None:
        return adopt_teacher(experiment, given)

    network = experiment.build_network(role)
    if experiment.performance.compile:
        network, teacher = compiled(network), teacher and compiled(teacher)
    inputs = PrivilegedInput(
        experiment.modalities,
        student=experiment.view(role),
        teacher=experiment.view("teacher"),
    )
    with (
        experiment.watch.phase(role),
        DistillationWrapper(
            teacher,
            network,
            objective=objective,
            inputs=inputs,
            taps=taps(config.objective, network, objective, teacher),
            activation=config.network.activation,
            example=experiment.example(),
            cache=teacher_cache(config, teacher),
        ) as kd,
        experiment.counting(kd.cache),
    ):
        task = Task(
            metadata=experiment.metadata(role),
            settings=config.training,
            folder=run.role(role),
            scalars=run.tensorboard(role),
            memory_format=experiment.performance.memory_format,
            console=experiment.console,
            volumes=experiment.volumes(),
        )
        loaders = experiment.loader("train"), experiment.loader("validation")
        fit(experiment.fabric, kd, *loaders, task)
    return load_model(run.model(role))[0]


def teacher_cache(config: Config, teacher: nn.Module | None) -> TeacherCache | None:
    """Say where the teacher's outputs are kept.

    Args:
        config: Place, storage and limit.
        teacher: None in the trainings that have no teacher.

    Returns:
        The cache, or None if the teacher is to run in every step.
    """
    training = config.training
    if teacher is None or training.teacher_cache == "off" or moves(config.data):
        return None
    return TeacherCache(
        cache_folder(config) / "teacher" if training.teacher_cache == "disk" else None,
        storage=training.teacher_cache_storage,
        max_bytes=int(training.teacher_cache_gib * 2**30),
    )


def compiled(network: nn.Module) -> nn.Module:
    """Return the compiled network; its weights stay those of the network."""
    return cast("nn.Module", torch.compile(network))


def taps(
    options: ObjectiveConfig,
    network: nn.Module,
    objective: Term | Objective,
    teacher: nn.Module | None = None,
) -> dict[str, Tap]:
    """Name the bottleneck layers where the configuration or the networks do.

    Args:
        options: May name a layer of either network.
        network: May have a layer called "bottleneck".
        objective: May not need one.
        teacher: Likewise; a network like the student's unless given.

    Returns:
        The tap; empty if the library shall locate both layers, or no term reads it.
    """
    if not objective.taps:
        return {}
    teacher = network if teacher is None else teacher
    mine = bottleneck_layer(network, options.bottleneck_layer)
    alike = type(plain(teacher)) is type(plain(network))
    theirs = bottleneck_layer(teacher, options.teacher_bottleneck_layer)
    if alike and options.teacher_bottleneck_layer == "auto":
        theirs = mine
    return {"bottleneck": Tap(teacher=theirs, student=mine)} if mine or theirs else {}


def bottleneck_layer(network: nn.Module, option: str) -> str | None:
    """Return the layer that an option means; None if the library shall locate it.

    Args:
        network: Compiled or not.
        option: A layer, or "auto".
    """
    if option != "auto":
        return option
    return "bottleneck" if "bottleneck" in dict(plain(network).named_children()) else None


def plain(network: nn.Module) -> nn.Module:
    """Return the network that was compiled, or the network itself."""
    return cast("nn.Module", getattr(network, "_orig_mod", network))


def adopt_teacher(experiment: Experiment, path: Path) -> nn.Module:
    """Take a trained teacher from a file into the run folder.

    Args:
        experiment: What the teacher must fit.
        path: Its model file.

    Returns:
        The teacher.

    Raises:
        UserError: If it does not fit the run.
    """
    network, metadata = load_model(path)
    check_compatible(path, metadata, experiment.metadata("teacher"))
    leaked = sorted({*metadata.seen_cases} & {*experiment.split.test})
    if leaked:
        raise UserError(
            f"{path} was trained on {len(leaked)} subjects of the held-out fold: "
            f"{', '.join(leaked[:5])}. Its knowledge of them would reach the student. Give the "
            "teacher of this fold."
        )
    if experiment.fabric.is_global_zero:
        save_model(experiment.run.model("teacher"), network, metadata)
        save_state(experiment.run.role("teacher") / "state.pt", {"finished": True})
    experiment.fabric.barrier()
    experiment.console.print(f"teacher: read from {path}", highlight=False, soft_wrap=True)
    return network


def score(experiment: Experiment) -> list[Score]:
    """Score the three networks on the held-out subjects, or read their scores if that is done.

    Args:
        experiment: Held-out subjects and trained networks.

    Returns:
        Scores at the training grid and in native space.
    """
    run = experiment.run
    if run.scores.is_file():
        return read_scores(run.scores)
    scores: list[Score] = []
    with experiment.watch.phase("evaluation"):
        for role in ROLES:
            scores += score_network(experiment, role)
        if experiment.config.run.predictions:
            save_slices(
                run.root / "slices.npz",
                experiment.subjects,
                experiment.description,
                run.root / "predictions",
                scores,
            )
    write_scores(run.scores, scores)
    return scores


def score_network(experiment: Experiment, role: str) -> list[Score]:
    """Score one network.

    Args:
        experiment: Held-out subjects and trained networks.
        role: Which network.

    Returns:
        Its scores.
    """
    run = experiment.run
    network, metadata = load_model(run.model(role))
    subjects = [experiment.subjects[name] for name in experiment.split.test]
    with counting(experiment.console, f"Scoring the {role}", len(subjects)) as scored:
        predict = predictor(network, experiment.fabric.device)
        return evaluate(
            volume_predictor(predict, patch=metadata.patch, slices=metadata.slices),
            subjects,
            metadata.preprocessing(),
            experiment.description,
            activation=metadata.activation,
            role=role,
            prediction_folder=run.predictions(role) if experiment.config.run.predictions else None,
            on_case=scored,
        )


def predictor(network: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Wrap a trained network so that it maps images to logits on the CPU.

    Args:
        network: Trained.
        device: Where it runs, in float32, as predict.py does.

    Returns:
        A function from (1, M, *grid) to logits (1, C, *grid).
    """
    kd = DistillationWrapper(None, network.to(device), objective=GroundTruth())

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        return kd.predict(image.to(device)).float().cpu()

    return predict


def show(experiment: Experiment, scores: Sequence[Score]) -> None:
    """Print the table, write the report, and say what the run took.

    Args:
        experiment: All three networks are trained and scored.
        scores: Their scores.
    """
    console = experiment.console
    console.print(render_tables(scores, phantom=experiment.description.phantom))
    experiment.write_summary()
    with experiment.watch.phase("report"):
        report = write_report(experiment.run.root)
    summary = experiment.write_summary()
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    counts = summary.get("teacher_cache")
    served = [render_cache(counts, experiment.fabric.world_size)] if counts else []
    peaks = ", ".join(f"{name} {value:.0f} MiB" for name, value in summary["peak_mib"].items())
    for line in (
        f"Time: {phases}; in all {summary['total_seconds']:.0f} s",
        *served,
        f"Peak memory: {peaks}",
        f"Report: {report}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def render_cache(counts: dict[str, int], processes: int) -> str:
    """Say how often the teacher ran and how often it was not asked.

    Args:
        counts: Hits, misses, entries not stored and bytes.
        processes: Number of processes, of which the first counts.

    Returns:
        One line.
    """
    asked = counts["hits"] + counts["misses"]
    return (
        f"Teacher cache: {counts['hits']} of {asked} samples served, the teacher ran for "
        f"{counts['misses']}; {counts['bytes'] / 2**20:.0f} MiB"
        + f"; {counts.get('skipped')} had no room" * bool(counts.get("skipped"))
        + (" (of the first process)" if processes > 1 else "")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run.

    Args:
        arguments: Without the program's name; sys.argv if None.

    Returns:
        Exit status: 0, 2 for input that cannot be used, 128 + signal if stopped.
    """
    try:
        # Names of cases and folders are shown as they are, brackets and all.
        distil(parse_config(arguments), Console(markup=False))
    except (UserError, PrivDistillError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"The run stopped: {error}. Give the same command to go on.\n")
        return 2
    except TrainingStoppedError as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. Give the same command to go on.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
