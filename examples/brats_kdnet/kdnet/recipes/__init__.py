"""How each row of a table is trained: from the name of its recipe to an objective and its parts."""

from kdnet.recipes.comparators import (
    missing_modality,
    share_deepest_layers,
    synthesise_then_segment,
)
from kdnet.recipes.kdnet import Recipe, Setting, supervised
from kdnet.recipes.objectives import distilled
from kdnet.rows import Row

__all__ = ["Recipe", "Setting", "recipe_of"]

_RECIPES = {
    "supervised": supervised,
    "distilled": distilled,
    "missing_modality": missing_modality,
    "synthesised": synthesise_then_segment,
    "shared": share_deepest_layers,
}


def recipe_of(row: Row, setting: Setting) -> Recipe:
    """Follow the recipe of a row."""
    # Names are checked where rows are read.
    return _RECIPES[row.recipe](setting)
