"""Configs as YAML files and command lines: read, override, write, compare.

Nothing outside this module reads YAML or knows how an option is spelt.
"""

import contextlib
import dataclasses
import io
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from transmamba_jax.config import Config, KernelsConfig, require, suggestion
from transmamba_jax.runtime.paths import expand_path

Options = TypeVar("Options")

_CONFIGS = Path(__file__).parent / "configs"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment from a YAML file, or one of the package's by its name, and apply command-line overrides.

    `path` is a file or a name that `config_names` lists: `tiny`, `paper/transmamba-1b5`. `overrides` are spelt as on
    the command line: `["--train.steps", "100", "--model.d-model", "256"]`.
    `workdir` defaults to `runs/<file name>`.

    Raises:
        ValueError: the file cannot be read, an unknown key, a wrong type, or values that break a rule; the message
            names the key, what was found, and the nearest valid name or the rule.
    """
    return _override(_read(_locate(path)), list(overrides))


def parse_command_line(
    default: Options, arguments: Sequence[str], prog: str, description: str | None = None
) -> Options:
    """Apply command-line arguments to a dataclass such as `Config`, as a program does: print help or errors, exit."""
    return tyro.cli(type(default), default=default, args=list(arguments), prog=prog, description=description)


def read_config_file(path: str | Path) -> Config:
    """Read an experiment from a YAML file; see `load_config`."""
    return _read(_locate(path))


def config_names() -> list[str]:
    """Return the names of the experiments that come with the package."""
    return sorted(str(file.relative_to(_CONFIGS).with_suffix("")) for file in _CONFIGS.rglob("*.yaml"))


def from_yaml(text: str) -> Config:
    """Read a config that `to_yaml` wrote; see `load_config` for what is refused."""
    return typing.cast(Config, _build(Config, yaml.load(text, _Loader), ""))


def to_yaml(config: Config) -> str:
    """Write a resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def checkpoint_yaml(config: Config) -> str:
    """Write what belongs to a checkpoint: without `kernels`, so that another device chooses its own."""
    return to_yaml(dataclasses.replace(config, kernels=KernelsConfig()))


def differences(old: Config, new: Config) -> list[str]:
    """Name every field that differs, as `section.key: old -> new`."""
    before, after = _flatten(_plain(old)), _flatten(_plain(new))
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in after if before[key] != after[key]]


def _locate(path: str | Path) -> Path:
    """Return the file of an experiment that is named by its path, or by its name in the package."""
    file = expand_path(path)
    if file.suffix in (".yaml", ".yml") or file.is_file():
        return file
    names, name = config_names(), str(path)
    known = ", ".join(names)
    require(name in names, f"--config must be a YAML file or one of {known}; found {name!r}{suggestion(name, names)}")
    return _CONFIGS / f"{name}.yaml"


def _override(config: Config, arguments: list[str]) -> Config:
    if not arguments:
        return config
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            options = (tyro.conf.FlagConversionOff,)
            return tyro.cli(Config, default=config, args=arguments, prog="overrides", config=options)
    except SystemExit:
        message = re.sub(r"[╭╮╰╯│─]+|-{3,}", " ", output.getvalue())
        raise ValueError(f"bad overrides {arguments}: {' '.join(message.split())}") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a key is given once; of several, YAML itself would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping; here, because later the keys that `<<` brings are among its own."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in first:
                raise yaml.MarkedYAMLError(
                    f"{key.value!r} is given here", first[key.value], "and again", key.start_mark, "keep one of them"
                )
            first[key.value] = key.start_mark
        return node


def _read(path: Path) -> Config:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        near = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"cannot read the config {str(path)!r}: {error.strerror}; found there: {near}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not plain YAML: {error}") from None
    tree = {} if tree is None else tree
    if isinstance(tree, dict):
        tree = {"workdir": f"runs/{path.stem}", **tree}
    try:
        return typing.cast(Config, _build(Config, tree, ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _build(cls: type, tree: Any, prefix: str) -> Any:
    """Make dataclass `cls` from a mapping; every key and type is checked, nothing is cast but int to float."""
    where = prefix or "the config"
    require(isinstance(tree, dict), f"{where} must be a mapping of options, found {tree!r}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, value in tree.items():
        name = str(key)
        require(name in names, f"unknown option {_join(prefix, name)!r}{suggestion(name, names)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(typing.cast(type, hint), value, _join(prefix, name))
        else:
            values[name] = _typed(hint, value, _join(prefix, name))
    return cls(**values)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the annotated type or raise a ValueError that names the option."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        require(value in arguments, f"{where} must be one of {', '.join(map(repr, arguments))}, found {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _typed(inner, value, where)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list, found {value!r}")
        return tuple(_typed(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 3e-4 (no dot) as a string; the option's type says what was meant.
        with contextlib.suppress(ValueError):
            return float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    matches = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    require(matches, f"{where} must be of type {hint.__name__}, found {value!r} of type {type(value).__name__}")
    return value


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _plain(config: Any) -> Any:
    if dataclasses.is_dataclass(config):
        return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = _join(prefix, key)
        flat.update(_flatten(value, name) if isinstance(value, dict) else {name: value})
    return flat
