"""What a loop of somebody else logs of a step."""

from torch import Tensor

from privdistill.output import Output


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
