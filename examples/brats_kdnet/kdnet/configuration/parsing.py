"""One configuration, from a preset, a YAML file and the command line."""

import argparse
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from kdnet.configuration.checks import check_config
from kdnet.configuration.config import Config, RunConfig
from kdnet.configuration.data import DataConfig
from kdnet.configuration.network import NetworkConfig
from kdnet.configuration.objective import ObjectiveConfig
from kdnet.configuration.presets import RECIPE_FILE, preset_file, read_values, without_foreign
from kdnet.configuration.program import TRAIN, Program
from kdnet.configuration.training import TrainingConfig
from kdnet.errors import UserError

# Flags whose values may be written without brackets.
_LISTS = frozenset(
    f"--{name}"
    for name in (
        "student_modalities",
        "teacher_modalities",
        "crop",
        "grid",
        "patch",
        "rows",
        "seeds",
        "leave_out",
        "trust_backbone",
        "region_weights",
        "latent_layers",
    )
)


_GROUPS: dict[str, type] = {
    "run": RunConfig,
    "data": DataConfig,
    "network": NetworkConfig,
    "objective": ObjectiveConfig,
    "training": TrainingConfig,
}


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keep the line breaks of the examples."""


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """Read the configuration: preset, then --config file, then flags; the later ones win."""
    return parse_for(TRAIN, arguments)[0]


def parse_for(program: Program, arguments: Sequence[str] | None = None) -> tuple[Config, Any]:
    """Read the configuration and the options of a program's own."""
    tokens = _normalised(sys.argv[1:] if arguments is None else arguments)
    preset, recipe = _find_layers(tokens)
    try:
        values = _build_parser(preset, program, recipe).parse_args(tokens)
    except ArgumentError as error:
        raise UserError(f"{error}\n{program.name} --help lists every option.") from error
    config = _compose(values, program)
    check_config(config)
    return config, None if program.options is None else _group(program.options, values)


def changed(config: Config, options: Mapping[str, Any]) -> Config:
    """Return a configuration with other values for some options."""
    parser = _build_parser(config.run.preset)
    try:
        other = _compose(parser.parse_object({**config.to_dict(), **options}))
    except ArgumentError as error:
        raise UserError(str(error)) from error
    check_config(other)
    return other


def _build_parser(preset: str, program: Program = TRAIN, recipe: str = "options") -> ArgumentParser:
    parser = ArgumentParser(
        prog=program.name,
        description=program.description,
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[str(preset_file(preset))],
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    own = [] if program.options is None else [program.options]
    for group in (*own, *_GROUPS.values()):
        parser.add_class_arguments(group)
    parser.set_defaults(preset=preset)
    if recipe == "auto" and program == TRAIN:
        parser.set_defaults(read_values(RECIPE_FILE))
    return parser


def _normalised(tokens: Sequence[str]) -> list[str]:
    """Accept --data-root for --data_root, and t1,t2 or 64,64,32 without brackets."""
    result: list[str] = []
    flag = ""
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            flag = name.replace("-", "_").replace("__", "--", 1)
            result.append(flag + equals + (_bracketed(flag, value) if equals else ""))
        else:
            result.append(_bracketed(flag, token))
    return result


def _bracketed(flag: str, value: str) -> str:
    is_list = flag in _LISTS
    return f"[{value}]" if is_list and value != "null" and not value.startswith("[") else value


def _find_layers(tokens: Sequence[str]) -> tuple[str, str]:
    """Look for preset and recipe before anything else is read, as they set the defaults."""
    first = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    for name in ("preset", "recipe", "config", "data_root"):
        first.add_argument(f"--{name}", type=str)
    try:
        known, _ = first.parse_known_args(list(tokens))
    except ArgumentError as error:
        raise UserError(str(error)) from error
    file_values = read_values(Path(known.config)) if known.config else {}
    preset = known.preset or file_values.get("preset")
    data_root = known.data_root or file_values.get("data_root")
    preset = str(preset or ("cpu" if data_root else "demo"))
    own = read_values(preset_file(preset)).get("recipe", "options")
    return preset, str(known.recipe or file_values.get("recipe") or own)


def _group(kind: Any, values: Namespace) -> Any:
    return kind(**{item.name: values[item.name] for item in fields(kind)})


def _compose(values: Namespace, program: Program = TRAIN) -> Config:
    config = Config(**{name: _group(kind, values) for name, kind in _GROUPS.items()})
    config = replace(config, network=without_foreign(config.network, config.run.preset))
    if config.run.out is None:
        out = Path(program.out.replace("PRESET", config.run.preset))
        config = replace(config, run=replace(config.run, out=out))
    return config
