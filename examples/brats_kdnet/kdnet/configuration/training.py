"""Options of the trainings."""

from dataclasses import dataclass
from typing import Literal


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
        logger: Where the curves go: "tensorboard", "csv", or "wandb" and "mlflow", which need their
            package and lightning. history.csv is written beside all of them.
        performance: "auto" takes the precision, memory format and compilation that are fastest in
            a trial of a few seconds on the network at hand, "plain" 32-true, contiguous and no
            compilation. Either way the next three options win where they are not "auto".
        precision: Precision of the trainings.
        memory_format: Layout of images and weights.
        compile: Compile the networks with torch.compile. "auto" tries it in long runs on a GPU; on
            CPUs it took a minute for each network and gained nothing.
        teacher_cache: Where the teacher's outputs are kept, so that it runs once per subject and
            flip: "disk" (with the preprocessed subjects; processes and later runs share it),
            "memory", or "off". "auto" is "disk", but "off" on a CUDA GPU, where reading what the
            teacher said takes about as long as running it (docs/performance); with several or large
            teachers "disk" may pay there too.
        teacher_cache_storage: "full" keeps every bit, so that the student's weights are those of
            a training without the cache, but for rounding where the last batch is smaller; "half"
            and "8bit" take less and err a little.
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

    epochs: int = 500
    samples_per_epoch: int = 0
    batch_size: int = 2
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: Literal["plateau", "onecycle", "constant"] = "plateau"
    plateau_patience: int = 50
    plateau_factor: float = 0.2
    gradient_clip: float = 0.0
    selection: Literal["best", "last"] = "best"
    validation_loss: Literal["objective", "ground_truth"] = "objective"
    logger: Literal["tensorboard", "csv", "wandb", "mlflow"] = "tensorboard"
    performance: Literal["auto", "plain"] = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    teacher_cache: Literal["auto", "off", "memory", "disk"] = "auto"
    teacher_cache_storage: Literal["full", "half", "8bit"] = "full"
    teacher_cache_gib: float = 20.0
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    threads: int = 0
    deterministic: bool = False
    seed: int = 0
