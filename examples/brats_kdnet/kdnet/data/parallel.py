"""Doing the same to every subject, several at a time, behind one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdnet.errors import explained

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_parallel(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    title: str,
    progress: bool = True,
) -> list[Result]:
    """Apply a function to every item with threads."""
    work = list(items)
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(_named, function, item, title) for item in work]
        try:
            return list(
                _tracked((future.result() for future in futures), len(work), title, progress)
            )
        finally:
            for future in futures:
                future.cancel()


def _named(function: Callable[[Item], Result], item: Item, title: str) -> Result:
    """Apply the function; of a lack of memory, say at which item."""
    with explained(f"{title}: {getattr(item, 'name', item)}"):
        return function(item)


def _tracked(results: Iterable[Result], total: int, title: str, progress: bool) -> Iterator[Result]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        yield from bar.track(results, total=total, description=title)
