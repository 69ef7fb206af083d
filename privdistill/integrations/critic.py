"""Terms that a loop with one optimizer cannot train."""

from privdistill.exceptions import LifecycleError
from privdistill.wrapper import DistillationWrapper


def refuse_critic(kd: DistillationWrapper, asks: str) -> None:
    """Refuse a wrapper whose objective has a critic, which would never be trained.

    Args:
        kd: The wrapper.
        asks: Name of the class that was given the wrapper.

    Raises:
        LifecycleError: If a term has a critic.
    """
    terms = [term for _, term in kd.objective.named_terms.values()]
    if any(hasattr(term, "critic_loss") for term in terms):
        raise LifecycleError(
            f"{asks}: a term has a critic, which needs a second optimizer. Leave it out, or write "
            "a plain loop with kd.critic_parameters() and kd.critic_loss()."
        )
