"""Options of subjects, preprocessing and split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Subjects, their preprocessing and their split.

    Args:
        data_root: Folder of the data set; phantoms are generated if none is given.
        description: YAML file that describes a data set of your own, or the name of one in
            datasets/; BraTS and MSD layouts need none.
        student_modalities: What baseline and student see. Source: the paper, section 3.3.
        teacher_modalities: What the teacher sees; all modalities of the data set if none are
            given. Source: the paper, section 3.3.
        crop: Central crop, voxels; the description's if none is given (BraTS: 128,128,128; the
            paper, section 3.1).
        grid: Training grid after resampling, voxels; the description's if none is given (BraTS:
            64,64,64; the paper, section 3.1).
        patch: Size of the patches that networks see of volumes at their own resolution, voxels;
            then there is no grid. A volume that is smaller is padded.
        patches_per_case: Patches of each subject at fixed positions, which the teacher cache
            knows again, all seen in every epoch; 0 takes one at a new position in every epoch. A
            third lies on tumour. Source: nnU-Net (Isensee et al. 2021).
        slices: Plane of the slices of the grid that two-dimensional networks see, in volumes whose
            axes run sideways, front to back and upwards: "axial" cuts across the third axis.
        empty_slices: Share of the brain's slices without tumour that networks are trained on.
        normalise: z-score over the non-zero voxels of the crop or of the whole volume. The paper
            leaves the order open; it names the crop first.
        resample: How images reach the grid: "trilinear", or "area" (mean of the voxels merged).
            The paper leaves it open; labels are always taken from the nearest voxel.
        folds: Number of cross-validation folds. Source: the paper, section 3.2.
        fold: Which fold is held out, from 0.
        validation_fraction: Share of the training folds that drives the learning rate and the
            model selection; never part of the held-out fold. 0 sets none aside, which needs
            --selection last and another schedule than plateau. The paper leaves it open.
        split_file: JSON file with case names under train, validation and test instead of folds;
            perhaps also under unlabelled, which teach through the teacher alone.
        labelled: How many training subjects have a reference; all if none is given. The others
            teach the student through the teacher's predictions alone; teacher and baseline never
            see them. Of a smaller number the subjects are among those of a larger one.
        unlabelled: How many of those others are used; all if none is given.
        leave_out: Part of the labelled training subjects that is left out, and the number of parts,
            such as 0,2 for the first half: of several teachers, each subject can then be taught by
            those that were not trained on it.
        unlabelled_root: Folder with further subjects, in the form of the data set but without a
            reference (one that is there is not read), that teach the student likewise.
        skip_invalid: Use the subjects whose files are sound where others are not; these are listed
            in skipped.json and in the report. Without it nothing is trained until all are sound.
        flips: Random flip along each axis. Source: the paper, section 3.1.
        phantoms: Number of phantoms, if no data_root is given.
        phantom_size: Edge of a phantom, voxels of 1 mm.
        cache_dir: Where preprocessed subjects and phantoms are kept; the run folder if none is
            given.
        workers: Processes that read and preprocess; 0 means as many as there are processors.
    """

    data_root: Path | None = None
    description: str | None = None
    student_modalities: tuple[str, ...] = ("t1ce",)
    teacher_modalities: tuple[str, ...] | None = None
    crop: tuple[int, int, int] | None = None
    grid: tuple[int, int, int] | None = None
    patch: tuple[int, int, int] | None = None
    patches_per_case: int = 0
    slices: Literal["axial", "coronal", "sagittal"] | None = None
    empty_slices: float = 1.0
    normalise: Literal["after_crop", "before_crop"] = "after_crop"
    resample: Literal["trilinear", "area"] = "trilinear"
    folds: int = 3
    fold: int = 0
    validation_fraction: float = 0.15
    split_file: Path | None = None
    labelled: int | None = None
    unlabelled: int | None = None
    leave_out: tuple[int, int] | None = None
    unlabelled_root: Path | None = None
    skip_invalid: bool = False
    flips: bool = True
    phantoms: int = 48
    phantom_size: int = 64
    cache_dir: Path | None = None
    workers: int = 0

    @property
    def last_fold(self) -> int:
        """The largest number that names a fold."""
        return self.folds - 1
