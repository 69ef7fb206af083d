"""What the application tells a person whose input cannot be used."""


class UserError(Exception):
    """Input that cannot be used; the message says what was expected, what was found, what to do.

    The entry points print the message alone, without a traceback, and exit with status 2.
    """


def printable(text: str, *, keep: str = "") -> str:
    r"""Write out what a terminal would obey instead of showing.

    Names of files and texts in files of others may hold escape sequences, which move the cursor
    or rename the window, marks that turn the direction of writing, and bytes that are no text.

    Args:
        text: Any text.
        keep: Characters that are left as they are, such as line breaks.

    Returns:
        The text, with all others that cannot be printed as escapes.

    Example:
        >>> printable("a\x1b[31m\nb")
        'a\\x1b[31m\\nb'
    """
    return "".join(
        letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text
    )
