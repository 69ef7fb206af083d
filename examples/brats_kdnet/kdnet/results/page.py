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
from kdnet.results import tables
from kdnet.results.cost import cost_table
from kdnet.results.figures import Picture, case_gains, colours_of, learning_curves, study_pictures
from kdnet.results.slices import FILE, cut_slices, load_slices
from kdnet.results.stats import METRICS, gains
from kdnet.results.stored import PLAN, ROWS, Results, optional_mapping, read_folder
from kdnet.results.study_tables import Study, outcomes, study_tables, trials_table, unpaired
from kdnet.results.tables import EMPTY_RULE, REGIONS, SPACES, Table, as_markdown
from kdnet.training.history import read_history

_TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
_FILES = ("config.yaml", "environment.json", "folds.json")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        words: What stands below it instead of what the template says there.
        outcomes: Sentences that stand out.
        colours: What the colours of the charts mean.
        charts: Figures without captions.
        figures: Figures with captions.
        tables: Shown.
        more: Tables to be unfolded, by what they are.
        texts: What files hold, to be unfolded, by their names.
    """

    title: str
    words: str = ""
    outcomes: Sequence[str] = ()
    colours: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[Markup] = ()
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    more: Mapping[str, Sequence[Table]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def shown(self, several: Sequence[Table]) -> list[Table]:
        """Return the tables that have lines."""
        return [table for table in several if len(table.frame)]


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
        empty_rule=EMPTY_RULE,
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
    more = {study.where: study_tables(study) for study in others}
    yield Section("Recipes and labels", tables=study_tables(first), more=more)
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
        words=f"{over}in native space:" if student else nothing,
        outcomes=tables.headline(student, label) + tables.nothing_found(scores, label),
        tables=[tables.results_table(scores, label)],
        more={
            "With small regions removed": [
                tables.results_table(scores, label, postprocessing="on")
            ],
            "On the training grid": [tables.results_table(scores, label, space="grid")],
        },
    )
    first, *others = (tables.gain_table(found, label) for found in compared.values())
    if len(first.frame):
        yield Section(
            "Paired gains",
            charts=[case_gains(gain, label) for gain in student],
            tables=[first],
            more={"The other scores": others},
        )
    yield Section("How empty regions count", tables=[tables.empty_table(scores, label)])
    fits = {*scores["region"]} >= {*REGIONS} and results.seen == ["t1ce"]
    if beside := tables.tables_beside_published(results):
        yield Section(
            "Beside the published numbers",
            tables=beside,
            more={"What others published": [tables.published_table()] * fits},
        )
    if results.subsets is not None:
        named = [*results.description.modalities] if results.description else results.seen
        spaces = [space for space in SPACES if (results.subsets["space"] == space).any()]
        shown = [tables.subset_table(results.subsets, label, named, space) for space in spaces]
        yield Section("Subsets of modalities", tables=shown)


def _curves(results: Results) -> Section:
    """Learning curves of the first unit of every row."""
    first = {row: results.units(row)[:1] for row in results.rows}
    histories = {
        row: read_history(u / "history.csv") for row, units in first.items() for u in units
    }
    colours = colours_of([*results.rows], results.teachers, results.baseline)
    charts = learning_curves(histories, colours)
    named = {results.label(row): colours[row] for row in histories}
    words = "" if charts else "No history was kept."
    return Section("Learning curves", words, colours=named, charts=charts)


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
        hidden = [table for several in section.more.values() for table in several]
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
