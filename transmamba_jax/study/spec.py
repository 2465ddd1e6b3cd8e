"""Studies as YAML: a question, a base config, axes of named variants, seeds, and a grid of learning rates."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transmamba_jax import config_io
from transmamba_jax.config import Config, DataConfig
from transmamba_jax.data import synthetic
from transmamba_jax.evaluate.lengths import with_length
from transmamba_jax.runtime import storage
from transmamba_jax.runtime.checks import require, suggestion

Stage = Literal["search", "report"]
Tree = dict[str, Any]

MIN_RATES, MIN_SEARCH_SEEDS, MIN_SEEDS = 5, 3, 5
"""The learning-rate rule: so many rates times seeds choose for each arm, and so many new seeds are reported."""

FIGURES = ("bars", "curves", "lines", "measures", "positions", "rates", "time")

_KEYS = {
    "question": str,
    "claim": str,
    "source": str,
    "config": dict,
    "axes": dict,
    "learning_rates": list,
    "search_seeds": list,
    "chosen_rates": dict,
    "seeds": list,
    "metric": str,
    "better": str,
    "target": float,
    "also": list,
    "measure": dict,
    "report_split": str,
    "budget_hours": float,
    "seconds_per_cell": float,
    "figures": list,
    "quick": dict,
}
_MEASURE = ("data", "eval", "transpoints", "classes", "search")
_QUICK = ".quick"
_OPTIONAL: Tree = {"target": None, "also": [], "measure": {}, "report_split": "test"}
_SEARCH: Tree = {"learning_rates": [], "search_seeds": [], "chosen_rates": {}}
"""Either the first two or the third."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study."""

    variants: tuple[str, ...]
    """The variant of each axis: the arm that the run belongs to."""
    stage: Stage
    """`search`: chooses the arm's learning rate on the validation split; `report`: is reported, on another split."""
    learning_rate: float
    seed: int

    @property
    def arm(self) -> str:
        """Name the arm."""
        return "/".join(self.variants)

    @property
    def name(self) -> str:
        """Name the cell, and its work directory."""
        return f"{self.arm}/{self.stage}-rate{self.learning_rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, checked."""

    name: str
    question: str
    claim: str
    """The claim that is tested."""
    source: str
    """Publication of the claim."""
    config: Tree
    """Base config: sections and options as in a config file."""
    axes: dict[str, dict[str, Tree]]
    """Axis -> variant -> what it changes in the base config. Arms are the product of the axes."""
    learning_rates: tuple[float, ...]
    """Peak learning rates of the search, ascending. The final rate keeps its ratio to the peak."""
    search_seeds: tuple[int, ...]
    chosen_rates: dict[str, float]
    """Arm -> learning rate that the search of an earlier study chose; empty: this study searches."""
    seeds: tuple[int, ...]
    """Seeds of the reported runs; none of them took part in the search."""
    metric: str
    """Field of an evaluation line that is reported, and that the search goes by."""
    better: Literal["higher", "lower"]
    target: float | None
    """Value of the metric for which the table counts the examples that an arm needs."""
    also: tuple[str, ...]
    """Other fields of an evaluation line that the table shows."""
    measure: dict[str, Tree]
    """Name -> an evaluation after training of reported cells: changes of `data` and `eval`, `transpoints: kept` (as
    numbers of tokens, the default) or `scaled` with data.seq_len, `classes: true` for losses by class of token, and
    `search: SHARE` for the TransPoints that a greedy search finds within that share of the cost, see `search`."""
    report_split: str
    """Held-out split of the reported runs. The search uses the base config's `data.eval_split`."""
    budget_hours: float
    """Hours after which one call begins no further cell."""
    seconds_per_cell: float
    """Time of a cell on the machine that the file names; the estimate until cells have been measured."""
    figures: tuple[str, ...]
    quick: bool
    """This is the two-minute variant, which proves the pipeline and no claim."""

    @property
    def search_split(self) -> str:
        """Held-out split that learning rates are chosen on."""
        split: str = merge({"data": {"eval_split": DataConfig.eval_split}}, self.config)["data"]["eval_split"]
        return split

    def arms(self) -> list[tuple[str, ...]]:
        """Return every combination of variants, in the order of the file."""
        return list(itertools.product(*self.axes.values()))

    def search_cells(self) -> list[Cell]:
        """Return the cells that choose learning rates."""
        grid = itertools.product(self.arms(), self.learning_rates, self.search_seeds)
        return [Cell(arm, "search", rate, seed) for arm, rate, seed in grid]

    def report_cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """Return the reported cells of the arms whose learning rate is chosen."""
        grid = itertools.product(self.arms(), self.seeds)
        return [Cell(arm, "report", rates["/".join(arm)], seed) for arm, seed in grid if "/".join(arm) in rates]

    def cell_config(self, cell: Cell, workdir: Path) -> Config:
        """Return the config of a cell.

        Raises:
            ValueError: it breaks a rule of configs; the message names the cell.
        """
        tree = self.config
        for axis, variant in zip(self.axes.values(), cell.variants, strict=True):
            tree = merge(tree, axis[variant])
        split = {"eval_split": self.report_split} if cell.stage == "report" else {}
        tree = merge(
            tree, {"train": {"seed": cell.seed}, "data": {"seed": cell.seed, **split}, "workdir": str(workdir)}
        )
        try:
            tree = _resolve_transpoints(tree)
            config = config_io.from_tree(tree)
            scale = cell.learning_rate / config.optimizer.learning_rate
            optimizer = dataclasses.replace(config.optimizer, learning_rate_scale=scale)
            _check_task(config)
            return dataclasses.replace(config, optimizer=optimizer)
        except ValueError as error:
            raise ValueError(f"cell {cell.name}: {error}") from None

    def measure_config(self, config: Config, name: str) -> Config:
        """Return the config of an evaluation after training of the cell with `config`.

        Raises:
            ValueError: it breaks a rule of configs, or asks a mixture for what is asked of one source; the message
                names the evaluation.
        """
        entry = self.measure[name]
        try:
            sections: Tree = {key: entry[key] for key in ("data", "eval") if key in entry}
            changed = config_io.from_tree(merge(config_io.to_tree(config), sections))
            _check_task(changed)
            require(
                not (changed.data.mixture and ("search" in entry or entry.get("classes"))),
                f"classes and search read one source, found the mixture of {', '.join(changed.data.sources)}",
            )
            scaled = "transpoints" in entry and entry["transpoints"] == "scaled"
            longer = with_length(config, changed.data.seq_len, scaled)
            return dataclasses.replace(changed, model=longer.model)
        except ValueError as error:
            raise ValueError(f"measure {name}: {error}") from None


def load_study(path: Path, quick: bool = False) -> Study:
    """Read a study and check every config that it makes.

    Args:
        path: the YAML file.
        quick: merge what the file has under `quick` into it; the learning-rate rule is then not required.

    Raises:
        ValueError: the file cannot be read, a key is unknown, missing or of another type, the learning-rate rule is
            broken, or a cell's config is invalid.
    """
    tree = config_io.read_yaml(path)
    try:
        _check_keys(tree)
        if quick:
            tree = _quick(tree)
        study = _study(path.stem.removesuffix(_QUICK), tree, quick)
        _check_study(study)
        for arm in study.arms():
            rate = study.chosen_rates["/".join(arm)] if study.chosen_rates else study.learning_rates[0]
            config = study.cell_config(Cell(arm, "search", rate, 0), Path("."))
            for name in study.measure:
                study.measure_config(config, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return study


def keep_file(path: Path, study: Study, out: Path) -> None:
    """Copy the file of a study into its folder, for `find_study`; other processes see a complete file."""
    out.mkdir(parents=True, exist_ok=True)
    name = f"{study.name}{_QUICK if study.quick else ''}.yaml"
    storage.replace_text(out / name, path.read_text(encoding="utf-8"), f"{name}.{os.getpid()}")


def find_study(out: Path) -> Study:
    """Read the study whose results are in a folder.

    Raises:
        ValueError: the folder holds no study, or several.
    """
    files = sorted(out.glob("*.yaml"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{out} must be the folder of a study, with its YAML file, found {found}")
    return load_study(files[0], quick=files[0].stem.endswith(_QUICK))


def merge(tree: Tree, changes: Mapping[str, Any]) -> Tree:
    """Return a tree with changes: mappings are merged, anything else is replaced."""
    merged = dict(tree)
    for key, value in changes.items():
        both = key in merged and isinstance(value, Mapping) and isinstance(merged[key], Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def resolve_point(point: Any, seq_len: int) -> int:
    """Return the tokens of a TransPoint that is a number, `T` or `T/<number>`.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(point, int) and not isinstance(point, bool):
        return point
    head, _, divisor = str(point).partition("/")
    if head != "T" or not (divisor == "" or (divisor.isdecimal() and int(divisor) > 0)):
        raise ValueError(f"a TransPoint must be a number of tokens, T, or T/<number>, found {point!r}")
    return seq_len // int(divisor or 1)


def _resolve_transpoints(tree: Tree) -> Tree:
    """Put numbers for `T` and `T/<number>` in a list of TransPoints; a schedule's name is a config's own matter."""
    if "model" not in tree or "transpoints" not in tree["model"]:
        return tree
    points = tree["model"]["transpoints"]
    if not isinstance(points, list):
        return tree
    require("data" in tree and "seq_len" in tree["data"], "config.data.seq_len must be given: TransPoints depend on it")
    seq_len = tree["data"]["seq_len"]
    return merge(tree, {"model": {"transpoints": [resolve_point(point, seq_len) for point in points]}})


def _check_task(config: Config) -> None:
    """Check that the ids of a synthetic task are those of the model."""
    for source in filter(synthetic.is_synthetic, config.data.sources):
        needed = synthetic.parse(source).vocab_size
        require(
            needed <= config.model.vocab_size,
            f"model.vocab_size={config.model.vocab_size} is too small for {source}, which has ids 0..{needed - 1}",
        )


def _check_keys(tree: Any) -> None:
    if not isinstance(tree, dict):
        raise ValueError(f"a study must be a mapping with the keys {', '.join(_KEYS)}, found {type(tree).__name__}")
    for key in tree:
        _require_known(str(key), list(_KEYS), "key")
    needed = [key for key in _KEYS if key not in _OPTIONAL and key not in _SEARCH]
    needed += [] if "chosen_rates" in tree else ["learning_rates", "search_seeds"]
    missing = [key for key in needed if key not in tree]
    if missing:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    for key, value in tree.items():
        kind = _KEYS[key]
        if not (isinstance(value, kind) or (kind is float and isinstance(value, int) and not isinstance(value, bool))):
            raise ValueError(f"{key} must be of type {kind.__name__}, found {value!r}")


def _require_known(name: str, names: Sequence[str], what: str) -> None:
    require(name in names, f"unknown {what} {name!r}{suggestion(name, names)}")


def _quick(tree: Tree) -> Tree:
    """Merge the quick variant; its `axes` names, for each axis, the variants that are kept; its `measure` and
    `chosen_rates` replace.
    """
    changes = dict(tree["quick"])
    kept = changes.pop("axes", {})
    for key in changes:
        _require_known(key, list(_KEYS), "key of quick")
    merged = merge(tree, changes)
    axes = {}
    for axis, variants in tree["axes"].items():
        names = kept[axis] if axis in kept else list(variants)
        for name in names:
            _require_known(name, list(variants), f"variant of axis {axis}")
        axes[axis] = {name: variants[name] for name in names}
    replaced = {key: changes[key] for key in ("measure", "chosen_rates") if key in changes}
    return {**merged, "axes": axes, **replaced}


def _study(name: str, tree: Tree, quick: bool) -> Study:
    values = {**_OPTIONAL, **_SEARCH, **tree}
    axes = {
        axis: {str(variant): {} if changes is None else changes for variant, changes in variants.items()}
        for axis, variants in values["axes"].items()
    }
    return Study(
        **{key: values[key] for key in ("question", "claim", "source", "config", "metric", "better", "report_split")},
        name=name,
        axes=axes,
        learning_rates=tuple(sorted(map(_number, values["learning_rates"]))),
        search_seeds=tuple(values["search_seeds"]),
        chosen_rates={str(arm): _number(rate) for arm, rate in values["chosen_rates"].items()},
        seeds=tuple(values["seeds"]),
        target=values["target"],
        also=tuple(values["also"]),
        measure={str(name): changes for name, changes in values["measure"].items()},
        budget_hours=float(values["budget_hours"]),
        seconds_per_cell=float(values["seconds_per_cell"]),
        figures=tuple(values["figures"]),
        quick=quick,
    )


def _number(value: Any) -> float:
    try:
        return float(value)  # YAML 1.1 reads 3e-4 (no dot) as a string
    except (TypeError, ValueError):
        raise ValueError(f"a learning rate must be a number, found {value!r}") from None


def _check_study(study: Study) -> None:
    if study.better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower', found {study.better!r}")
    for figure in study.figures:
        _require_known(figure, FIGURES, "figure")
    for name, entry in study.measure.items():
        if not isinstance(entry, dict):
            raise ValueError(f"measure {name} must be a mapping of {', '.join(_MEASURE)}, found {entry!r}")
        for key in entry:
            _require_known(str(key), _MEASURE, f"key of measure {name}:")
        if "transpoints" in entry and entry["transpoints"] not in ("kept", "scaled"):
            raise ValueError(f"measure {name}: transpoints must be kept or scaled, found {entry['transpoints']!r}")
        share = merge({"search": 0}, entry)["search"]
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"measure {name}: search must be a share of the cost in [0, 1], found {share!r}")
    for axis, variants in study.axes.items():
        for variant in variants:
            if not variant or set(variant) & set("/\\ "):
                raise ValueError(f"axis {axis}: a variant's name must have no slash and no space, found {variant!r}")
    if not study.axes or not all(study.axes.values()):
        raise ValueError("axes must have at least one axis, and every axis at least one variant")
    _check_rates(study)
    if "optimizer" not in study.config or "learning_rate" not in study.config["optimizer"]:
        raise ValueError("config.optimizer.learning_rate must be given: the grid's rates are relative to it")


def _check_rates(study: Study) -> None:
    """Check the learning-rate rule: a search of this study, or the choice of an earlier one for every arm."""
    seeds = len(set(study.seeds))
    if study.chosen_rates:
        if study.learning_rates or study.search_seeds:
            raise ValueError("chosen_rates are of an earlier study's search: leave out learning_rates and search_seeds")
        arms = ["/".join(arm) for arm in study.arms()]
        wrong = sorted(set(arms) ^ set(study.chosen_rates))
        if wrong:
            raise ValueError(f"chosen_rates must have one rate for each of {', '.join(arms)}; {wrong[0]} differs")
        if not study.quick and seeds < MIN_SEEDS:
            raise ValueError(f"at least {MIN_SEEDS} seeds are needed, found {seeds}")
        if seeds < 1 or min(study.chosen_rates.values()) <= 0:
            raise ValueError("seeds must not be empty, and chosen_rates positive")
        return
    both = sorted(set(study.search_seeds) & set(study.seeds))
    if both:
        raise ValueError(f"seeds must be new: seed {both[0]} is among search_seeds and seeds")
    found = len(set(study.learning_rates)), len(set(study.search_seeds)), seeds
    if not study.quick and any(
        have < need for have, need in zip(found, (MIN_RATES, MIN_SEARCH_SEEDS, MIN_SEEDS), strict=True)
    ):
        raise ValueError(
            f"at least {MIN_RATES} learning rates, {MIN_SEARCH_SEEDS} search_seeds and {MIN_SEEDS} seeds are needed, "
            f"found {found[0]}, {found[1]} and {found[2]}"
        )
    if min(found) < 1 or study.learning_rates[0] <= 0:
        raise ValueError("learning_rates, search_seeds and seeds must not be empty, and learning rates positive")
