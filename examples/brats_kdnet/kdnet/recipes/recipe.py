"""From the name of a recipe to what it teaches."""

from kdnet.errors import UserError
from kdnet.recipes.distillation import supervised
from kdnet.recipes.lesson import Lesson, Setting
from kdnet.recipes.missing_modality import missing_modality
from kdnet.recipes.objectives import taught_by_objective
from kdnet.recipes.sharing import share_deepest_layers
from kdnet.recipes.synthesis import synthesise_then_segment
from kdnet.rows import Row


def lesson_of(row: Row, setting: Setting) -> Lesson:
    """Follow the recipe of a row."""
    match row.recipe:
        case "supervised":
            return supervised(setting)
        case "distilled":
            return taught_by_objective(setting)
        case "missing_modality":
            return missing_modality(setting)
        case "synthesised":
            return synthesise_then_segment(setting)
        case "shared":
            return share_deepest_layers(setting)
    raise UserError(f"Row {row.name!r}: there is no recipe {row.recipe!r}.")
