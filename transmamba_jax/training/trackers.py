"""Experiment trackers as writers of metrics: Weights & Biases and MLflow, imported where a run asks for them.

The id of a tracker's run is kept in WORKDIR/tracking/, so that a resumed run continues it. Where the tracker is and
who may write to it, its own settings say: WANDB_MODE, WANDB_API_KEY, MLFLOW_TRACKING_URI and so on.
"""

import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transmamba_jax import config_io
from transmamba_jax.config import Config
from transmamba_jax.runtime import storage
from transmamba_jax.runtime.logs import LOGGER

_UPLOAD_SECONDS = 60.0
_PARAMS_PER_REQUEST = 100  # MLflow's limit


class WeightsAndBiases:
    """A run of Weights & Biases in the project `train.wandb`; its files are in WORKDIR/wandb, or in the cache.

    The axis is the metric `step` and not the count of calls: a resumed run repeats the steps after its checkpoint, and
    Weights & Biases drops what goes back in that count.
    """

    def __init__(self, config: Config, workdir: Path) -> None:
        import wandb

        file = _id_file(workdir, "wandb")
        run_id = _read_id(file) or uuid.uuid4().hex[:8]
        _write_id(file, run_id)
        self._run = wandb.init(
            project=config.train.wandb,
            id=run_id,
            resume="allow",
            name=workdir.name,
            dir=str(storage.local_folder(workdir)),
            # The console is the run's own, and an upload that hangs must not keep the program from ending.
            settings=wandb.Settings(console="off", finish_timeout=_UPLOAD_SECONDS),
        )
        self._run.config.update(config_io.to_tree(config), allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Wait for the upload and end the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow in the experiment `train.mlflow`; the config becomes its parameters."""

    def __init__(self, config: Config, workdir: Path) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        file = _id_file(workdir, "mlflow")
        run_id = _read_id(file)
        if run_id is None:
            name = config.train.mlflow
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            run_id = self._client.create_run(number, run_name=workdir.name).info.run_id
            _write_id(file, run_id)
            self._log_params(run_id, config)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._id = run_id
        LOGGER.info("MLflow: run %s of experiment %s at %s", run_id, config.train.mlflow, mlflow.get_tracking_uri())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step; a character that MLflow does not take in a name becomes an underscore."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(re.sub(r"[^\w./: -]", "_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)

    def _log_params(self, run_id: str, config: Config) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in _flat(config_io.to_tree(config)).items()]
        for start in range(0, len(params), _PARAMS_PER_REQUEST):
            self._client.log_batch(run_id, params=params[start : start + _PARAMS_PER_REQUEST])


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `section.key` -> value of a config's tree."""
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            flat[section] = values
    return flat


def _id_file(workdir: Path, tracker: str) -> Path:
    return workdir / "tracking" / f"{tracker}.txt"


def _read_id(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() or None if file.exists() else None


def _write_id(file: Path, run_id: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(run_id + "\n", encoding="utf-8")
