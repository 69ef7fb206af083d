"""Commands that read the configuration."""

from dataclasses import dataclass

_DESCRIPTION = """\
Train a teacher that sees every modality, freeze it, train a one-modality network without it (the
baseline) and with it (the student), and compare the three on held-out subjects.

Examples:
  train.py
      phantoms, a few minutes on two cores
  train.py --data-root BraTS2021 --preset cpu --out runs/brats
      real subjects; BraTS 2018, 2020, 2021, 2023 and MSD Task01 are recognised
  train.py --data-root PATIENTS --description patients.yaml --preset cpu
      your own data set, described in one file
  train.py --data-root BraTS2018 --preset paper --fold 1
      the recipe of arXiv:2106.09564, second of three folds
  train.py --data-root BraTS2021 --preset native
      patches of 128^3 at full resolution, predictions by sliding window
  train.py --data-root BraTS2021 --preset cpu --slices axial --backbone timm_unet
      two-dimensional networks, slice by slice
  train.py --teacher_backbone kdnet --backbone multiresunet
      a teacher of another kind
  train.py --backbone monai.networks.nets.SegResNet --backbone_arguments '{"init_filters": 16}'
      any other encoder-decoder
  torchrun --nproc-per-node 4 train.py --data-root BraTS2018 --preset paper --devices 4
      several GPUs

A run that was stopped goes on when the same command is given again."""


@dataclass(frozen=True)
class Program:
    """A command that reads the configuration, perhaps with options of its own.

    Attributes:
        name: Of its file.
        description: What --help says first.
        options: Dataclass of its own options; None if it has none.
        out: Default run folder; PRESET stands for the preset.
    """

    name: str
    description: str
    options: type | None = None
    out: str = "runs/PRESET"


@dataclass(frozen=True)
class TrainOptions:
    """What train.py does.

    Args:
        benchmark: Train nothing: measure a step of the student's network in every precision and
            memory format that this machine has, and recommend the options to give.
    """

    benchmark: bool = False


TRAIN = Program("train.py", _DESCRIPTION, TrainOptions)
