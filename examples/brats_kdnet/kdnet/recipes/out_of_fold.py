"""Teachers that have not seen the subjects whose students they teach.

A teacher repeats on its own training subjects what their reference says. Only on others does it say
what it has learnt; so the labelled subjects are dealt into parts, a teacher is trained without each
of them, and each subject is taught by those that were not trained on it.

Source: out-of-fold prediction, Wolpert 1992, Stacked Generalization, Neural Networks 5, section 2,
there for combining models; here for the targets of distillation.
"""

from collections.abc import Sequence
from dataclasses import replace

from kdnet.config import Config
from kdnet.recipes.rows import Row


def with_part_teachers(rows: Sequence[Row], config: Config) -> tuple[Row, ...]:
    """Give several teachers to the rows whose options ask for them."""
    by_name = {row.name: row for row in rows}
    found: dict[str, Row] = {}
    for row in rows:
        parts = row.configure(config).objective.out_of_fold
        if row.recipe == "distilled" and row.teacher is not None and parts > 1:
            teachers = part_teachers(by_name[row.teacher], parts)
            found |= {teacher.name: teacher for teacher in teachers}
            names = [teacher.name for teacher in teachers]
            row = replace(row, teacher=names[0], more_teachers=tuple(names[1:]))  # noqa: PLW2901
        found[row.name] = row
    return tuple(found.values())


def part_teachers(teacher: Row, parts: int) -> list[Row]:
    """Return a teacher's row once for each part of the labelled subjects that it does without."""
    return [
        replace(
            teacher,
            name=f"{teacher.name}-without-{part}-of-{parts}",
            label=f"{teacher.label or teacher.name}, without part {part + 1} of {parts}",
            options=teacher.options | {"leave_out": [part, parts]},
        )
        for part in range(parts)
    ]
