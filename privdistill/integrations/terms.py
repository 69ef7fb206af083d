"""What a loop of somebody else trains of a wrapper, and logs of a step."""

from torch import Tensor, nn

from privdistill.step import Output
from privdistill.wrapper import DistillationWrapper


def to_train(kd: DistillationWrapper) -> list[nn.Parameter]:
    """Return what an optimizer trains.

    Args:
        kd: The wrapper.

    Returns:
        Parameters of student, adapters and terms, and those of a teacher that learns.
    """
    return [weight for weight in kd.parameters() if weight.requires_grad]


def values(out: Output) -> dict[str, Tensor]:
    """Return the loss, detached, and every term, unweighted, by name.

    Args:
        out: What a step of the wrapper returned.

    Returns:
        Scalars; first "loss".
    """
    return {"loss": out.loss.detach(), **out.terms}


def finest(out: Output) -> Tensor:
    """Return the student's logits, of several heads the first, which is the finest.

    Args:
        out: What a step of the wrapper returned.

    Returns:
        (B, C, *spatial).
    """
    return out.student[0] if isinstance(out.student, list) else out.student
