"""Every option: what it means, its presets, and how it is read and checked."""

import argparse
import json
import re
import sys
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import lru_cache
from operator import ge, gt, le, lt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from kdnet.errors import UserError
from kdnet.files import read_mapping

_FOLDER = Path(__file__).parents[1] / "configs"
PRESETS = ("demo", "cpu", "paper", "native")
#: Of the paper, section 3.2; no temperature that is fitted is larger.
PAPER_TEMPERATURE = 5.0
#: What people set first, whatever the program.
_FIRST = ("preset", "out", "data_root", "description", "student_modalities", "epochs")

# jsonargparse imports what a file calls a "class_path" where a type is a class or Any. Of ours
# alone; and in a mapping without types everything stays what it is.
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["kdnet"])
if TYPE_CHECKING:
    Arguments: TypeAlias = dict[str, Any]
else:
    Arguments = dict

_Kind = TypeVar("_Kind")
_LIMITS = {"at_least": ge, "at_most": le, "above": gt, "below": lt}


def limited(default: Any, **limits: float) -> Any:
    """Return a field of numbers that lie within limits: at_least, at_most, above, below."""
    return field(default=default, metadata=limits)


def out_of_range(*groups: Any) -> list[str]:
    """Return which fields of data classes lie beyond their limits, one sentence each."""
    found = []
    for group, item in ((one, item) for one in groups for item in fields(one)):
        value = getattr(group, item.name)
        several = value if isinstance(value, tuple) else (value,)
        numbers = [number for number in several if isinstance(number, int | float)]
        if not all(_LIMITS[k](n, limit) for k, limit in item.metadata.items() for n in numbers):
            wanted = (f"{k.replace('_', ' ')} {limit}" for k, limit in item.metadata.items())
            found.append(f"{item.name} is {value}; expected {' and '.join(wanted)}.")
    return found


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
        augment: Random rotation, scaling, contrast and brightness beside flips, of teacher,
            baseline and student alike. The paper has flips alone.
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
    crop: tuple[int, int, int] | None = limited(None, at_least=1)
    grid: tuple[int, int, int] | None = limited(None, at_least=1)
    patch: tuple[int, int, int] | None = limited(None, at_least=1)
    patches_per_case: int = limited(0, at_least=0)
    slices: Literal["axial", "coronal", "sagittal"] | None = None
    empty_slices: float = limited(1.0, at_least=0, at_most=1)
    normalise: Literal["after_crop", "before_crop"] = "after_crop"
    resample: Literal["trilinear", "area"] = "trilinear"
    folds: int = limited(3, at_least=2)
    fold: int = 0
    validation_fraction: float = limited(0.15, at_least=0, below=1)
    split_file: Path | None = None
    labelled: int | None = limited(None, at_least=1)
    unlabelled: int | None = limited(None, at_least=0)
    leave_out: tuple[int, int] | None = None
    unlabelled_root: Path | None = None
    skip_invalid: bool = False
    flips: bool = True
    augment: bool = False
    phantoms: int = 48
    phantom_size: int = limited(64, at_least=16)
    cache_dir: Path | None = None
    workers: int = limited(0, at_least=0)


@dataclass(frozen=True)
class NetworkConfig:
    """The networks: one for baseline and student, and for the teacher unless it has its own.

    Args:
        backbone: "kdnet" (the paper, Fig. 1), "multiresunet", or the import path of a class.
        backbone_arguments: Arguments of its class, such as {channels: [8, 16, 32]}.
        teacher_backbone: The teacher's; that of the student if none is given, as in the paper,
            section 2.
        teacher_backbone_arguments: Arguments of its class; those of the student if neither they
            nor another teacher_backbone are given.
        activation: "softmax" for exclusive classes (the paper, section 2.1), "sigmoid" for
            overlapping regions.
        teacher_model: model.safetensors of a trained teacher, instead of training one. One
            that has seen a subject of the held-out fold is refused.
        trust_backbone: Import paths of networks that the file of teacher_model may name. Importing
            a module runs it, so a file alone gets networks of this application and some of MONAI.
        start: What a distilled network starts from: "scratch", or the weights of its "teacher",
            whose first layer is cut to the student's modalities. The paper starts from scratch.
    """

    backbone: str = "kdnet"
    backbone_arguments: Arguments = field(default_factory=dict)
    teacher_backbone: str | None = None
    teacher_backbone_arguments: Arguments | None = None
    activation: Literal["softmax", "sigmoid"] = "softmax"
    teacher_model: Path | None = None
    trust_backbone: tuple[str, ...] = ()
    start: Literal["scratch", "teacher"] = "scratch"

    def vouched(self, *, own: bool) -> frozenset[str]:
        """Return the networks that the user, not a file, has named."""
        arguments = (self.backbone_arguments, self.teacher_backbone_arguments or {})
        parts = [given.get(part) for given in arguments for part in ("segmenter", "generator")]
        named = {str(name) for name in (self.backbone, self.teacher_backbone, *parts) if name}
        return frozenset({*self.trust_backbone, *(name for name in named if own or "." in name)})

    def of(self, role: str) -> tuple[str, dict[str, Any]]:
        """Return backbone and arguments of a role's network."""
        if role != "teacher":
            return self.backbone, self.backbone_arguments
        backbone = self.teacher_backbone or self.backbone
        shared = self.backbone_arguments if backbone == self.backbone else {}
        own = self.teacher_backbone_arguments
        return backbone, shared if own is None else own


@dataclass(frozen=True)
class ObjectiveConfig:
    """The student's objective: lambda L_KD + (1 - lambda) L_GT + alpha L_KL.

    Args:
        recipe: "auto" takes what a study found best (docs/results/when-it-helps) where all subjects
            are labelled, or where few are: configs/recipes/all.yaml or few.yaml, each of whose
            options may be given as well; "options" leaves them as they are. For train.py;
            crossval.py's rows say what they are.
        objective: "kdnet" (the paper, equation 5), or another preset of the library with its
            constants. All learn from the frozen teacher here, also those of "m3ae" and "passion",
            whose papers let one network teach itself; "mstkdnet" needs three output channels or
            more. The options below are those of "kdnet" and of the reference's Dice and
            cross-entropy.
        imitation: lambda, the weight of the teacher's soft targets. Source: the paper, 3.2.
        temperature: T of the teacher's soft targets, 5 in the paper, 3.2; "fit" takes the largest
            up to 5 at which they still say what this teacher would predict.
        binarisation: What cross-entropy compares with: "auto" binarises the teacher's prediction as
            the paper does ("argmax" under softmax, "positive" logits under sigmoid), "soft" takes
            its probabilities.
        imitation_start: lambda in the first step, from where it goes to `imitation` in
            `imitation_steps` steps, along a straight line; constant if none is given.
        imitation_steps: Length of that way, training steps.
        region_weights: Weight of each output channel in the soft targets; all alike if none are
            given.
        out_of_fold: Into how many parts the labelled subjects are dealt, so that each is taught by
            teachers that were not trained on it: a further teacher is trained without each part.
            1 has the one teacher of the paper.
        latent_weight: alpha, the weight of the latent divergence. Source: the paper, 3.2.
        latent_layers: Layers of both networks whose divergences share alpha, instead of the
            bottleneck alone, such as encoder.2,bottleneck.
        bottleneck_layer: Layer whose output is E(x); "auto" takes the layer called "bottleneck"
            where the network has one and lets the library locate it otherwise. The paper leaves
            it open.
        teacher_bottleneck_layer: The same for the teacher; "auto" takes the layer of the student
            where both networks are of one class.
        latent_normalisation: How a bottleneck becomes a distribution; "softmax" is over all
            channels and voxels ("flattened and normalized", the paper, section 2.2).
        latent_temperature: Softmax temperature of the bottleneck; the paper mentions none.
        include_background: Whether the background channel counts in Dice and cross-entropy; the
            paper leaves it open.
        squared_denominator: Dice with squares in the denominator; the paper leaves it open.
        batch_dice: Dice over the whole batch instead of per subject; the paper leaves it open.
        smoothing: Added to Dice's numerator and denominator, voxels; the paper leaves it open.
    """

    recipe: Literal["options", "auto"] = "options"
    objective: Literal[
        "kdnet",
        "hinton",
        "generalized",
        "xie",
        "structured",
        "pmkl",
        "protokd",
        "m3ae",
        "passion",
        "mstkdnet",
    ] = "kdnet"
    imitation: float = limited(0.75, at_least=0, at_most=1)
    temperature: float | Literal["fit"] = limited(PAPER_TEMPERATURE, above=0)
    binarisation: Literal["auto", "argmax", "positive", "soft"] = "auto"
    imitation_start: float | None = limited(None, at_least=0, at_most=1)
    imitation_steps: int = limited(1000, at_least=1)
    region_weights: tuple[float, ...] | None = None
    out_of_fold: int = limited(1, at_least=1)
    latent_weight: float = limited(10.0, at_least=0)
    latent_layers: tuple[str, ...] | None = None
    bottleneck_layer: str = "auto"
    teacher_bottleneck_layer: str = "auto"
    latent_normalisation: Literal["softmax", "softmax_channel", "softmax_spatial", "l1"] = "softmax"
    latent_temperature: float = 1.0
    include_background: bool = True
    squared_denominator: bool = False
    batch_dice: bool = False
    smoothing: float = 1e-5


@dataclass(frozen=True)
class TrainingConfig:
    """How each of the three networks is trained.

    Args:
        epochs: Passes over the training subjects. Source: the paper, section 3.2.
        samples_per_epoch: Samples of an epoch; 0 takes each training sample once. A number makes
            trainings on few subjects as long as those on many: samples come again in a new order,
            or wait for the next epoch.
        batch_size: Subjects in a batch, on each device. The paper leaves it open; No New-Net,
            where its network comes from, uses 2.
        learning_rate: Of Adam; the peak under "onecycle". Source: the paper, section 3.2.
        weight_decay: Of Adam; the paper mentions none.
        schedule: "plateau" (the paper, section 3.2), "onecycle" for short trainings, "constant".
        plateau_patience: Epochs without a lower validation loss before the learning rate drops.
            Source: the paper, section 3.2.
        plateau_factor: What the learning rate is multiplied by then. Source: the same.
        gradient_clip: Largest gradient norm; 0 leaves gradients alone, as the paper does.
        selection: Which weights are kept: of the "last" epoch, or of the "best" validation loss.
            The paper leaves it open.
        validation_loss: "objective", what the network is trained on, or "ground_truth", the
            L_GT part alone, which is the same for teacher and baseline. The paper leaves it open.
        precision: Precision of the trainings; 16-mixed needs a GPU. It changes the numbers, so it
            is never chosen by a clock: train.py --benchmark measures and recommends.
        memory_format: Layout of images and weights.
        compile: Compile the networks with torch.compile; on CPUs that took a minute for each
            network and gained nothing.
        logger: Where the curves go: "tensorboard", "csv", or "wandb" and "mlflow", which need their
            package and lightning; WANDB_MODE and MLFLOW_TRACKING_URI say where to, the latter a
            file beside the network unless given. history.csv is written beside all of them.
        teacher_cache: Where the teacher's outputs are kept, so that it runs once per subject and
            flip: "disk" (with the preprocessed subjects; processes and later runs share it),
            "memory", or "off". "auto" is "disk", but "off" where samples do not come back, because
            they are augmented or patches at new positions, and on a CUDA GPU, where reading what
            the teacher said takes about as long as running it (docs/performance); with several or
            large teachers "disk" may pay there too.
        teacher_cache_storage: "full" keeps every bit, so that the student's weights are those of
            a training without the cache, but for rounding where the last batch is smaller; "half"
            takes half and errs a little.
        teacher_cache_gib: Limit of the cache in GiB; the teacher runs for what has no room.
        accelerator: As in Lightning Fabric: auto, cpu, gpu, mps.
        devices: Devices of one node: a number, or "auto" for all.
        num_nodes: Nodes; start their processes with torchrun, or srun (slurm/array.sbatch).
        strategy: As in Lightning Fabric: "auto", or "ddp" for several devices; "fsdp" spreads
            weights, gradients and Adam's moments over the processes, for networks that one device
            cannot train. Files are the same, and a run may go on with another strategy.
        threads: CPU threads of each process; 0 leaves PyTorch's choice.
        deterministic: Only deterministic algorithms; slower on a GPU, where some do not exist.
        seed: Of weights, order, flips, splits and phantoms.
    """

    epochs: int = limited(500, at_least=1)
    samples_per_epoch: int = limited(0, at_least=0)
    batch_size: int = limited(2, at_least=1)
    learning_rate: float = limited(1e-4, above=0)
    weight_decay: float = limited(0.0, at_least=0)
    schedule: Literal["plateau", "onecycle", "constant"] = "plateau"
    plateau_patience: int = limited(50, at_least=1)
    plateau_factor: float = limited(0.2, above=0, below=1)
    gradient_clip: float = limited(0.0, at_least=0)
    selection: Literal["best", "last"] = "best"
    validation_loss: Literal["objective", "ground_truth"] = "objective"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    compile: bool = False
    logger: Literal["tensorboard", "csv", "wandb", "mlflow"] = "tensorboard"
    teacher_cache: Literal["auto", "off", "memory", "disk"] = "auto"
    teacher_cache_storage: Literal["full", "half"] = "full"
    teacher_cache_gib: float = limited(20.0, above=0)
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    threads: int = limited(0, at_least=0)
    deterministic: bool = False
    seed: int = limited(0, at_least=0, below=2**32)


@dataclass(frozen=True)
class RunConfig:
    """Where results go.

    Args:
        preset: Values to start from: "demo" (phantoms, minutes), "cpu" (small real run), "paper",
            "native" (patches at full resolution). "demo" if there is no data_root, otherwise
            "cpu".
        out: Run folder; runs/PRESET if none is given.
        predictions: Write the label maps of the held-out subjects.
    """

    preset: str = "demo"
    out: Path | None = None
    predictions: bool = True


@dataclass(frozen=True)
class Config:
    """Everything that determines a run.

    Args:
        data: Subjects, preprocessing, split.
        network: The networks.
        objective: The student's objective.
        training: The three trainings.
        run: Where results go.
    """

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the flat form, plain values only, as it is written to config.yaml."""
        flat: dict[str, Any] = {}
        for group in fields(self):
            flat |= asdict(getattr(self, group.name))
        return {name: _plain(value) for name, value in flat.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Program:
    """A command that reads the configuration, perhaps with options of its own.

    Attributes:
        name: Of its file.
        description: What --help says first.
        options: Dataclass of its own options.
        out: Default run folder; PRESET stands for the preset.
        first: Options that --help shows beside those of all programs; --help-all shows every one.
    """

    name: str
    description: str
    options: type
    out: str = "runs/PRESET"
    first: tuple[str, ...] = ("labelled", "grid", "fold", "backbone", "recipe", "seed")


@dataclass(frozen=True)
class TrainOptions:
    """What train.py does.

    Args:
        benchmark: Train nothing: measure a step of the student's network in every precision and
            memory format that this machine has, and recommend the options to give.
    """

    benchmark: bool = False


#: Its description is what train.py says of itself.
TRAIN = Program("train.py", "", TrainOptions)


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keep the line breaks of the examples, and show options as they are usually written."""

    def format_help(self) -> str:
        """Return the text."""
        text = re.sub(r"--\w+", lambda flag: flag[0].replace("_", "-"), super().format_help())
        # jsonargparse says twice which files set defaults, with their absolute paths.
        text = re.sub(r"default config file locations:\n.*contents of:", "Defaults:", text)
        return text.replace(f"{_FOLDER.parent}/", "")


def _brief(first: Sequence[str]) -> type[_Formatter]:
    """Return what shows a few options alone."""
    shown = {"help", "help_all", "config", *_FIRST, *first}

    class _Brief(_Formatter):
        def add_argument(self, action: Action) -> None:
            if action.dest in shown:
                super().add_argument(action)

    return _Brief


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """Read the configuration: preset, then --config file, then flags; the later ones win."""
    return parse_for(TRAIN, arguments)[0]


def parse_for(program: Program, arguments: Sequence[str] | None = None) -> tuple[Config, Any]:
    """Read the configuration and the options of a program's own."""
    tokens = _normalised(sys.argv[1:] if arguments is None else arguments, program)
    if program.name != TRAIN.name and early(tokens, "recipe").get("recipe") == "auto":
        raise UserError(f"--recipe auto is for train.py; rows of {program.name} say what they are.")
    preset, recipe, started = _find_layers(tokens)
    parser = _build_parser(preset, program, recipe)
    parser.formatter_class = _Formatter if "--help_all" in tokens else _brief(program.first)
    try:
        values = parser.parse_args(tokens)
    except ArgumentError as error:
        raise UserError(f"{error}\n{program.name} --help-all lists every option.") from error
    own = _group(program.options, values)
    config = _compose(values, program, own)
    # A start that was asked for is tried, and refused where it cannot be.
    return config if started else with_fitting_start(config), own


def changed(config: Config, options: Mapping[str, Any]) -> Config:
    """Return a configuration with other values for some options."""
    try:
        values = _build_parser(config.run.preset).parse_object({**config.to_dict(), **options})
    except ArgumentError as error:
        raise UserError(str(error)) from error
    return _compose(values)


def parsed(kind: Callable[..., _Kind], values: Any, place: str, /, **more: Any) -> _Kind:
    """Make an object of a data class of what a file holds."""
    items = [item for item in fields(cast("Any", kind)) if item.name not in more]
    known = ", ".join(item.name for item in items)
    if not isinstance(values, Mapping):
        raise UserError(f"{place}: expected the keys {known}.")
    given = {name: value for name, value in values.items() if value is not None}
    unknown = [str(name) for name in values if name not in {item.name for item in items}]
    missing = [item.name for item in items if _is_required(item) and item.name not in given]
    if unknown or missing:
        raise UserError(
            f"{place}: expected the keys {known}; unknown keys {', '.join(unknown) or 'none'}; "
            f"missing keys {', '.join(missing) or 'none'}."
        )
    parser = _file_parser(kind)
    try:
        found: _Kind = parser.instantiate(parser.parse_object({"file": given | more})).file
    except (ArgumentError, UserError) as error:
        # The parser has one argument, whose name says nothing to whoever wrote the file.
        told = " ".join(str(error).split()).replace('Parser key "file.', '"')
        raise UserError(f"{place}: {told.removesuffix('.')}.") from error
    return found


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


@lru_cache(maxsize=8)
def _file_parser(kind: Callable[..., Any]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "file")
    return parser


def _preset_file(preset: str) -> Path:
    if preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}: expected one of {', '.join(PRESETS)}.")
    return _FOLDER / f"{preset}.yaml"


def recipe_file(situation: str) -> Path:
    """Return what --recipe auto sets where few subjects are labelled, or all."""
    return _FOLDER / "recipes" / f"{situation}.yaml"


def with_fitting_start(config: Config) -> Config:
    """Let a student start from scratch where --recipe auto finds no weights that would fit it."""
    network, data = config.network, config.data
    alike = network.of("teacher") == network.of("student")
    seen = data.teacher_modalities or data.student_modalities
    if config.objective.recipe != "auto" or (alike and {*data.student_modalities} <= {*seen}):
        return config
    return replace(config, network=replace(network, start="scratch"))


def recipe_text(config: Config) -> str:
    """Say in one line what --recipe auto has chosen, with what was given otherwise in its place."""
    options = config.to_dict()
    situation = _situation(options)
    names = [*read_mapping(recipe_file(situation))]
    if config.objective.objective != "kdnet":
        # Others have constants of their own, and read none of the recipe's.
        names = ["objective", *(name for name in names if name == "start")]
    told = {"few": "few labelled subjects", "all": "all subjects labelled"}[situation]
    return f"Recipe for {told}: {in_words({name: options[name] for name in names})}"


def in_words(options: Mapping[str, Any]) -> str:
    """Return options in one line."""
    return ", ".join(f"{name} {'none' if v is None else v}" for name, v in options.items())


def _groups() -> dict[str, Any]:
    """The data classes of all options; where a run goes comes first in --help."""
    return {"run": RunConfig} | {item.name: item.default_factory for item in fields(Config)}


# Every row of a plan is parsed by the same one.
@lru_cache(maxsize=4)
def _build_parser(preset: str, program: Program = TRAIN, recipe: str = "options") -> ArgumentParser:
    layers = [_preset_file(preset)]
    if recipe != "options" and program.name == TRAIN.name:
        layers.append(recipe_file(recipe))
    parser = ArgumentParser(
        prog=program.name,
        description=program.description,
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[str(layer) for layer in layers],
        formatter_class=_Formatter,
        usage=f"{program.name} [--OPTION VALUE ...]",
    )
    parser.add_argument("--help_all", action="help", help="Show every option and exit.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    for group in (program.options, *_groups().values()):
        parser.add_class_arguments(group)
    parser.set_defaults(preset=preset)
    return parser


def _normalised(tokens: Sequence[str], program: Program) -> list[str]:
    """Accept --data-root for --data_root, and t1,t2 or 64,64,32 without brackets."""
    groups: Iterable[Any] = (program.options, *_groups().values())
    lists = {f"--{x.name}" for group in groups for x in fields(group) if "tuple[" in str(x.type)}

    def bracketed(flag: str, value: str) -> str:
        plain = flag not in lists or value == "null" or value.startswith("[")
        return value if plain else f"[{value}]"

    result: list[str] = []
    flag = ""
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            flag = name.replace("-", "_").replace("__", "--", 1)
            result.append(flag + equals + (bracketed(flag, value) if equals else ""))
        else:
            result.append(bracketed(flag, token))
    return result


def early(tokens: Sequence[str], *names: str) -> dict[str, str]:
    """Return the options among some that are given, before all others are read."""
    first = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    for name in names:
        first.add_argument(f"--{name}", type=str)
    try:
        found = vars(first.parse_known_args(list(tokens))[0])
    except ArgumentError as error:
        raise UserError(str(error)) from error
    return {name: value for name, value in found.items() if value}


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options as they would stand on a command line."""
    return [
        text
        for name, value in options.items()
        for text in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def _find_layers(tokens: Sequence[str]) -> tuple[str, str, bool]:
    """Look for preset and recipe before anything else is read, as they set the defaults.

    A recipe is "options", which sets none, or that of a situation: "all" or "few". Last, whether
    a start is given.
    """
    decide = ("labelled", "unlabelled_root", "split_file")
    flags = early(tokens, "preset", "recipe", "config", "data_root", "start", *decide)
    given = read_mapping(Path(flags["config"])) if "config" in flags else {}
    given |= flags
    preset = str(given.get("preset") or ("cpu" if given.get("data_root") else "demo"))
    values = {"recipe": "options"} | read_mapping(_preset_file(preset)) | given
    recipe = _situation(values) if values["recipe"] == "auto" else "options"
    return preset, recipe, "start" in given


def _situation(options: Mapping[str, Any]) -> Literal["few", "all"]:
    """Say whether few subjects are labelled, or all."""
    # What comes from the command line is text here.
    given = {k: v for k, v in options.items() if v not in (None, "null")}
    if "labelled" in given or "unlabelled_root" in given:
        return "few"
    lists = read_mapping(Path(given["split_file"])) if "split_file" in given else {}
    folds = lists.get("folds", [lists])
    # Lists of another form are refused where they are used.
    named = [f for f in folds if isinstance(f, dict)] if isinstance(folds, list) else []
    return "few" if any(fold.get("unlabelled") for fold in named) else "all"


def _group(kind: Any, values: Namespace) -> Any:
    return kind(**{item.name: values[item.name] for item in fields(kind)})


def _compose(values: Namespace, program: Program = TRAIN, *own: Any) -> Config:
    """Make the configuration of what was read, and check it."""
    config = Config(**{name: _group(kind, values) for name, kind in _groups().items()})
    preset = config.run.preset
    out = config.run.out or Path(program.out.replace("PRESET", preset))
    config = replace(
        config,
        network=_without_foreign(config.network, read_mapping(_preset_file(preset))),
        run=replace(config.run, out=out),
    )
    groups = (getattr(config, item.name) for item in fields(config))
    wrong = [*out_of_range(*own, *groups), *_contradictions(config)]
    if wrong:
        raise UserError("\n".join(wrong))
    return config


def _without_foreign(network: NetworkConfig, preset: Mapping[str, Any]) -> NetworkConfig:
    """Give the arguments of a preset to its own backbone and to no other."""
    own = preset["backbone_arguments"]
    if network.backbone == preset["backbone"]:
        return network
    if network.teacher_backbone == preset["backbone"] and (
        network.teacher_backbone_arguments is None
    ):
        network = replace(network, teacher_backbone_arguments=own)
    given = network.backbone_arguments.items()
    kept = {name: value for name, value in given if name not in own or own[name] != value}
    return replace(network, backbone_arguments=kept)


def _contradictions(config: Config) -> list[str]:
    """Which options do not go together, one sentence each."""
    data, objective, training = config.data, config.objective, config.training
    needs_validation = training.selection == "best" or training.schedule == "plateau"
    has_bottleneck = objective.objective == "kdnet" and objective.latent_weight > 0
    given_teacher = config.network.teacher_model is not None
    part = data.leave_out
    problems = {
        f"fold is {data.fold}; expected 0 to {data.folds - 1}.": not 0 <= data.fold < data.folds,
        f"phantoms is {data.phantoms}; expected 6 or more, and folds.": (
            data.phantoms < max(6, data.folds)
        ),
        "student_modalities is empty; expected one or more.": not data.student_modalities,
        f"leave_out is {part}; expected a part from 0, and the number of parts, 2 or more.": (
            part is not None and not 0 <= part[0] < part[1] > 1
        ),
        f"patch is {data.patch} and grid is {data.grid}: patches are cut from volumes at their "
        "own resolution, which a grid would change. Leave one out: --grid null or --patch null.": (
            data.patch is not None and data.grid is not None
        ),
        f"patch is {data.patch} and slices is {data.slices}: networks see either patches or "
        "whole slices. Leave one out: --patch null or --slices null.": (
            data.patch is not None and data.slices is not None
        ),
        f"patches_per_case is {data.patches_per_case}, but there are no patches. Give their "
        "size, for example --patch 128,128,128.": (
            data.patch is None and data.patches_per_case > 0
        ),
        f"empty_slices is {data.empty_slices}, but there are no slices. Give their plane, for "
        "example --slices axial.": data.slices is None and data.empty_slices < 1,
        f"out_of_fold is {objective.out_of_fold}, but teacher_model gives a teacher that was "
        "trained already. Leave either out.": objective.out_of_fold > 1 and given_teacher,
        f"out_of_fold is {objective.out_of_fold} and latent_weight {objective.latent_weight}: "
        "bottlenecks come from one teacher, which was trained on a part of the subjects that "
        "it would teach. Set --latent-weight 0.": objective.out_of_fold > 1 and has_bottleneck,
        "validation_fraction is 0, but selection best and schedule plateau need validation "
        "subjects. Set --selection last and --schedule onecycle, or a larger fraction.": (
            data.validation_fraction == 0 and needs_validation
        ),
        "validation_loss is ground_truth, but imitation 1 leaves no such term.": (
            training.validation_loss == "ground_truth" and objective.imitation == 1
        ),
    }
    return [problem for problem, found in problems.items() if found]
