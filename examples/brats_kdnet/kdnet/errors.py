"""What the application tells a person whose input cannot be used."""


class UserError(Exception):
    """Input that cannot be used; the message says what was expected, what was found, what to do."""


def printable(text: str, *, keep: str = "") -> str:
    r"""Write out what a terminal would obey instead of showing.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\\nb'
    """
    return "".join(
        letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text
    )
