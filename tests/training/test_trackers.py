"""The real packages of Weights & Biases and MLflow, without a network: what they hold of a resumed run."""

import json
import math
import struct
from pathlib import Path

import mlflow
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from tests.training.runs import metrics_of, train
from transmamba_jax.training.trackers import MLflow

SHORT = {"eval": {"every": 2}, "checkpoint": {"every": 0}}


def _numbers(workdir):
    """Return (step, name) -> value of the numbers in metrics.jsonl, as writers name them."""
    found = {}
    for record in metrics_of(workdir):
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                found[record["step"], name if "/" in name else f"train/{name}"] = value
    return found


@pytest.fixture(name="store")
def _store(tmp_path, monkeypatch):
    """Let MLflow keep its runs in an SQLite file, and return its client."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_mlflow_has_the_run_its_parameters_and_every_number_and_a_resumed_run_continues_it(make, store, capsys):
    begin = make(train={"steps": 2, "mlflow": "small"}, **SHORT)
    assert train(begin) == 0
    assert "MLflow: run " in capsys.readouterr().out
    assert train(make(train={"steps": 4, "mlflow": "small"}, **SHORT)) == 0
    (run,) = store.search_runs([store.get_experiment_by_name("small").experiment_id])
    workdir = Path(begin.workdir)
    assert (workdir / "tracking" / "mlflow.txt").read_text() == f"{run.info.run_id}\n"
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["model.d_model"] == "8"
    assert run.data.params["workdir"] == begin.workdir
    expected = _numbers(workdir)
    names = {name for _, name in expected}
    assert {"train/loss", "eval/loss", "baseline/gzip_bits_per_byte"} <= names <= run.data.metrics.keys()
    found = {
        (each.step, name): each.value for name in names for each in store.get_metric_history(run.info.run_id, name)
    }
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-12), key


def test_mlflow_takes_any_name_and_number(make, store, tmp_path):
    config = make(train={"mlflow": "small"})
    writer = MLflow(config, tmp_path)
    writer.write(1, {"eval/text:/a/*.txt/loss": 1.5, "eval/0 0 256/loss": math.nan})
    writer.close()
    (run,) = store.search_runs([store.get_experiment_by_name("small").experiment_id])
    assert run.data.metrics["eval/text:/a/_.txt/loss"] == 1.5
    assert math.isnan(run.data.metrics["eval/0 0 256/loss"])


def test_an_mlflow_server_that_refuses_is_one_warning(make, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = make(train={"steps": 3, "mlflow": "small"}, eval={"every": 0}, checkpoint={"every": 0})
    assert train(config) == 0
    assert capsys.readouterr().out.count("MLflow: MlflowException: API request to http://127.0.0.1:9") == 1
    assert [line["step"] for line in metrics_of(Path(config.workdir))] == [1, 2, 3]


@pytest.fixture(name="settings")
def _settings(monkeypatch):
    """Return a function that sets what Weights & Biases reads of the environment once per process."""

    def set_all(**environment: str) -> None:
        wandb.teardown()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    yield set_all
    wandb.teardown()


def _wandb_files(workdir):
    return sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb"))


def _records(file):
    """Yield the records of a file of Weights & Biases: a log of LevelDB behind a header of 7 bytes."""
    content, place, parts, block = file.read_bytes(), 7, b"", 2**15
    assert content[:4] == b":W&B"
    while place < len(content):
        if block - place % block < 7:  # no space for another header
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_weights_and_biases_has_the_run_its_config_and_every_number_and_a_resumed_run_continues_it(make, settings):
    settings(WANDB_MODE="offline")
    begin = make(train={"steps": 2, "wandb": "small"}, **SHORT)
    assert train(begin) == 0
    assert train(make(train={"steps": 4, "wandb": "small"}, **SHORT)) == 0
    workdir, found, runs, configs = Path(begin.workdir), {}, [], {}
    for file in _wandb_files(workdir):
        for record in _records(file):
            if record.WhichOneof("record_type") == "run":
                runs.append((record.run.run_id, record.run.project, record.run.display_name))
            for update in [*record.run.config.update, *record.config.update]:
                configs[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found |= {(items["step"], name): value for name, value in items.items() if "/" in name}
    run_id = (workdir / "tracking" / "wandb.txt").read_text().strip()
    assert set(runs) == {(run_id, "small", "run")}
    assert configs["model"]["d_model"] == 8
    expected = _numbers(workdir)
    assert expected.keys() <= found.keys()
    assert {key[0] for key in found} == {1, 2, 3, 4}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-12), key


def test_weights_and_biases_without_a_login_is_one_warning(make, settings, capsys, tmp_path):
    settings(WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="", HOME=str(tmp_path))
    config = make(train={"steps": 3, "wandb": "small"}, eval={"every": 0}, checkpoint={"every": 0})
    assert train(config) == 0
    assert capsys.readouterr().out.count("Weights & Biases: ") == 1
    assert [line["step"] for line in metrics_of(Path(config.workdir))] == [1, 2, 3]
    assert wandb.run is None
