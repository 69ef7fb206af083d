"""The page of a folder, whatever its plan: one HTML file that needs nothing else, and tables.md."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdnet.errors import UserError, printable
from kdnet.evaluation.scoring import scored_in
from kdnet.files import write_text
from kdnet.results.cost import cost_table
from kdnet.results.figures import Picture, case_gains, colours_of, learning_curves, study_pictures
from kdnet.results.slices import FILE, cut_slices, load_slices
from kdnet.results.stats import METRICS, gains
from kdnet.results.stored import PLAN, ROWS, Results, optional_mapping, read_folder
from kdnet.results.study_tables import Study, outcomes, study_tables, trials_table, unpaired
from kdnet.results.tables import (
    EMPTY_RULE,
    REGIONS,
    SPACES,
    Table,
    as_markdown,
    empty_table,
    gain_table,
    headline,
    published_table,
    results_table,
    subset_table,
    tables_beside_published,
)
from kdnet.training.history import read_history

_TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
_FILES = ("config.yaml", "environment.json", "folds.json")
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
    "percentiles. It is given in voxels, and surface Dice not at all, where the voxel sizes in the "
    "files are nominal."
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
        texts: What files hold, to be unfolded, by their names.
    """

    title: str
    words: Sequence[str] = ()
    outcomes: Sequence[str] = ()
    colours: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[Markup] = ()
    figures: Sequence[Picture] = ()
    tables: Sequence[Table | None] = ()
    more: Mapping[str, Sequence[Table | None]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def shown(self, tables: Sequence[Table | None]) -> list[Table]:
        """Return the tables that have lines."""
        return [table for table in tables if table is not None and len(table.frame)]


def write_reports(folder: Path, trusted: Collection[str] = ()) -> list[Path]:
    """Write the report of a folder, or of every published study below it."""
    below = [] if (folder / PLAN).is_file() else sorted(folder.rglob(ROWS))
    return [write_report(rows.parent, trusted) for rows in below] or [write_report(folder, trusted)]


def write_report(root: Path, trusted: Collection[str] = ()) -> Path:
    """Write report.html and tables.md; of published rows tables.md and the figures alone."""
    results = read_folder(root)
    sections = [*_sections(results, trusted)]
    try:
        for figure in (figure for section in sections for figure in section.figures):
            figure.save(root)
        write_text(root / "tables.md", "\n".join(_markdown(results, sections)))
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error}.") from error
    if (root / ROWS).is_file():
        return root / "tables.md"
    remark = cut_slices(results)
    script = (_TEMPLATES / "viewer.js").read_text(encoding="utf-8")
    # The browser runs this script and no other, whatever the names in the files may hold.
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        results=results,
        facts=results.facts,
        sections=sections,
        slices=load_slices(root / FILE),
        remark=remark,
        left_out=_left_out(root),
        files={name: _text_of(root / name) for name in _FILES},
        citation=results.description.citation if results.description else "",
        script_text=Markup(script),  # noqa: S704
        script_hash=f"sha256-{digest}",
    )
    write_text(root / "report.html", page)
    return root / "report.html"


def _sections(results: Results, trusted: Collection[str]) -> Iterator[Section]:
    """The parts of the page, in their order."""
    yield from _of_study(results) if results.facts.kind == "study" else _of_rows(results)
    if not (results.root / ROWS).is_file():
        yield _curves(results)
        if diagnoses := dict(_diagnoses(results)):
            yield Section("Diagnosis", texts=diagnoses)
        yield Section("Cost", tables=[cost_table(results, trusted)])


def _of_study(results: Results) -> Iterator[Section]:
    spaces = [space for space in SPACES if (results.scores["space"] == space).any()]
    studies = [Study(results, space) for space in spaces]
    first, *others = studies
    what = "Chosen recipe" if first.chosen else "Gains"
    yield Section(
        f"{what}, {SPACES[first.space]}", outcomes=outcomes(first), figures=study_pictures(first)
    )
    tables = {study.where: study_tables(study) for study in others}
    yield Section("Recipes and labels", tables=study_tables(first), more=tables)
    searches = [trials_table(p.parent) for p in sorted(results.root.glob("search-*/trials.json"))]
    if searches:
        yield Section("Searches", tables=searches)
    missing = dict.fromkeys(sentence for study in studies for sentence in unpaired(study))
    if missing:
        yield Section("Pairs that are missing", outcomes=[*missing])


def _of_rows(results: Results) -> Iterator[Section]:
    scores, label = results.scores, results.label
    compared = {metric: gains(scored_in(scores), metric) for metric in METRICS}
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
        },
    )
    first, *others = (gain_table(found, label) for found in compared.values())
    if len(first.frame):
        yield Section(
            "Paired gains",
            words=["Every network on the cases of the baseline beside it, no post-processing."],
            charts=[case_gains(gain, label) for gain in student],
            tables=[first],
            more={"The other scores": others},
        )
    yield Section(
        "How empty regions count", words=[_EMPTY, _FIRST], tables=[empty_table(scores, label)]
    )
    fits = {*scores["region"]} >= {*REGIONS} and results.seen == ["t1ce"]
    if beside := tables_beside_published(results):
        yield Section(
            "Beside the published numbers",
            words=["The paper's own numbers were apparently measured at the training grid."],
            tables=beside,
            more={"What others published": [published_table()] * fits},
        )
    if results.subsets is not None:
        named = [*results.description.modalities] if results.description else results.seen
        spaces = [space for space in SPACES if (results.subsets["space"] == space).any()]
        tables = [subset_table(results.subsets, label, named, space) for space in spaces]
        yield Section("Subsets of modalities", tables=tables)


def _curves(results: Results) -> Section:
    """Learning curves of the first unit of every row."""
    first = {row: results.units(row)[:1] for row in results.rows}
    histories = {
        row: read_history(u / "history.csv") for row, units in first.items() for u in units
    }
    colours = colours_of([*results.rows], results.teachers, results.baseline)
    charts = learning_curves(histories, colours)
    words = (
        "The first fold and seed; dashed: validation. Terms are shown without their weights; the "
        "loss is the weighted sum that was minimised, so that those of different objectives are "
        "not comparable."
    )
    named = {results.label(row): colours[row] for row in histories}
    if not charts:
        return Section("Learning curves", words=["No history was kept."])
    return Section("Learning curves", words=[words], colours=named, charts=charts)


def _diagnoses(results: Results) -> Iterator[tuple[str, str]]:
    """What `privdistill.diagnose` wrote of units, by their names."""
    for row in results.rows:
        for unit in results.units(row):
            if text := _text_of(unit / "diagnosis.md"):
                yield f"{row}/{unit.name}", text


def _text_of(path: Path) -> str:
    """A text file as it is; empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _markdown(results: Results, sections: Sequence[Section]) -> Iterator[str]:
    """Paragraphs of tables.md; the blank line between them is their own."""
    facts = results.facts
    yield f"# {as_markdown(facts.title)}\n"
    if facts.phantom:
        yield "**PHANTOM: synthetic subjects; no number here says anything about patients.**\n"
    yield f"Data: {as_markdown(facts.dataset)}. {as_markdown(facts.protocol)}\n"
    if results.own_options:
        yield f"Options of their own: {as_markdown('; '.join(results.own_options))}.\n"
    for section in sections:
        if section.outcomes:
            yield f"{section.title}:\n"
            yield "\n".join(f"- {as_markdown(sentence)}" for sentence in section.outcomes) + "\n"
        for picture in section.figures:
            title, caption = as_markdown(picture.title), as_markdown(picture.caption)
            yield f"![{title}]({picture.name}.png)\n\n{caption}\n"
        hidden = [table for tables in section.more.values() for table in tables]
        for table in section.shown([*section.tables, *hidden]):
            yield table.markdown()
    if commands := [printable(command) for command in facts.commands]:
        yield "Rows by:\n"
        yield "```bash\n" + "\n".join(commands) + "\n```\n"


def _left_out(root: Path) -> list[dict[str, str]]:
    """Which subjects a run did without, because their files were not sound."""
    problems = optional_mapping(root / "skipped.json").get("problems")
    rows = [row for row in problems if isinstance(row, dict)] if isinstance(problems, list) else []
    return [{key: str(row.get(key, "")) for key in ("subject", "file", "reason")} for row in rows]
