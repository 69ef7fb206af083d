"""The page of a study: tables.md, with its figures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kdnet.errors import UserError
from kdnet.files import write_text
from kdnet.results.tables import SPACE_NAMES, format_p
from kdnet.studies.analysis import Analysis, analyse
from kdnet.studies.cells import RESAMPLES
from kdnet.studies.facts import FACTS
from kdnet.studies.figures import Missing, Picture, draw_all, save
from kdnet.studies.gains import Comparison, spaces
from kdnet.studies.rows import ROWS, read_study
from kdnet.studies.tables import all_tables, format_gain
from kdnet.studies.trials import Tried, read_searches, trials_table


def find_studies(folder: Path) -> list[Path]:
    """Find the folders of studies."""
    return sorted(path.parent for path in folder.rglob(FACTS) if (path.parent / ROWS).is_file())


def write_study(folder: Path, out: Path | None = None, resamples: int = RESAMPLES) -> Path:
    """Write tables.md and the figures of a study, from its stored rows alone."""
    study = read_study(folder)
    target = folder if out is None else out
    analyses = [analyse(study, space, resamples=resamples) for space in spaces(study)]
    drawn, searches = draw_all(analyses[0]), read_searches(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for picture in drawn:
            _replace(picture, target)
        path = target / "tables.md"
        write_text(path, "\n".join(_parts(analyses, drawn, searches)))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}. Choose another folder.") from error
    return path


def outcomes(analysis: Analysis) -> list[str]:
    """Say what the chosen recipe gained, in a sentence for each setting and region."""
    reference = analysis.facts.label(analysis.facts.reference)
    sentences = []
    for compared, over in (
        (analysis.gains, f"the {reference} with as many labels"),
        (analysis.over_most, f"the {reference} with most labels"),
    ):
        sentences += [
            _outcome(analysis, one, over)
            for one in compared
            if analysis.pairing.is_chosen(one.network)
        ]
    return sentences


def _outcome(analysis: Analysis, one: Comparison, over: str) -> str:
    sentence = (
        f"{one.network.setting}, {one.region}: {analysis.name(one.network)} gains "
        f"{format_gain(one.cells, one.interval)} over {over}; "
        f"{one.wins} of {len(one.cells.cases)} cases are better, {one.losses} worse"
    )
    return f"{sentence}; p after Holm {format_p(one.corrected)}."


def _replace(picture: Picture | Missing, target: Path) -> None:
    """Write a figure, or remove one that older rows gave."""
    if isinstance(picture, Picture):
        save(picture, target)
        return
    for ending in ("png", "svg"):
        (target / f"{picture.name}.{ending}").unlink(missing_ok=True)


def _parts(
    analyses: list[Analysis], drawn: list[Picture | Missing], searches: list[Tried]
) -> Iterator[str]:
    """Paragraphs of the page; the blank line between them is their own."""
    first = analyses[0]
    facts = first.facts
    yield f"# {facts.name}\n"
    if facts.phantom:
        yield "**PHANTOM: synthetic subjects; no number here says anything about patients.**\n"
    yield f"Data: {facts.dataset}. {facts.protocol}\n"
    sentences = outcomes(first)
    if sentences:
        yield f"Chosen recipe, {SPACE_NAMES[first.pairing.space]}:\n"
        yield "\n".join(f"- {sentence}" for sentence in sentences) + "\n"
    for picture in drawn:
        if isinstance(picture, Picture):
            yield f"![{picture.title}]({picture.name}.png)\n\n{picture.caption}\n"
        else:
            yield f"No figure {picture.name}: {picture.reason}\n"
    for analysis in analyses:
        for table in all_tables(analysis):
            yield table.markdown()
    for tried in searches:
        yield trials_table(tried).markdown()
    missing = [sentence for analysis in analyses for sentence in analysis.pairing.missing()]
    if missing:
        yield "Pairs that are missing:\n"
        yield "\n".join(f"- {sentence}" for sentence in dict.fromkeys(missing)) + "\n"
    if facts.commands:
        yield "Rows by:\n"
        yield "```bash\n" + "\n".join(facts.commands) + "\n```\n"
