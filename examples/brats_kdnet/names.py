"""Names that come from files and become parts of paths."""


def is_name(text: object) -> bool:
    r"""Say whether something may name a file or a folder inside another one.

    Args:
        text: What a file calls a subject, a row, a modality.

    Returns:
        Whether it is a text of printable characters that stays where it is put: without slashes of
        either kind, not empty, and not beginning with a dot.

    Example:
        >>> [is_name(text) for text in ("kdnet", "case 1", "../x", "/etc", "a\\nb", "", 3)]
        [True, True, False, False, False, False, False]
    """
    return (
        isinstance(text, str)
        and text.isprintable()
        and bool(text)
        and not text.startswith(".")
        and not {*text} & {"/", "\\"}
    )
