"""With what tests of the application start: the demo without what helps its student."""

from kdnet.data.description import load_description
from kdnet.training.checkpoint import ModelMetadata

PLAIN = [
    *("--preset", "demo", "--labelled", "null", "--recipe", "options", "--seed", "0"),
    *("--augment", "false", "--temperature", "5", "--memory-format", "contiguous"),
    *("--learning-rate", "0.002"),
]
#: The same with validation subjects and exclusive classes.
QUICK = [*PLAIN, "--validation-fraction", "0.15", "--activation", "softmax"]
#: Networks, grid and processor with which a training takes a second.
TINY = [
    *("--backbone-arguments", '{"channels": [2, 4]}', "--grid", "8,8,8", "--threads", "1"),
    *("--workers", "1", "--accelerator", "cpu"),
]
#: What most model files say; tests replace what they are about.
STUDENT = ModelMetadata(
    role="student",
    backbone="kdnet",
    backbone_arguments={"channels": [4, 8]},
    in_channels=1,
    out_channels=4,
    modalities=("t1ce",),
    activation="softmax",
    description=load_description("brats2021"),
    crop=None,
    grid=(16, 16, 16),
)
