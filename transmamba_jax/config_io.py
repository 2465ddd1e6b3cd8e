"""Configs as YAML files and command lines: read, override, write, compare.

Nothing outside this module reads YAML or knows how an option is spelt.
"""

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tyro
import yaml

from transmamba_jax import schedule as schedules
from transmamba_jax.config import Config, KernelsConfig
from transmamba_jax.runtime.checks import is_mapping, require, suggestion, typed
from transmamba_jax.runtime.paths import expand_path

Options = TypeVar("Options")

_CONFIGS = Path(__file__).parent / "configs"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment from a YAML file, or one of the package's by its name, and apply command-line overrides.

    `path` is a file or a name that `config_names` lists: `tiny`, `paper/transmamba-1b5`. `overrides` are spelt as on
    the command line: `["--train.steps", "100", "--model.d-model", "256"]`.
    `workdir` defaults to `runs/<file name>`. The config.yaml of a run means that run: its `workdir` is the folder that
    it is in, from whichever folder the command starts and wherever the run was moved to.

    Raises:
        ValueError: the file cannot be read, an unknown key, a wrong type, or values that break a rule; the message
            names the key, what was found, and the nearest valid name or the rule.
    """
    experiment = read_experiment(path)
    return _override(experiment, list(overrides))


class Experiment(NamedTuple):
    """A config, and the name of its schedule where the file gives one: it follows data.seq_len and model.num_layers."""

    config: Config
    schedule: str | None = None


def parse_command_line(
    default: Options, arguments: Sequence[str], prog: str, description: str | None = None, schedule: str | None = None
) -> Options:
    """Apply command-line arguments to a `Config`, or a dataclass with one, as a program does: help and errors exit.

    `schedule` is that of the `Experiment` that `default` comes from: it is scaled again where the arguments change the
    length of rows or the number of layers.

    Raises:
        ValueError: a value breaks a rule, or the named schedule does not fit.
    """
    words, name = _take_schedule(list(arguments), schedule)
    options = tyro.cli(type(default), default=default, args=words, prog=prog, description=description)
    if name is None:
        return options
    if isinstance(options, Config):
        return typing.cast(Options, _scaled(options, name))
    sections = {field.name: getattr(options, field.name) for field in dataclasses.fields(typing.cast(Any, options))}
    scaled = {key: _scaled(value, name) for key, value in sections.items() if isinstance(value, Config)}
    return typing.cast(Options, dataclasses.replace(typing.cast(Any, options), **scaled))


def read_config_file(path: str | Path) -> Config:
    """Read an experiment from a YAML file; see `load_config`."""
    return read_experiment(path).config


def read_experiment(path: str | Path) -> Experiment:
    """Read an experiment from a YAML file and keep the name of its schedule; see `load_config`."""
    return _read(_locate(path))


def config_names() -> list[str]:
    """Return the names of the experiments that come with the package."""
    names = sorted(str(file.relative_to(_CONFIGS).with_suffix("")) for file in _CONFIGS.rglob("*.yaml"))
    return [name for name in names if not name.startswith("studies/")]  # grids of experiments, of another form


def from_yaml(text: str) -> Config:
    """Read a config that `to_yaml` wrote; see `load_config` for what is refused."""
    return typing.cast(Config, _build(Config, yaml.load(text, _Loader), ""))


def from_tree(tree: dict[str, Any]) -> Config:
    """Make a config from a mapping of sections and options; see `load_config` for what is refused."""
    return _experiment(tree).config


def to_tree(config: Config) -> dict[str, Any]:
    """Return a resolved config as a mapping that `from_tree` reads back to an equal config."""
    return _plain(config)


def read_yaml(path: str | Path) -> Any:
    """Read a file of plain YAML in which a key is given once.

    Raises:
        ValueError: the file cannot be read or is not plain YAML.
    """
    path = expand_path(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        names = sorted(file.name for file in path.parent.glob("*.yaml")) if absent and path.parent.is_dir() else []
        there = suggestion(path.name, names) if names and not path.exists() else ""
        raise ValueError(f"cannot read the config {str(path)!r}: {error.strerror}{there}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not plain YAML: {error}") from None


def to_yaml(config: Config) -> str:
    """Write a resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def checkpoint_yaml(config: Config) -> str:
    """Write what belongs to a checkpoint: without `kernels`, so that another device chooses its own."""
    return to_yaml(dataclasses.replace(config, kernels=KernelsConfig()))


def differences(old: Config, new: Config) -> list[str]:
    """Name every field that differs, as `section.key: old -> new`."""
    before, after = _flatten(old), _flatten(new)
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


def _take_schedule(arguments: list[str], name: str | None) -> tuple[list[str], str | None]:
    """Put integers in the place of a schedule's name, which are replaced after parsing; return the name, too.

    Without a schedule among the arguments it is `name`.
    """
    option = "--model.transpoints"
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith(f"{option}=") else [word])]
    if option not in words:
        return (arguments, None) if name is None else ([*arguments, option, "0"], name)
    place = len(words) - words[::-1].index(option)
    value = words[place] if place < len(words) else "-"
    if value.startswith("-") or re.fullmatch(r"\d+", value):
        return arguments, None
    return [*words[:place], "0", *words[place + 1 :]], value


def _scaled(config: Config, name: str) -> Config:
    """Put the schedule called `name` into a config."""
    try:
        points = schedules.choose(name, config.data.seq_len, config.model.num_layers)
    except ValueError as error:
        raise ValueError(f"model.transpoints: {error}") from None
    return dataclasses.replace(config, model=dataclasses.replace(config.model, transpoints=points))


def _override(experiment: Experiment, arguments: list[str]) -> Config:
    if not arguments:
        return experiment.config
    config, given = experiment.config, arguments
    arguments, name = _take_schedule(arguments, experiment.schedule)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            options = (tyro.conf.FlagConversionOff,)
            parsed = tyro.cli(Config, default=config, args=arguments, prog="overrides", config=options)
            return parsed if name is None else _scaled(parsed, name)
    except SystemExit:
        lines = [re.sub(r"[╭╮╰╯│─]+|-{3,}", " ", line).strip() for line in output.getvalue().splitlines()]
        message = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
        message = " ".join(message.split()).removeprefix("Unrecognized options ")
        raise ValueError(f"bad overrides {given}: {message}") from None


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


# YAML 1.1 reads 010 as octal and 1:30 as sexagesimal: here they are text, which no number accepts.
_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _DECIMAL if tag.endswith(":int") else pattern) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read(path: Path) -> Experiment:
    tree = read_yaml(path)
    tree = {} if tree is None else tree
    if isinstance(tree, dict):
        own = {"workdir": str(path.parent)} if path.name == "config.yaml" and _is_run(path.parent) else {}
        tree = {"workdir": f"runs/{path.stem}", **tree, **own}
    try:
        return _experiment(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _experiment(tree: Any) -> Experiment:
    name = None
    if isinstance(tree, dict) and isinstance(tree.get("model"), dict):
        name = tree["model"].get("transpoints")
    if not isinstance(name, str):
        return Experiment(typing.cast(Config, _build(Config, tree, "")))
    config = _build(Config, {**tree, "model": {**tree["model"], "transpoints": [0]}}, "")
    return Experiment(_scaled(config, name), name)


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
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 3e-4 (no dot) as a string; the option's type says what was meant.
        with contextlib.suppress(ValueError):
            return float(value)
    arguments = typing.get_args(hint)
    if is_mapping(hint):
        if isinstance(value, dict):
            inner = typing.get_args(arguments[0])[1]
            value = {key: _typed(inner, item, f"{where}[{key!r}]") for key, item in value.items()}
    elif typing.get_origin(hint) is tuple and isinstance(value, list):
        value = [_typed(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    return typed(hint, value, where)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as what YAML holds: mappings, lists and scalars."""
    hints = typing.get_type_hints(type(config))
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            tree[field.name] = _plain(value)
        elif is_mapping(hints[field.name]):
            tree[field.name] = dict(value)
        else:
            tree[field.name] = list(value) if isinstance(value, tuple) else value
    return tree


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return `section.key` -> what YAML holds for it."""
    flat: dict[str, Any] = {}
    for key, value in _plain(config).items():
        name, field = _join(prefix, key), getattr(config, key)
        flat.update(_flatten(field, name) if dataclasses.is_dataclass(field) else {name: value})
    return flat
