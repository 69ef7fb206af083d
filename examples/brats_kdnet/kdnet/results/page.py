"""What both pages share: reading the folder, small wordings, and one HTML file as the outcome."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdnet.errors import UserError
from kdnet.files import UnreadableError, read_yaml, write_text

_TEMPLATES = Path(__file__).resolve().parents[2] / "templates"


def write_page(target: Path, template: str, content: dict[str, Any]) -> Path:
    """Fill a template and write it as one file that needs nothing else."""
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
    page = environment.get_template(template).render(
        **content,
        script_text=Markup(script),  # noqa: S704
        script_hash=f"sha256-{digest}",
    )
    write_text(target, page)
    return target


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file with keys and values."""
    if not path.is_file():
        return {}
    try:
        content = read_yaml(path)
    except UnreadableError as error:
        raise UserError(f"{path}: expected YAML or JSON, which it is not ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found {type(content).__name__}.")
    return content


def left_out(folder: Path) -> list[dict[str, str]]:
    """Read which subjects a run did without, because their files were not sound."""
    problems = read_mapping(folder / "skipped.json").get("problems")
    rows = [row for row in problems if isinstance(row, dict)] if isinstance(problems, list) else []
    return [{key: str(row.get(key, "")) for key in ("subject", "file", "reason")} for row in rows]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Bring nested mappings to one level."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}: ")
        else:
            result[f"{prefix}{key}"] = value
    return result


def duration(seconds: float) -> str:
    """Say how long something took."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
