"""The nine figures: who competes, and what is made of the times."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from contest import (
    Contestant,
    Interval,
    Report,
    check_same_work,
    difference,
    exponent,
    median,
    race,
    ratio,
    silent,
)
from memory import in_fresh_process
from network import TINY, USUAL, World, make_world
from peers import PEERS
from privdistill import GroundTruth, TeacherCache
from steps import (
    by_hand,
    by_hand_with_terms,
    by_wrapper,
    latent_objective,
    objective,
    plain_objective,
    precomputed_teacher,
    running_teacher,
)

HERE = Path(__file__).parent
MEMORY = str(HERE / "memory.py")
UNITS = {"us": " µs", "ms": " ms", "MiB": " MiB"}


@dataclass(frozen=True)
class Settings:
    """How long is measured.

    Attributes:
        rounds: Of a race between steps of the usual network.
        threads: Of torch.
        quick: As little as shows that everything runs; the numbers mean nothing.
        report: Is told the share of the figure that is done.
    """

    rounds: int = 40
    threads: int = 2
    quick: bool = False
    report: Report = silent

    def part(self, begin: float, end: float) -> Report:
        """Report a part of the figure."""
        return lambda share: self.report(begin + (end - begin) * share)


@dataclass(frozen=True)
class Row:
    """One number of a figure.

    Attributes:
        what: What it is, in words.
        estimate: With its 95 % interval, or the extremes where the unit is MiB.
        unit: "ratio", "exponent", "us", "ms" or "MiB".
        goal: Not to be exceeded; None if there is none.
    """

    what: str
    estimate: Interval
    unit: str = "ratio"
    goal: float | None = None

    def words(self) -> tuple[str, str, str]:
        """Number, interval and goal, with no more digits than mean something."""
        digits, unit = 0 if self.unit in UNITS else 3, UNITS.get(self.unit, "")
        value, low, high = (f"{number:.{digits}f}" for number in self.estimate)
        interval = f"{low} to {high}" if low != high else ""
        return f"{value}{unit}", interval, "" if self.goal is None else f"≤ {self.goal:g}{unit}"


@dataclass
class Figure:
    """What was found.

    Attributes:
        rows: Numbers.
        remarks: What a reader must know besides.
    """

    rows: list[Row]
    remarks: list[str] = field(default_factory=list)


#: Steps whose teacher is cached and whose loss a plain loop has too, whatever presets say.
_AS_BEFORE = ["--augment", "false", "--activation", "softmax", "--labelled", "null", "--folds", "3"]


def wrapper(settings: Settings) -> Figure:
    """1: what the wrapper adds to a loop written by hand, with the same loss functions."""

    def contestants(world: World) -> dict[str, Contestant]:
        return {
            "hand": by_hand(world.copy()),
            "wrapper": by_wrapper(world.copy(), plain_objective()),
            "terms": by_wrapper(world.copy(), objective()),
        }

    small = contestants(make_world(*TINY))
    apart = check_same_work(small)
    # Threads that wait for one another would hide what Python takes.
    torch.set_num_threads(1)
    rounds = 20 if settings.quick else 15 * settings.rounds
    overhead = race(steps_of(small), rounds, warm_up=20, report=settings.part(0, 0.3))
    torch.set_num_threads(settings.threads)
    rows = [
        Row(f"{what}, tiny network", difference(overhead, name, "hand"), "us", goal)
        for name, what, goal in (
            ("wrapper", "wrapper - hand-written loop", 120.0),
            ("terms", "the same with the library's terms", 350.0),
        )
    ]
    if settings.quick:
        return Figure(rows)
    usual = contestants(make_world(*USUAL))
    apart = max(apart, check_same_work(usual))
    times = race(steps_of(usual), settings.rounds, report=settings.part(0.3, 1))
    rows = [
        Row("wrapper / hand-written loop", ratio(times, "wrapper", "hand"), goal=1.01),
        Row("the same with the library's terms", ratio(times, "terms", "hand")),
        *rows,
    ]
    return Figure(rows, [*same_work(apart), "The tiny network runs in one thread."])


def same_work(apart: float) -> list[str]:
    """Say how well contestants agree."""
    return [f"Weights after three steps differ by {apart:.0e} at most."]


def steps_of(contestants: dict[str, Contestant]) -> dict[str, Callable[[], object]]:
    """Their steps, by name."""
    return {name: contestant.step for name, contestant in contestants.items()}


def raced(
    settings: Settings, world: World, contestants: dict[str, Contestant]
) -> tuple[dict[str, list[float]], list[str]]:
    """Times of contestants that do the same work, and of a supervised step."""
    alone = world.copy()
    apart = check_same_work(contestants)
    supervised = by_hand_with_terms(alone, GroundTruth(smoothing=1.0), None)
    steps = steps_of(contestants) | {"supervised": supervised.step}
    return race(steps, settings.rounds, report=settings.report), same_work(apart)


#: What a cached step is compared with, in both caches.
AIMS = (
    ("precomputed", "loop with precomputed targets", 1.02),
    ("supervised", "supervised step", 1.05),
)


def cache(settings: Settings) -> Figure:
    """2: a distillation step whose teacher is cached."""
    world = make_world(*(TINY if settings.quick else USUAL))
    by_terms = world.copy()
    contestants = {
        "precomputed": by_hand_with_terms(by_terms, objective(), precomputed_teacher(by_terms)),
        "cached": by_wrapper(world.copy(), objective(), cache=TeacherCache()),
        "running": by_wrapper(world.copy(), objective()),
    }
    absent = []
    for name, build in PEERS.items():
        try:
            contestants[name] = build(world.copy())
        except ImportError:
            absent.append(name)
    times, remarks = raced(settings, world, contestants)
    peers = [(name, name, 0.80) for name in PEERS if name not in absent]
    rows = [
        Row(f"cached step / {what}", ratio(times, "cached", name), goal=goal)
        for name, what, goal in (*AIMS, ("running", "step with a running teacher", None), *peers)
    ]
    return Figure(rows, remarks + [f"{name} was not installed." for name in absent])


def disk_cache(settings: Settings) -> Figure:
    """3: the same with the teacher's outputs in files."""
    world = make_world(*(TINY if settings.quick else USUAL))
    by_terms = world.copy()
    with tempfile.TemporaryDirectory() as folder:
        contestants = {
            "precomputed": by_hand_with_terms(by_terms, objective(), precomputed_teacher(by_terms)),
            "memory": by_wrapper(world.copy(), objective(), cache=TeacherCache()),
            "disk": by_wrapper(world.copy(), objective(), cache=TeacherCache(folder)),
        }
        times, remarks = raced(settings, world, contestants)
    rows = [
        Row(f"step cached on disk / {what}", ratio(times, "disk", name), goal=goal)
        for name, what, goal in (("memory", "cached in memory", None), *AIMS)
    ]
    return Figure(rows, remarks)


def early_exit(settings: Settings) -> Figure:
    """4: a step that reads nothing behind the teacher's bottleneck."""
    world = make_world(*(TINY if settings.quick else USUAL))
    whole = world.copy()
    contestants = {
        "full": by_hand_with_terms(whole, latent_objective(), running_teacher(whole)),
        "early": by_wrapper(world.copy(), latent_objective()),
    }
    apart = check_same_work(contestants)
    times = race(steps_of(contestants), settings.rounds, report=settings.report)
    row = Row("early exit / teacher run to its end", ratio(times, "early", "full"), goal=0.84)
    return Figure([row], same_work(apart))


def application(settings: Settings) -> Figure:
    """5: the application's training step against a plain one."""
    from application import Clock, training  # noqa: PLC0415

    preset = "demo" if settings.quick else "cpu"
    clock = Clock(report=settings.report, expected=settings.rounds)
    # Of twelve subjects six or seven train; the first epoch fills the cache.
    epochs = 2 if settings.quick else 1 + -(-settings.rounds // 6)
    options = ["--preset", preset, "--phantoms", "12", "--batch-size", "1", *_AS_BEFORE]
    options += ["--threads", str(settings.threads), "--epochs", str(epochs)]
    options += ["--precision", "bf16-mixed", "--memory-format", "channels_last"]
    with tempfile.TemporaryDirectory() as folder:
        training(Path(folder), options, clock, against_plain=True)
    steps, rivals = (list(chain(*epochs[1:])) for epochs in (clock.steps, clock.rivals))
    found = ratio({"application": steps, "plain": rivals}, "application", "plain")
    row = Row("application / plain float32 step", found, goal=0.45)
    return Figure([row], [f"{len(steps)} steps in bf16-mixed, channels_last."])


def losses(settings: Settings) -> Figure:
    """6: the objective alone against MONAI's and torch's losses."""
    sizes = ["2x4x16x16x16"] if settings.quick else ["2x4x64x64x64", "2x3x128x128x128"]
    rounds = 2 if settings.quick else max(10, settings.rounds // 2)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "objective.json"
        command = [sys.executable, str(HERE / "objective.py"), "--sizes", *sizes]
        command += ["--rounds", str(rounds), "--threads", str(settings.threads)]
        command += ["--json", str(found)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        measured = json.loads(found.read_text(encoding="utf-8"))
    rows = [row for measurement in measured for row in against_others(measurement)]
    return Figure(rows, ["Intervals of times are quartiles here."])


def against_others(found: dict) -> Iterator[Row]:
    """Time and memory of one size and activation."""
    what = f"{found['activation']}, {found['size'].replace('x', ' x ')}"
    time = Interval(found["time_ratio"], found["low"], found["high"])
    yield Row(f"time / MONAI, {what}", time, goal=0.6)
    memory = found["memory_ratio"]
    yield Row(f"memory / MONAI, {what}", Interval(memory, memory, memory), goal=0.5)


def scaling(settings: Settings) -> Figure:
    """7: memory against the size of a patch, time against the number of subjects."""
    patches = (16, 24) if settings.quick else (32, 48, 64, 80, 96)
    repeats = 2 if settings.quick else 3
    runs = [size for _ in range(repeats) for size in patches]
    grown = []
    for done, size in enumerate(runs, start=1):
        grown.append(in_fresh_process(MEMORY, "step", str(size), threads=settings.threads))
        settings.part(0, 0.6)(done / len(runs))
    memory = exponent([size**3 for size in runs], grown)
    subjects, epochs, loading = epochs_by_subjects(settings)
    rows = [
        Row("peak memory against voxels of a patch", memory, "exponent", 1.05),
        Row("epoch time against subjects", exponent(subjects, epochs), "exponent", 1.05),
        Row("epoch / its steps alone", median(loading), goal=1.05),
    ]
    edges, numbers = (", ".join(map(str, dict.fromkeys(axis))) for axis in (patches, subjects))
    return Figure(rows, [f"Patches of edge {edges}; {numbers} training subjects."])


def epochs_by_subjects(settings: Settings) -> tuple[list[int], list[float], list[float]]:
    """Train on ever more phantoms.

    Args:
        settings: How long.

    Returns:
        Subjects and seconds of each epoch, and the ratio of the epoch to its steps.
    """
    from application import Clock, training  # noqa: PLC0415

    subjects, seconds, ratios = [], [], []
    numbers = (6, 12) if settings.quick else (12, 24, 48)
    epochs = 3 if settings.quick else 6
    for done, phantoms in enumerate(numbers, start=1):
        clock = Clock()
        options = ["--preset", "demo", "--phantoms", str(phantoms), "--batch-size", "1"]
        options += [*_AS_BEFORE, "--grid", "32,32,32"]
        options += ["--threads", str(settings.threads), "--epochs", str(epochs)]
        with tempfile.TemporaryDirectory() as folder:
            count = training(Path(folder), options, clock)
        # The first epoch fills the cache of the teacher.
        subjects += [count] * (epochs - 1)
        seconds += clock.epochs[1:]
        ratios += [
            epoch / sum(steps) for epoch, steps in zip(clock.epochs, clock.steps, strict=True)
        ][1:]
        settings.part(0.6, 1)(done / len(numbers))
    return subjects, seconds, ratios


def inference(settings: Settings) -> Figure:
    """8: a case from its files to its label map, by the student and by the teacher."""
    from application import segment, write_case, write_model  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_case(folder)
        images = {
            "teacher": [f"{modality}={path}" for modality, path in files.items()],
            "student": [f"t1ce={files['t1ce']}"],
        }
        models = {role: write_model(role, folder) for role in images}
        steps = {
            role: lambda role=role: segment(models[role], images[role], folder / "out")
            for role in images
        }
        rounds = 2 if settings.quick else min(30, settings.rounds)
        times = race(steps, rounds, warm_up=1, report=settings.part(0, 0.8))
        peaks = {
            role: [
                in_fresh_process(
                    *(MEMORY, "predict", str(models[role]), *images[role]), threads=settings.threads
                )
                for _ in range(1 if settings.quick else 3)
            ]
            for role in images
        }
    for role, seconds in times.items():
        print(f"    {role}: {statistics.median(seconds):.2f} s per case")
    memory = [
        Row(f"peak memory of a case, {role}", spread(values), "MiB")
        for role, values in peaks.items()
    ]
    speed = Row("time of a case, student / teacher", ratio(times, "student", "teacher"))
    return Figure([speed, *memory], ["Of memory the extremes of three runs are given."])


def spread(values: list[float]) -> Interval:
    """Median and extremes of a few measurements."""
    return Interval(statistics.median(values), min(values), max(values))


#: What importing the library takes where torch is there already, in ms of processor time. Compiled
#: code is kept, as an installation keeps it, even where the environment forbids it.
IMPORT = """
import sys, time, torch
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
began = time.process_time()
import privdistill
print(1000 * (time.process_time() - began))
"""


def importing(settings: Settings) -> Figure:
    """9: what `import privdistill` takes on top of `import torch`."""
    rounds = 2 if settings.quick else min(20, settings.rounds)
    with tempfile.TemporaryDirectory() as folder:
        import_time(folder)  # compiles
        times = []
        for done in range(rounds):
            times.append(import_time(folder))
            settings.report((done + 1) / rounds)
    row = Row("import privdistill, after import torch", median(times), "ms", goal=30.0)
    counted = f"{rounds} fresh processes; processor time, code compiled before."
    return Figure([row], [f"The least is {min(times):.0f} ms.", counted])


def import_time(folder: str) -> float:
    """Import the library in a fresh process.

    Args:
        folder: Keeps compiled code.

    Returns:
        Processor time of it alone, ms.
    """
    command = [sys.executable, "-c", IMPORT, folder]
    said = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return float(said.stdout)


#: By the name of the file that holds it: heading, and what makes it.
FIGURES = {
    "wrapper": ("The wrapper", wrapper),
    "cache": ("Teacher cache", cache),
    "disk-cache": ("Teacher cache on disk", disk_cache),
    "early-exit": ("Early exit", early_exit),
    "application": ("The application's step", application),
    "losses": ("The objective", losses),
    "scaling": ("Growth", scaling),
    "inference": ("Inference", inference),
    "import": ("Import", importing),
}
