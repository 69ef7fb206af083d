"""From the name of a recipe to what it teaches."""

from errors import UserError
from recipes.distillation import distilled, supervised
from recipes.lesson import Lesson, Setting
from recipes.rows import Row


def lesson_of(row: Row, setting: Setting) -> Lesson:
    """Follow the recipe of a row.

    Args:
        row: Names the recipe.
        setting: Its networks, modalities and options.

    Returns:
        What a `DistillationWrapper` needs.

    Raises:
        UserError: If the recipe and the networks do not fit.
    """
    match row.recipe:
        case "supervised":
            return supervised(setting)
        case "distilled":
            return distilled(setting)
    raise UserError(f"Row {row.name!r}: there is no recipe {row.recipe!r}.")
