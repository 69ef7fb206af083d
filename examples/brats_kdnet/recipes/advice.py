"""Which recipe a study found best, for how many subjects with and without a reference.

Source: docs/results/when-it-helps, from the rows of studies/lgg.yaml.
"""

from dataclasses import dataclass, replace
from typing import Any

from config import Config

#: What the study changes of an objective; each wins over a recipe when it is given.
ADVISED: dict[str, Any] = {
    "imitation": 0.9,
    "temperature": 1.0,
    "binarisation": "soft",
    "latent_weight": 0.0,
}
#: Most labelled training subjects that the study had.
STUDIED = 56


@dataclass(frozen=True)
class Advice:
    """Options of an objective, and why.

    Attributes:
        options: Names and values.
        why: One or two sentences.
    """

    options: dict[str, Any]
    why: str


def advise(labelled: int, unlabelled: int) -> Advice:
    """Choose how a student is taught.

    Args:
        labelled: Training subjects with a reference.
        unlabelled: Training subjects without one.

    Returns:
        The options and the reason.
    """
    if unlabelled:
        parts, why = (
            1,
            (
                f"{unlabelled} of {labelled + unlabelled} training subjects have no reference; the "
                "teacher has never seen them, and its soft targets teach most there."
            ),
        )
    else:
        parts, why = (
            2,
            (
                "all training subjects have a reference; each is taught by a teacher that was not "
                "trained on it, for which two more teachers are trained."
            ),
        )
    if labelled > STUDIED:
        why += f" The study had {STUDIED} labelled subjects at most: compare with the baseline."
    return Advice(ADVISED | {"out_of_fold": parts}, why)


def advised(config: Config, labelled: int, unlabelled: int) -> tuple[Config, str | None]:
    """Apply the advice where the configuration asks for it.

    Args:
        config: Asks with `recipe: auto`.
        labelled: Training subjects with a reference.
        unlabelled: Training subjects without one.

    Returns:
        The configuration, and what was chosen and why in a sentence; None where nothing was.
    """
    if config.objective.recipe != "auto":
        return config, None
    advice = advise(labelled, unlabelled)
    chosen = ", ".join(f"{name} {value}" for name, value in advice.options.items())
    said = f"Recipe: {chosen}; {advice.why} See docs/results/when-it-helps.md."
    return replace(config, objective=replace(config.objective, **advice.options)), said
