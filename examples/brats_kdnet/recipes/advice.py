"""What a study found for so many subjects with and without a reference, in words.

Source: docs/results/when-it-helps, from the rows of studies/lgg.yaml.
"""

#: Labelled training subjects that the study had at most.
STUDIED = 56


def explain(labelled: int, unlabelled: int) -> str:
    """Say what `--recipe auto` does and what may be expected of it.

    Args:
        labelled: Training subjects with a reference.
        unlabelled: Training subjects without one.

    Returns:
        A few sentences.
    """
    recipe = "Recipe auto: the teacher's soft targets, and the reference with a tenth of the weight"
    if unlabelled:
        expected = (
            f"{unlabelled} of {labelled + unlabelled} training subjects have no reference. The "
            "teacher was not trained on them, and there its targets taught most"
        )
    else:
        expected = (
            "all training subjects have a reference, where the study found no gain over the "
            "baseline. Further subjects without one (--unlabelled_root) would help more"
        )
    more = (
        f" The study had {STUDIED} labelled subjects at most; compare with the baseline."
        if labelled > STUDIED
        else ""
    )
    return f"{recipe}; {expected}.{more} See docs/results/when-it-helps."
