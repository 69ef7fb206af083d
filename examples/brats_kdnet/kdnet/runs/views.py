"""Which modalities each network sees."""

from kdnet.config import DataConfig
from kdnet.data.description import Description
from kdnet.errors import UserError


def view_of(role: str, data: DataConfig, description: Description) -> tuple[str, ...]:
    """Return the modalities that a network sees, in channel order."""
    every = tuple(description.modalities)
    return (data.teacher_modalities or every) if role == "teacher" else data.student_modalities


def stacked(data: DataConfig, description: Description) -> tuple[str, ...]:
    """Return the modalities that any network sees, in the order of the description."""
    used = {name for role in ("teacher", "student") for name in view_of(role, data, description)}
    return tuple(name for name in description.modalities if name in used)


def check_view(role: str, data: DataConfig, description: Description) -> None:
    """Make sure that a network's modalities exist."""
    unknown = [
        name for name in view_of(role, data, description) if name not in description.modalities
    ]
    if unknown:
        raise UserError(
            f"{description.name} has no modality {', '.join(unknown)}; it has "
            f"{', '.join(description.modalities)}. Set --student_modalities and "
            "--teacher_modalities."
        )
