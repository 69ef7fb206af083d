"""KD-Net from data to table: teacher, baseline, student, and what the student gained.

Train a teacher that sees every modality, freeze it, train a one-modality network without it (the
baseline) and with it (the student), and compare the three on held-out subjects.

Examples:
  train.py
      phantoms, a few minutes on two cores
  train.py --data-root BraTS2021 --preset cpu --out runs/brats
      real subjects; BraTS 2018, 2020, 2021, 2023 and MSD Task01 are recognised
  train.py --data-root PATIENTS --description patients.yaml --student-modalities t2 --preset cpu
      your own data set, described in one file, and which modality the student sees
  train.py --data-root BraTS2018 --preset paper --fold 1
      the recipe of arXiv:2106.09564, second of three folds
  train.py --data-root BraTS2021 --preset native
      patches of 128^3 at full resolution, predictions by sliding window
  train.py --data-root BraTS2021 --preset cpu --slices axial --backbone timm_unet
      two-dimensional networks, slice by slice
  train.py --teacher-backbone kdnet --backbone multiresunet --start scratch
      a teacher of another kind, whose weights its student cannot start from
  train.py --backbone monai.networks.nets.SegResNet --backbone-arguments '{"init_filters": 16}'
      any other encoder-decoder
  torchrun --nproc-per-node 4 train.py --data-root BraTS2018 --preset paper --devices 4
      several GPUs

A run that was stopped goes on when the same command is given again.

Source: Hu, Maillard et al. 2020, "Knowledge distillation from multi-modal to mono-modal
segmentation networks", arXiv:2106.09564.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from kdnet.command import console, exit_status
from kdnet.config import TRAIN, Config, parse_for, recipe_text
from kdnet.rows import Row

# What needs PyTorch is imported where it is used, so that --help comes at once.


def distil(config: Config, console: Console) -> None:
    """Carry out the experiment of the paper on one fold."""
    from kdnet.runs.plan import fold_of, make_plan  # noqa: PLC0415
    from kdnet.runs.preparation import prepare, rehearse_rows  # noqa: PLC0415
    from kdnet.runs.subjects import find_data, with_equal_steps  # noqa: PLC0415
    from kdnet.runs.unit import launch, run_unit  # noqa: PLC0415

    if config.objective.recipe == "auto":
        console.print(recipe_text(config), soft_wrap=True)

    # Subjects are found once. Of one fold, some train, some validate, and the others are held out.
    data = find_data(config, console)
    fold = fold_of(data.foldable, config)
    config = with_equal_steps(config, fold.split, data)

    # 3.3 The baseline sees what the student sees, and learns like the teacher. A student that
    # starts from the teacher's weights has had two trainings, and so has its baseline.
    longer = {"epochs": 2 * config.training.epochs} if config.network.start == "teacher" else {}
    rows = (
        # 2 KD-Net: first the teacher, with every modality and the reference segmentation alone.
        Row("teacher", role="teacher"),
        Row("baseline", options=longer),
        # 2.3 The student learns from the frozen teacher's predictions and bottleneck as well.
        Row("student", recipe="distilled", teacher="teacher", against="baseline"),
    )
    plan = make_plan("train", "Teacher, baseline, student", config, rows, [fold], data=data)

    # Mistakes show before anything is written: every network is built and tried with its teacher.
    plan = rehearse_rows(plan, plan.units(), console)

    # From here on there are several processes, if several devices are asked for.
    fabric = launch(config)
    console = console if fabric.is_global_zero else Console(quiet=True)
    with fabric.rank_zero_first():
        plan = prepare(plan, plan.units(), console)

    # Each unit is a network: trained, then scored on the held-out subjects in its own folder.
    for unit in plan.units():
        run_unit(plan, unit, console)

    # All that is shown is read from these files, and can be made again: report.py FOLDER.
    if fabric.is_global_zero:
        from kdnet.results.collected import show_results  # noqa: PLC0415

        show_results(plan, console)


def benchmark(config: Config, console: Console) -> None:
    """Say which precision and memory format are fast here; a run never chooses by a clock."""
    from kdnet.runs.networks import build, describe_network  # noqa: PLC0415
    from kdnet.runs.subjects import find_data  # noqa: PLC0415
    from kdnet.training.runtime import recommend  # noqa: PLC0415

    metadata = describe_network("student", config, find_data(config, console).description)
    shape = (config.training.batch_size, metadata.in_channels, *metadata.input_size)
    for line in recommend(config.training, build(metadata), shape):
        console.print(line, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""

    def run() -> None:
        config, options = parse_for(replace(TRAIN, description=__doc__), arguments)
        action = benchmark if options.benchmark else distil
        action(config, console())

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
