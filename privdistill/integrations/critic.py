"""What a loop of somebody else cannot train: no wrapper, or a term with a critic."""

from typing import Any

from privdistill.exceptions import LifecycleError
from privdistill.wrapper import DistillationWrapper


def check_wrapper(network: Any, asks: str) -> None:
    """Refuse a network that is no wrapper.

    Args:
        network: What was passed as the wrapper.
        asks: Name of the class that was given it.

    Raises:
        LifecycleError: If it is anything else.
    """
    if not isinstance(network, DistillationWrapper):
        raise LifecycleError(
            f"{asks}: the network is a {type(network).__name__}; expected a DistillationWrapper. "
            "Build one around teacher and student, DistillationWrapper(teacher, student, "
            "objective=...), and pass it."
        )


def refuse_critic(kd: DistillationWrapper, asks: str) -> None:
    """Refuse a wrapper whose objective has a critic, which would never be trained.

    Args:
        kd: The wrapper.
        asks: Name of the class that was given the wrapper.

    Raises:
        LifecycleError: If a term has a critic, or it is no wrapper.
    """
    check_wrapper(kd, asks)
    terms = [term for _, term in kd.objective.named_terms.values()]
    if any(hasattr(term, "critic") for term in terms):
        raise LifecycleError(
            f"{asks}: a term has a critic, which needs a second optimizer. Leave it out, or write "
            "a plain loop with an optimizer of the critic's and critic_loss()."
        )
