"""What a study found for so many subjects with and without a reference, in words.

Source: docs/results/when-it-helps, from the rows of studies/lgg.yaml and studies/brats2021.yaml.
"""

from kdnet.config import RECIPE_FILE, ObjectiveConfig, read_values

#: Labelled training subjects that the study had at least where a gain was found, and at most.
FEWEST, STUDIED = 20, 56
#: The teacher's lead in Dice below which the student of every study lost.
LEAD = 0.2


def explain(objective: ObjectiveConfig, labelled: int, unlabelled: int) -> str:
    """Say what `--recipe auto` does and what may be expected of it."""
    if objective.objective != "kdnet":
        return (
            f"--objective {objective.objective} has terms of its own, for which --recipe auto and "
            "its study say nothing; compare with the baseline."
        )
    other = _overridden(objective)
    if other:
        return (
            f"Recipe auto, but with {other} as given: no gain was measured for that; compare with "
            "the baseline. See docs/results/when-it-helps."
        )
    found = [_expected(labelled, unlabelled), *_outside(labelled)]
    return (
        "Recipe auto: the teacher's soft targets, and the reference with a tenth of the weight; "
        f"{' '.join(found)} See docs/results/when-it-helps."
    )


def judge(teacher: float, baseline: float) -> str:
    """Say what the lead of the teacher promises."""
    lead = teacher - baseline
    shown = f"The teacher leads the baseline by {100 * lead:+.1f} Dice points in validation"
    if lead < LEAD:
        return (
            f"{shown}. In the studies students lost where the lead was below {100 * LEAD:.0f}: "
            "expect no gain from this teacher, and look at each region's in the report."
        )
    return f"{shown}; in the studies that was needed for a gain, and did not always give one."


def _overridden(objective: ObjectiveConfig) -> str:
    """What differs from the recipe, of the options that it sets."""
    return ", ".join(
        f"{name} {getattr(objective, name)}"
        for name, value in read_values(RECIPE_FILE).items()
        if getattr(objective, name) != value
    )


def _expected(labelled: int, unlabelled: int) -> str:
    if unlabelled:
        return (
            f"{unlabelled} of {labelled + unlabelled} training subjects have no reference. The "
            "teacher was not trained on them, and there its targets taught most."
        )
    return (
        "all training subjects have a reference, where the study found no gain over the "
        "baseline. Further subjects without one (--unlabelled_root) would help more."
    )


def _outside(labelled: int) -> list[str]:
    if labelled > STUDIED:
        return [f"The study had {STUDIED} labelled subjects at most; compare with the baseline."]
    if labelled < FEWEST:
        few = "with 4 of 8 labelled the teacher was poor and its student lost"
        return [f"Gains were found from {FEWEST} labelled on; {few}. Compare with the baseline."]
    return []
