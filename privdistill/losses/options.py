"""What an option may be: one rule for each kind, and one place that refuses the rest."""

from collections.abc import Callable, Iterable
from dataclasses import field, fields
from numbers import Real
from typing import Any, NamedTuple, TypeVar

from privdistill.exceptions import ObjectiveError

T = TypeVar("T")
# Say where a term finds its tensors; its function is given the tensors.
_OF_THE_TERM = frozenset({"tap", "activation", "of", "resize"})


class Rule(NamedTuple):
    """What an option must be: whether a value is that, and in words, after "must be"."""

    holds: Callable[[Any], bool]
    text: str
    # What is kept of a value that may come in several forms.
    read: Callable[[Any], Any] = lambda value: value


def is_number(value: Any) -> bool:
    """Say whether a value is a real number, numpy's included."""
    # A tensor of one number is none: reading it would make a GPU wait.
    return isinstance(value, Real)


def listed(values: Iterable[Any]) -> list[Any]:
    """Return the numbers of a list, an array or a tensor as a list, and a lone one as its only."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Iterable) else [values]


def one_of(*choices: str | None) -> Rule:
    """Make a rule of the words that an option may be; None where it may be left open."""
    words = tuple(choice for choice in choices if choice is not None)
    return Rule(choices.__contains__, f"one of {words}")


POSITIVE = Rule(lambda v: is_number(v) and 0 < v < float("inf"), "positive and finite")
NOT_NEGATIVE = Rule(lambda v: is_number(v) and 0 <= v < float("inf"), "finite and >= 0")
AT_LEAST_ONE = Rule(lambda v: is_number(v) and 1 <= v < float("inf"), "finite and >= 1")
FRACTION = Rule(lambda v: is_number(v) and 0 < v <= 1, "in (0, 1]")
SHARE = Rule(lambda v: is_number(v) and 0 <= v <= 1, "in [0, 1]")
DECAY = Rule(lambda v: is_number(v) and 0 <= v < 1, "in [0, 1)")
WHOLE = Rule(lambda v: isinstance(v, int) and v >= 1, "a whole number >= 1")
# As numbers, so that they can be shown.
CLASS_WEIGHTS = Rule(
    lambda v: v is None or (any(v) and all(map(NOT_NEGATIVE.holds, v))),
    "finite, >= 0, not all 0",
    lambda v: None if v is None else tuple(map(float, v)),
)
ACTIVATION = one_of(None, "softmax", "sigmoid")
RESIZE = one_of(None, "logits")


def check(owner: str, rule: Rule, **options: Any) -> None:
    """Check options of one kind against its rule; `owner` is the class or function they are of."""
    for name, value in options.items():
        if not rule.holds(value):
            raise ObjectiveError(f"{owner}: `{name}` must be {rule.text}; got {value!r}.")


def option(default: T, rule: Rule) -> T:
    """Declare an option of a term, as a field of its data class."""
    return field(default=default, metadata={"rule": rule})


def options_of(term: Any) -> dict[str, Any]:
    """Return the options that a term's function takes, without those that say what it compares."""
    options = {}
    # A loop: a comprehension would be one more call in each term of each step.
    for declared in fields(term):
        if declared.name not in _OF_THE_TERM:
            options[declared.name] = getattr(term, declared.name)
    return options


def check_options(term: Any) -> None:
    """Read all options of a term by their rules."""
    for declared in fields(term):
        if "rule" in declared.metadata:
            name, rule = declared.name, declared.metadata["rule"]
            value = rule.read(getattr(term, name))
            check(type(term).__name__, rule, **{name: value})
            setattr(term, name, value)
