"""Names that come from files and become parts of paths."""

#: File systems allow 255 bytes for a name, to which endings are added.
LONGEST = 100
#: Spreadsheets take what begins with one of them for a formula, and carry it out.
_FORMULAS = ("=", "+", "-", "@")


def is_name(text: object) -> bool:
    r"""Say whether something may name a file or a folder inside another one.

    >>> [is_name(text) for text in ("kdnet", "case 1", "../x", "/etc", "a\\nb", "", 3)]
    [True, True, False, False, False, False, False]
    """
    return (
        isinstance(text, str)
        and text.isprintable()
        and bool(text)
        and not text.startswith((".", *_FORMULAS))
        and len(text.encode()) <= LONGEST
        and not {*text} & {"/", "\\"}
    )
