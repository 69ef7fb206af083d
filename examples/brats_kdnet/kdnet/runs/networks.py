"""The networks of a run: what each sees, how it is described and built, and whether rows fit."""

import ast
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kdnet.recipes
import privdistill
from kdnet.config import Config, DataConfig
from kdnet.data.description import Description
from kdnet.data.splits import Split, seen_before
from kdnet.data.targets import number_of_outputs
from kdnet.environment import processors
from kdnet.errors import UserError
from kdnet.models import check_axes, with_known
from kdnet.models.trust import check_trusted
from kdnet.recipes import Recipe, Setting, recipe_of
from kdnet.recipes.comparators import privileged_modalities
from kdnet.rows import Row
from kdnet.training.checkpoint import ModelMetadata, check_compatible, read_metadata
from kdnet.training.runtime import check_precision, device_type
from privdistill import DistillationWrapper, PrivDistillError, TeacherCache


def workers(data: DataConfig) -> int:
    """Return how many processes read and preprocess."""
    return data.workers or processors()


def view_of(role: str, data: DataConfig, description: Description) -> tuple[str, ...]:
    """Return the modalities that a network sees, in channel order."""
    every = tuple(description.modalities)
    return (data.teacher_modalities or every) if role == "teacher" else data.student_modalities


def stacked(data: DataConfig, description: Description) -> tuple[str, ...]:
    """Return the modalities that any network sees, in the order of the description."""
    used = {name for role in ("teacher", "student") for name in view_of(role, data, description)}
    return tuple(name for name in description.modalities if name in used)


def check_views(data: DataConfig, description: Description) -> None:
    """Make sure that the modalities of both networks exist."""
    seen = dict.fromkeys(m for r in ("teacher", "student") for m in view_of(r, data, description))
    unknown = [name for name in seen if name not in description.modalities]
    if unknown:
        raise UserError(
            f"{description.name} has no modality {', '.join(unknown)}; it has "
            f"{', '.join(description.modalities)}. Set --student-modalities and "
            "--teacher-modalities."
        )


def describe_network(
    role: str, config: Config, description: Description, name: str = ""
) -> ModelMetadata:
    """Describe the network of a role."""
    data, network = config.data, config.network
    view = view_of(role, data, description)
    backbone, arguments = network.of(role)
    if backbone == "synthesis":
        arguments = _synthesised(view, view_of("teacher", data, description)) | arguments
    if data.slices is not None:
        arguments = with_known(backbone, arguments, spatial_dims=2)
    # The prior of a synthesis is among the arguments of its segmenter.
    prior = backbone == "synthesis" or arguments.get("prior") is not None
    if network.activation == "softmax" and prior:
        arguments = with_known(backbone, arguments, exclusive=True)
    return ModelMetadata(
        role=name or role,
        backbone=backbone,
        backbone_arguments=arguments,
        in_channels=len(view),
        out_channels=number_of_outputs(description, network.activation),
        modalities=view,
        activation=network.activation,
        description=description,
        # Patches are cut from whole volumes, unless a crop is asked for.
        crop=data.crop or (description.crop if data.patch is None else None),
        grid=None if data.patch is not None else data.grid or description.grid,
        patch=data.patch,
        slices=data.slices,
        normalise=data.normalise,
        resample=data.resample,
    )


def _synthesised(view: tuple[str, ...], teacher_view: tuple[str, ...]) -> dict[str, int]:
    """How many modalities a synthesis makes; where there are none, the recipe says so."""
    more = {*teacher_view} - {*view}
    return {"synthesised": len(privileged_modalities(view, teacher_view))} if more else {}


def build(metadata: ModelMetadata) -> nn.Module:
    """Build the untrained network that metadata describe."""
    network = metadata.build()
    check_axes(metadata.backbone, network, len(metadata.input_size))
    return network


def setting_of(
    row: Row,
    config: Config,
    description: Description,
    network: nn.Module,
    teachers: Iterable[nn.Module] = (),
) -> Setting:
    """Return what the recipe of a row is given."""
    return Setting(
        network=network,
        teachers=tuple(teachers),
        options=config.objective,
        modalities=stacked(config.data, description),
        view=view_of(row.role, config.data, description),
        teacher_view=view_of("teacher", config.data, description),
        classes=number_of_outputs(description, config.network.activation),
        start=config.network.start,
    )


def is_given(row: Row, config: Config) -> bool:
    """Say whether a row's network is the one of --teacher-model, instead of being trained."""
    plain = row.role == "teacher" and row.recipe == "supervised" and not row.options
    return config.network.teacher_model is not None and plain


def wrapped(
    recipe: Recipe,
    metadata: ModelMetadata,
    modalities: Sequence[str],
    cache: TeacherCache | None = None,
) -> DistillationWrapper:
    """Put the networks of a recipe into a wrapper."""
    return DistillationWrapper(
        recipe.teacher,
        recipe.network,
        objective=recipe.objective,
        inputs=recipe.inputs,
        taps=recipe.taps,
        activation=metadata.activation,
        example=torch.zeros(1, len(modalities), *metadata.input_size),
        cache=cache,
        start=recipe.start,
    )


def rehearse(
    row: Row, config: Config, description: Description, teacher: ModelMetadata | None
) -> dict[str, Any]:
    """Put the networks of a row together once, and return what decides their numbers."""
    _check_scored_view(row, config, description)
    metadata = describe_network(row.role, config, description, row.name)
    network = build(metadata)
    check_precision(
        config.training.precision,
        device_type(config.training.accelerator),
        network,
        tuple(metadata.example.shape),
    )
    teachers = () if teacher is None else tuple(build(teacher) for _ in row.teachers)
    recipe = recipe_of(row, setting_of(row, config, description, network, teachers))
    try:
        wrapped(recipe, metadata, stacked(config.data, description)).close()
    except PrivDistillError as error:
        hint = " Or give --start scratch." if str(error).startswith("inherit:") else ""
        raise UserError(f"{error}{hint}") from error
    return {
        "row": {"recipe": row.recipe, "role": row.role, "teachers": list(row.teachers)},
        "objective": str(recipe.objective),
        "sources": _sources(recipe),
    }


def _check_scored_view(row: Row, config: Config, description: Description) -> None:
    """Refuse a network for any subset that never sees what it will be scored with."""
    if row.recipe != "missing_modality":
        return
    trained, scored = (view_of(r, config.data, description) for r in (row.role, "student"))
    unseen = [modality for modality in scored if modality not in trained]
    if unseen:
        raise UserError(
            f"its network is trained with {', '.join(trained)} (--teacher-modalities) and scored "
            f"with {', '.join(scored)} (--student-modalities), so that it would never have seen "
            f"{', '.join(unseen)}. Give the teacher's modalities those of the student, too."
        )


_OURS = ("kdnet", "privdistill")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: Folders of the application that decide a network's numbers; others run it and show them.
_DECIDING = ("data", "evaluation", "models", "recipes", "training")


def _sources(recipe: Recipe) -> dict[str, str]:
    """Digests of the code that a row is trained by; not of what shows it."""
    modules = (*recipe.network.modules(), *recipe.objective.modules())
    # Functions are no modules: a loss of the user's own may be one, in a term's attribute.
    parts = [p for module in modules for p in (type(module), *vars(module).values())]
    names = {str(getattr(getattr(part, "func", part), "__module__", None)) for part in parts}
    found = {name: path for one in sorted(names) for name, path in _imported(one).items()}
    application = Path(str(kdnet.recipes.__file__)).parents[1]
    folders = {f"kdnet.{name}": application / name for name in _DECIDING}
    folders["privdistill"] = Path(str(privdistill.__file__)).parent
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            name = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return {name: _code_digest(found[name].read_text(encoding="utf-8")) for name in sorted(found)}


def _imported(name: str) -> dict[str, Path]:
    """The file of a network or loss of the user's own, and those beside it that it imports."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    if not file.endswith(".py") or name.partition(".")[0] in _OURS or _is_installed(file):
        return {}
    first = Path(file)
    root = first.parents[name.count(".") + (first.name == "__init__.py")]
    found, waiting = {name: first}, [first]
    # By what the files say, as another process may not have imported them, or not yet.
    while waiting:
        for path in _neighbours(waiting.pop(), root):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[0] not in _OURS and path not in found.values():
                found[".".join(parts)] = path
                waiting.append(path)
    return found


def _neighbours(file: Path, root: Path) -> Iterator[Path]:
    """Files below a folder that a file imports, and those of the packages that they are in."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names, base = [""], root
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level else root
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
        for name in filter(None, names):
            parts = name.split(".")
            places = [base.joinpath(*parts[: n + 1]) for n in range(len(parts))]
            files = [f for p in places for f in (p.with_name(f"{p.name}.py"), p / "__init__.py")]
            yield from (found for found in files if found.is_file())


def _is_installed(file: str) -> bool:
    """Whether a file came with a package, whose version environment.json has, or with Python."""
    packages = {"site-packages", "dist-packages"}.intersection(Path(file).parts)
    return bool(packages) or Path(file).is_relative_to(Path(os.__file__).parent)


# Rows share most of their code.
@cache
def _code_digest(text: str) -> str:
    """SHA-256 of what Python makes of a text: no comment, docstring or line break matters."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def describe_teacher(path: Path, config: Config, description: Description) -> ModelMetadata:
    """Describe a given teacher, which must fit the run and be one that may be built."""
    found = read_metadata(path)
    trusted = config.network.vouched(own=False)
    check_trusted(str(path), found.backbone, found.backbone_arguments, trusted)
    check_compatible(path, found, describe_network("teacher", config, description))
    return found


def check_references(teacher: str, known: Sequence[str]) -> None:
    """Refuse a teacher that knows subjects whose reference its student does not have."""
    if known:
        raise UserError(
            f"Its teacher, {teacher}, has seen {len(known)} of the subjects that shall have no "
            f"reference, such as {known[0]}: it would bring their references in. Give a teacher "
            "that is trained on the student's labelled subjects alone (labelled in its row, or "
            "--labelled for all rows)."
        )


def check_unseen(path: Path, metadata: ModelMetadata, splits: Mapping[int, Split]) -> None:
    """Refuse a network that has seen what it, or its student, will be tested on, by fold."""
    for fold, split in splits.items():
        leaked = seen_before(split.test, metadata.seen_cases, metadata.description)
        if leaked:
            raise UserError(
                f"{path} was trained on {len(leaked)} subjects of the held-out fold {fold}: "
                f"{', '.join(leaked[:5])}. Its knowledge of them would reach the scores. Give the "
                "network of this fold, or let every fold train its own teacher."
            )
