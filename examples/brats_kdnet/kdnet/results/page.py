"""The page of a folder, whatever its plan: one HTML file that needs nothing else, and tables.md."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdnet.errors import UserError, printable
from kdnet.files import write_text
from kdnet.results.cost import cost_table
from kdnet.results.figures import Picture, case_gains, colours_of, learning_curves, study_pictures
from kdnet.results.slices import cut_slices, pictures
from kdnet.results.stats import METRICS, Gain, gains
from kdnet.results.stored import FACTS, PLAN, ROWS, Results, read_folder, read_mapping
from kdnet.results.study_tables import Study, outcomes, study_tables, trials_table, unpaired
from kdnet.results.tables import (
    EMPTY_RULE,
    REGIONS,
    SPACES,
    Table,
    as_markdown,
    case_table,
    empty_table,
    gain_table,
    headline,
    paper_table,
    published_table,
    results_table,
    subset_table,
)
from kdnet.training.history import read_history

_TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
_PAPER = ("Table 1", "Table 2")
_FIRST = (
    "Mean, quartiles and intervals are over cases. Native space is the label map on the original "
    "grid, where tumour outside what the networks see counts as missed; the training grid is the "
    "protocol of the paper, where it is not counted. One fold and one seed do not show how much "
    "another split or another training would change the numbers."
)
_EMPTY = (
    f"{EMPTY_RULE} The diagonal is 373.13 mm for 240 x 240 x 155 voxels of 1 mm; any other image "
    "has its own. The second convention, cases with the region in the reference, leaves out those "
    "whose reference is empty, whatever was predicted. HD95 is the larger of the two directed 95th "
    "percentiles"
)
_NOMINAL = (
    "; it is given in voxels of the respective grid because the voxel sizes in these files are "
    "nominal, and surface Dice is not given"
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        words: Paragraphs below it.
        outcomes: Sentences that stand out.
        colours: What the colours of the charts mean.
        charts: Figures without captions.
        figures: Figures with captions.
        tables: Shown.
        more: Tables to be unfolded, by what they are.
    """

    title: str
    words: Sequence[str] = ()
    outcomes: Sequence[str] = ()
    colours: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[Markup] = ()
    figures: Sequence[Picture] = ()
    tables: Sequence[Table | None] = ()
    more: Mapping[str, Sequence[Table | None]] = field(default_factory=dict)

    def shown(self, tables: Sequence[Table | None]) -> list[Table]:
        """Return the tables that there are."""
        return [table for table in tables if table is not None and len(table.frame)]


def write_reports(folder: Path, trusted: Collection[str] = ()) -> list[Path]:
    """Write the report of a folder, or of every published study below it."""
    if any((folder / name).is_file() for name in (PLAN, ROWS)):
        return [write_report(folder, trusted)]
    below = sorted(path.parent for path in folder.rglob(FACTS) if (path.parent / ROWS).is_file())
    return [write_report(study, trusted) for study in below] or [write_report(folder, trusted)]


def write_report(root: Path, trusted: Collection[str] = ()) -> Path:
    """Write report.html and tables.md; of published rows tables.md and the figures alone."""
    results = read_folder(root)
    sections = list(_sections(results, trusted))
    shown = [figure for section in sections for figure in section.figures]
    try:
        for figure in shown:
            figure.save(root)
        write_text(root / "tables.md", "\n".join(_markdown(results, sections)))
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error}.") from error
    if not (root / PLAN).is_file():
        return root / "tables.md"
    remark = cut_slices(results)
    rows = [results.baseline, results.student]
    teachers = [row for row in results.rows if results.role(row) == "teacher"]
    order = [row for row in dict.fromkeys([*rows, *teachers, *results.rows]) if row]
    content = {
        "results": results,
        "sections": sections,
        "held_out": results.scores["case"].nunique(),
        "folds": results.scores["fold"].nunique(),
        "seeds": sorted(results.scores["seed"].unique().tolist()),
        "names": [results.label(row) for row in rows],
        "figure": pictures(root / "slices.npz", results.seen, order),
        "remark": remark,
        "left_out": _left_out(root),
        "citation": results.description.citation if results.description else "",
        "details": _details(results),
    }
    return _write_page(root / "report.html", content)


def _write_page(target: Path, content: dict[str, Any]) -> Path:
    """Fill the template and write it as one file."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "viewer.js").read_text(encoding="utf-8")
    # The browser runs this script and no other, whatever the names in the files may hold.
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    page = environment.get_template("page.html.j2").render(
        **content,
        script_text=Markup(script),  # noqa: S704
        script_hash=f"sha256-{digest}",
    )
    write_text(target, page)
    return target


def _sections(results: Results, trusted: Collection[str]) -> Iterator[Section]:
    """The parts of the page, in their order."""
    if results.is_study:
        yield from _of_study(results)
    if (results.root / PLAN).is_file():
        if not results.is_study:
            yield from _of_rows(results)
        yield from _beside_others(results)
        yield _curves(results)
        yield Section("Cost", tables=[cost_table(results, trusted), _times(results)])


def _of_study(results: Results) -> Iterator[Section]:
    spaces = [space for space in SPACES if (results.scores["space"] == space).any()]
    studies = [Study(results, space) for space in spaces]
    first, *others = studies
    yield Section(
        f"Chosen recipe, {SPACES[first.space]}",
        outcomes=outcomes(first),
        figures=study_pictures(first),
    )
    tables = {study.where: study_tables(study) for study in others}
    yield Section("Recipes and labels", tables=study_tables(first), more=tables)
    searches = [trials_table(p.parent) for p in sorted(results.root.glob("search-*/trials.json"))]
    if searches:
        yield Section("Searches", tables=searches)
    missing = dict.fromkeys(sentence for study in studies for sentence in unpaired(study))
    if missing:
        yield Section("Pairs that are missing", words=[*missing])


def _of_rows(results: Results) -> Iterator[Section]:
    scores, label = results.scores, results.label
    native = scores[(scores["space"] == "native") & (scores["postprocessing"] == "off")]
    compared = {metric: gains(native, metric) for metric in METRICS}
    student = [gain for gain in compared["dice"] if gain.row == results.student]
    nothing = f"There is no gain to report: {label(results.student) or 'no student'} and its "
    nothing += "baseline were not scored on the same cases."
    over = f"Dice of {label(results.student)} minus Dice of {label(results.baseline)}, per case, "
    yield Section(
        "Results",
        words=[f"{over}in native space:" if student else nothing],
        outcomes=headline(student, label),
        tables=[results_table(scores, label)],
        more={
            "With small regions removed": [results_table(scores, label, postprocessing="on")],
            "On the training grid": [results_table(scores, label, space="grid")],
            "Every held-out case": [case_table(scores, label)],
        },
    )
    others = [gain_table(found, label) for metric, found in compared.items() if metric != "dice"]
    if any(compared.values()):
        yield _gained(student, [gain_table(compared["dice"], label)], others, label)
    words = _EMPTY + _NOMINAL * bool((scores["hd95_unit"] == "voxel").any()) + "."
    yield Section(
        "How empty regions count", words=[words, _FIRST], tables=[empty_table(scores, label)]
    )


def _gained(
    student: Sequence[Gain],
    tables: Sequence[Table | None],
    others: Sequence[Table | None],
    label: Any,
) -> Section:
    words = ["Every network on the cases of the baseline beside it, without post-processing."]
    charts = [case_gains(gain, label) for gain in student]
    return Section(
        "Paired gains", words=words, charts=charts, tables=tables, more={"The other scores": others}
    )


def _beside_others(results: Results) -> Iterator[Section]:
    """Published numbers with their protocols, and subsets of the modalities."""
    scores = results.scores
    # The paper's own numbers were apparently measured at the training grid.
    grid, native = (
        [paper_table(which, scores, results.protocol, space=space) for which in _PAPER]
        for space in ("grid", "native")
    )
    fits = {*scores["region"]} >= {*REGIONS} and results.seen == ["t1ce"]
    if any(grid) or any(native):
        yield Section(
            "Beside the published numbers",
            words=["The paper's own numbers were apparently measured at the training grid."],
            tables=grid,
            more={
                "The same tables in native space": native,
                "What others published": [published_table()] * fits,
            },
        )
    if results.subsets is not None:
        named = [*results.description.modalities] if results.description else results.seen
        spaces = [space for space in SPACES if (results.subsets["space"] == space).any()]
        tables = [subset_table(results.subsets, results.label, named, s) for s in spaces]
        yield Section("Subsets of modalities", tables=tables)


def _curves(results: Results) -> Section:
    """Learning curves of the first unit of every row."""
    histories = {}
    for row in results.rows:
        for unit in [*results.units(row)][:1]:
            histories[row] = read_history(unit / "history.csv")
    teachers = [row for row in results.rows if results.role(row) == "teacher"]
    colours = colours_of([*results.rows], teachers, results.baseline)
    charts = learning_curves(histories, colours)
    words = (
        "The first fold and seed; dashed: validation. Terms are shown without their weights; the "
        "loss is the weighted sum that was minimised, so that those of different objectives are "
        "not comparable."
    )
    named = {results.label(row): colours[row] for row in histories if row in colours}
    kept = [words] if charts else ["No history was kept."]
    return Section("Learning curves", words=kept, colours=named if charts else {}, charts=charts)


def _times(results: Results) -> Table | None:
    """Seconds of the phases of every row, mean over its units."""
    lines, phases = [], dict[str, None]()
    for row in results.rows:
        units = [unit for unit in results.units(row) if (unit / "unit.json").is_file()]
        spent = [_seconds(unit / "unit.json") for unit in units]
        phases |= dict.fromkeys(phase for seconds in spent for phase in seconds)
        lines.append((row, spent))
    shown = [
        [results.label(row), str(len(spent)), *(_mean_time(spent, phase) for phase in phases)]
        for row, spent in lines
        if spent
    ]
    return Table.of("Time, mean over units", ["network", "units", *phases], shown)


def _seconds(path: Path) -> dict[str, float]:
    seconds = read_mapping(path).get("seconds", {})
    if not isinstance(seconds, dict) or any(type(s) not in {int, float} for s in seconds.values()):
        raise UserError(f"{path}: seconds must be numbers by phase. Remove the file.")
    return {str(phase): float(value) for phase, value in seconds.items()}


def _mean_time(spent: Sequence[Mapping[str, float]], phase: str) -> str:
    known = [seconds[phase] for seconds in spent if phase in seconds]
    return duration(sum(known) / len(known)) if known else ""


def duration(seconds: float) -> str:
    """Say how long something took."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _markdown(results: Results, sections: Sequence[Section]) -> Iterator[str]:
    """Paragraphs of tables.md; the blank line between them is their own."""
    yield f"# {as_markdown(results.title)}\n"
    if results.phantom:
        yield "**PHANTOM: synthetic subjects; no number here says anything about patients.**\n"
    yield f"Data: {as_markdown(results.dataset)}. {as_markdown(results.protocol)}\n"
    for section in sections:
        if section.outcomes:
            yield f"{section.title}:\n"
            yield "\n".join(f"- {as_markdown(sentence)}" for sentence in section.outcomes) + "\n"
        for picture in section.figures:
            if picture.figure is None:
                yield f"No figure {picture.name}: {picture.caption}\n"
            else:
                title, caption = as_markdown(picture.title), as_markdown(picture.caption)
                yield f"![{title}]({picture.name}.png)\n\n{caption}\n"
        hidden = [table for tables in section.more.values() for table in tables]
        for table in section.shown([*section.tables, *hidden]):
            yield table.markdown()
        if section.title.startswith("Pairs"):
            yield f"{section.title}:\n"
            yield "\n".join(f"- {as_markdown(sentence)}" for sentence in section.words) + "\n"
    commands = [printable(str(command)) for command in results.facts.get("commands", ())]
    if commands:
        yield "Rows by:\n"
        yield "```bash\n" + "\n".join(commands) + "\n```\n"


def _left_out(root: Path) -> list[dict[str, str]]:
    """Which subjects a run did without, because their files were not sound."""
    problems = read_mapping(root / "skipped.json").get("problems")
    rows = [row for row in problems if isinstance(row, dict)] if isinstance(problems, list) else []
    return [{key: str(row.get(key, "")) for key in ("subject", "file", "reason")} for row in rows]


def _details(results: Results) -> list[Table]:
    """Configuration, environment and case lists."""
    found, root = [], results.root
    for name in ("config.yaml", "environment.json"):
        values = [[key, str(value)] for key, value in _flat(read_mapping(root / name)).items()]
        found.append(Table.of(name, ["", "value"], values))
    folds = read_mapping(root / "folds.json").get("folds", [])
    lists = [
        [f"fold {fold.get('number', place)}, {part}: {len(names)}", ", ".join(map(str, names))]
        for place, fold in enumerate(folds if isinstance(folds, list) else [])
        if isinstance(fold, dict)
        for part, names in fold.items()
        if isinstance(names, list)
    ]
    for key in ("grades", "folds_sha256"):
        lists += [[key, str(results.facts[key])]] if key in results.facts else []
    return [*found, Table.of("Case lists", ["part", "cases"], lists)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings on one level."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        deeper = isinstance(value, dict)
        result |= _flat(value, f"{prefix}{key}: ") if deeper else {f"{prefix}{key}": value}
    return result
