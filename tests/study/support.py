"""What the tests of studies share: a small study, and a stand-in for training."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import yaml

from transmamba_jax.config import Config
from transmamba_jax.study.spec import Study, load_study

TREE: dict[str, Any] = {
    "question": "Does it work?",
    "claim": "It does",
    "source": "nowhere",
    "config": {
        "model": {
            "vocab_size": 20,
            "num_layers": 2,
            "d_model": 8,
            "num_heads": 2,
            "num_groups": 1,
            "head_dim": 4,
            "state_dim": 4,
            "mlp_dim": 0,
            "dtype": "float32",
        },
        "data": {"source": "synthetic:recall?keys=10&values=10", "seq_len": 12, "batch_size": 4},
        "optimizer": {"learning_rate": 1e-2, "final_learning_rate": 1e-3, "warmup_steps": 0},
        "train": {"steps": 4, "log_every": 2, "sample_tokens": 0},
        "checkpoint": {"every": 2, "keep_best": 0},
        "eval": {"every": 2, "windows": 4, "batch_size": 4},
    },
    "axes": {
        "schedule": {
            "attention": {"model": {"transpoints": ["T"]}},
            "ssm": {"model": {"transpoints": [0]}},
        },
        "state": {"n2": {"model": {"state_dim": 2}}, "n4": None},
    },
    "learning_rates": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "search_seeds": [0, 1, 2],
    "seeds": [10, 11, 12, 13, 14],
    "metric": "eval/accuracy",
    "better": "higher",
    "target": 0.9,
    "budget_hours": 1,
    "seconds_per_cell": 30,
    "figures": ["bars", "curves", "lines", "positions", "rates", "time"],
    "quick": {"axes": {"state": ["n4"]}, "learning_rates": [1e-2], "search_seeds": [0], "seeds": [10, 11]},
}

CHOSEN = {"attention/n2": 1e-3, "attention/n4": 1e-2, "ssm/n2": 3e-3, "ssm/n4": "3e-2"}


def write_study(folder: Path, quick: bool = False, **changes: Any) -> Study:
    """Write the study with changed keys and load it."""
    path = study_file(folder, **changes)
    return load_study(path, quick)


def study_file(folder: Path, **changes: Any) -> Path:
    """Write the file of the study with changed keys."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "little.yaml"
    path.write_text(yaml.safe_dump({**copy.deepcopy(TREE), **changes}), encoding="utf-8")
    return path


def without_search(folder: Path, **changes: Any) -> Path:
    """Write the study with the rates of an earlier one instead of a search."""
    tree = {key: value for key, value in TREE.items() if key not in ("learning_rates", "search_seeds", "quick")}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**tree, "chosen_rates": CHOSEN, "quick": {}, **changes}), encoding="utf-8")
    return path


def accuracy(config: Config) -> float:
    """Return the accuracy of the stand-in: best at 1e-2 with attention, at 1e-1 without, and a little by seed."""
    best = 1e-2 if config.model.transpoints != (0,) else 1e-1
    rate = config.optimizer.learning_rate * config.optimizer.learning_rate_scale
    return 0.95 - 0.2 * abs(math.log10(rate / best)) - 0.001 * config.train.seed


class Trainer:
    """Stands in for training: writes the metrics of a run, or fails where it is told to."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.failures: dict[str, BaseException | int] = {}

    def __call__(self, config: Config) -> int:
        name = str(config.workdir).rpartition("/cells/")[2]
        self.trained.append(name)
        if name in self.failures:
            failure = self.failures[name]
            if isinstance(failure, int):
                return failure
            raise failure
        workdir = Path(config.workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        final = accuracy(config)
        lines: list[dict[str, Any]] = [
            {"step": step, "eval/loss": 1.0, "eval/accuracy": value, "eval/by_position": [[0, 1, 3.0], [1, 12, 2.0]]}
            for step, value in ((2, final / 2), (4, final))
        ]
        lines += [{"step": step, "tokens_per_second": speed} for step, speed in ((1, 5.0), (3, 70.0), (4, 60.0))]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return 0
