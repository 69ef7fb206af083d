"""All benchmarks: the numbers, a file for each figure, the drawing and the page.

    python benchmarks/run.py                    every figure, some ten minutes
    python benchmarks/run.py --only cache       one of them
    python benchmarks/run.py --missing          those that have no file yet

Times are ratios of steps that take turns in one process; an absolute time would say more about the
machine than about the library.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from draw import draw
from figures import FIGURES, Figure, Row, Settings
from page import write_page

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
#: Share of the whole that each figure takes.
SHARES = {
    "wrapper": 0.1,
    "cache": 0.15,
    "disk-cache": 0.1,
    "early-exit": 0.05,
    "application": 0.15,
    "losses": 0.15,
    "scaling": 0.2,
    "inference": 0.15,
    "import": 0.05,
}


class Clock:
    """Shows how far the suite is and how long it still takes."""

    def __init__(self, names: Sequence[str]) -> None:
        self.total = sum(SHARES[name] for name in names)
        self.done = 0.0
        self.began = time.monotonic()

    def show(self, name: str, share: float) -> None:
        """Overwrite one line."""
        part = (self.done + SHARES[name] * share) / self.total
        passed = time.monotonic() - self.began
        left = f"{passed / part * (1 - part):.0f} s left" if part > 0.01 else "..."
        sys.stderr.write(f"\r{name}: {share:4.0%}, {left}        ")
        sys.stderr.flush()

    def finish(self, name: str) -> None:
        """Count a figure as done."""
        self.done += SHARES[name]
        sys.stderr.write("\r" + " " * 40 + "\r")


def show(name: str, figure: Figure) -> None:
    """Print a figure."""
    print(f"{list(FIGURES).index(name) + 1}. {FIGURES[name][0]}")
    for row in figure.rows:
        value, interval, goal = row.words()
        print(f"    {row.what:48} {value} ({interval}) {goal}")
    for remark in figure.remarks:
        print(f"    {remark}")


def save(name: str, figure: Figure, settings: Settings, folder: Path) -> None:
    """Write a figure; the file appears when it is complete."""
    content = {
        "figure": name,
        "rounds": settings.rounds,
        "threads": settings.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "rows": [row_to_dict(row) for row in figure.rows],
        "remarks": figure.remarks,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / f"{name}.json")


def row_to_dict(row: Row) -> dict[str, object]:
    """A row with as many digits as mean something."""
    value, low, high = (round(number, 4) for number in row.estimate)
    numbers = {"value": value, "low": low, "high": high}
    return {"what": row.what, **numbers, "unit": row.unit, "goal": row.goal}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--rounds", type=int, default=40, help="of each race; 30 or more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--missing", action="store_true", help="skip figures that have a file")
    parser.add_argument("--quick", action="store_true", help="show that it runs; means nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, save, draw."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else options.rounds
    settings = Settings(rounds=rounds, threads=options.threads, quick=options.quick)
    there = {file.stem for file in options.results.glob("*.json")} if options.missing else set()
    names = [name for name in FIGURES if name in options.only and name not in there]
    clock = Clock(names)
    for name in names:
        _, measure = FIGURES[name]
        report = lambda share, name=name: clock.show(name, share)  # noqa: E731
        figure = measure(replace(settings, report=report))
        clock.finish(name)
        show(name, figure)
        save(name, figure, settings, options.results)
    # Numbers of a trial run must not reach the documentation.
    if options.results == RESULTS and not options.quick:
        draw(RESULTS, ROOT / "docs" / "performance" / "benchmarks.png")
        write_page(RESULTS, ROOT / "docs" / "performance" / "index.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
