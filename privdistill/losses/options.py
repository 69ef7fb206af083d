"""What an option may be: one rule for each kind, and one place that refuses the rest."""

from collections.abc import Callable
from dataclasses import field, fields
from numbers import Real
from typing import Any, NamedTuple, TypeVar

from privdistill.exceptions import ObjectiveError

T = TypeVar("T")
_OF_THE_TERM = frozenset({"tap", "activation", "of", "resize"})


class Rule(NamedTuple):
    """What an option must be.

    Attributes:
        holds: Whether a value is that.
        text: The same in words, after "must be".
    """

    holds: Callable[[Any], bool]
    text: str


def is_number(value: Any) -> bool:
    """Say whether a value is a real number, numpy's included.

    Args:
        value: Anything.

    Returns:
        Whether it can be compared with others.
    """
    return isinstance(value, Real)


def one_of(*choices: str | None) -> Rule:
    """Make a rule of the words that an option may be.

    Args:
        choices: The words; None where the option may be left open.

    Returns:
        The rule.
    """
    words = tuple(choice for choice in choices if choice is not None)
    return Rule(choices.__contains__, f"one of {words}")


POSITIVE = Rule(lambda v: is_number(v) and 0 < v < float("inf"), "positive and finite")
NOT_NEGATIVE = Rule(lambda v: is_number(v) and 0 <= v < float("inf"), "finite and >= 0")
SHARE = Rule(lambda v: is_number(v) and 0 <= v <= 1, "in [0, 1]")
WHOLE = Rule(lambda v: isinstance(v, int) and v >= 1, "a whole number >= 1")
ACTIVATION = one_of(None, "softmax", "sigmoid")
RESIZE = one_of(None, "logits")


def check(owner: str, rule: Rule, **options: Any) -> None:
    """Check options of one kind.

    Args:
        owner: Name of the class or function, for the message.
        rule: What they must be.
        options: Values by name.

    Raises:
        ObjectiveError: If one is anything else.

    Example:
        >>> check("HintonKL", POSITIVE, temperature=4.0)
    """
    for name, value in options.items():
        if not rule.holds(value):
            raise ObjectiveError(f"{owner}: `{name}` must be {rule.text}; got {value!r}.")


def option(default: T, rule: Rule) -> T:
    """Declare an option of a term, as a field of its data class.

    Args:
        default: What it is unless given.
        rule: What it must be.

    Returns:
        The field.
    """
    return field(default=default, metadata={"rule": rule})


def options_of(term: Any) -> dict[str, Any]:
    """Return the options that a term's function takes.

    Args:
        term: An instance of a data class.

    Returns:
        Values by name, without those that say what is compared.
    """
    options = {}
    for declared in fields(term):
        if declared.name not in _OF_THE_TERM:
            options[declared.name] = getattr(term, declared.name)
    return options


def check_options(term: Any) -> None:
    """Check all options of a term against their rules.

    Args:
        term: An instance of a data class.

    Raises:
        ObjectiveError: If one breaks its rule.
    """
    for declared in fields(term):
        if "rule" in declared.metadata:
            rule, value = declared.metadata["rule"], getattr(term, declared.name)
            check(type(term).__name__, rule, **{declared.name: value})
