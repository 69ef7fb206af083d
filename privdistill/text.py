"""Tables as plain text."""

from collections.abc import Iterable, Sequence


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay rows out in columns of equal width.

    Args:
        rows: Cells; the first row is the heading.

    Returns:
        One indented line per row.

    Example:
        >>> columns([("tap", "layer"), ("bottleneck", "down4")])
        ['  tap         layer', '  bottleneck  down4']
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [f"  {line.rstrip()}" for line in padded]


def sizes(shape: Iterable[int]) -> str:
    """Write a shape as a product.

    Args:
        shape: Any sizes.

    Returns:
        For instance "8 x 4 x 4".
    """
    return " x ".join(map(str, shape))
