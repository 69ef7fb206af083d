"""What the application tells a person whose input cannot be used."""


class UserError(Exception):
    """Input that cannot be used; the message says what was expected, what was found, what to do.

    The entry points print the message alone, without a traceback, and exit with status 2.
    """
