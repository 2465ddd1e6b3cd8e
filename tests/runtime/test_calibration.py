"""Records of a device: keys, files, the tables that follow from them, and the lookup."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels.table import Candidate, Measured, Table
from transmamba_jax.config import KernelsConfig, ModelConfig
from transmamba_jax.model_config import MeasuredKernels
from transmamba_jax.runtime import calibration
from transmamba_jax.runtime.calibration import Record, Result

MODEL = ModelConfig(num_heads=2, num_groups=1, head_dim=8, state_dim=16, dtype="float32")


def result(name: str, chunk: int | None, forward: float, both: float, outcome: Any = "passed") -> Result:
    seconds: Any = {"forward": {64: forward, 512: 9 * forward}, "forward+backward": {64: both, 512: both}}
    operator: Any = "attention" if name in ("blockwise", "cudnn") else "ssd"
    return Result(operator, name, chunk, outcome, "", seconds | ({"state": {64: 1.0}} if operator == "ssd" else {}))


RESULTS = (
    result("sequential", 32, 0.5, 3.0),
    result("associative", 64, 2.0, 2.0),
    result("associative", 128, 1.0, 4.0),
    result("pallas_gpu", None, 0.1, 0.1, "wrong"),
    result("blockwise", None, 1.0, 1.0),
)


@pytest.fixture(name="cache")
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "transmamba_jax" / "calibration"


def keep(model: ModelConfig = MODEL, **changes: Any) -> Path:
    key = calibration.key_of(model) | changes
    calibration.write(Record(key, "2026-01-01 00:00:00", 4, RESULTS), calibration.file_of(key))
    return calibration.file_of(key)


def test_the_key_names_device_driver_versions_and_shapes() -> None:
    key = calibration.key_of(MODEL)
    assert set(key) == {"device", "driver", "jax", "transmamba_jax", "shapes"}
    assert key["device"].startswith("cpu: ")
    shapes = {"num_heads": 2, "num_groups": 1, "head_dim": 8, "state_dim": 16, "dtype": "float32"}
    assert key["shapes"] == shapes
    # Other layers, widths and schedules call the same operators on the same shapes.
    assert calibration.key_of(dataclasses.replace(MODEL, num_layers=24, d_model=64, mlp_dim=0)) == key
    assert calibration.key_of(dataclasses.replace(MODEL, dtype="bfloat16")) != key


def test_every_part_of_the_key_is_part_of_the_file_name(cache: Path) -> None:
    key = calibration.key_of(MODEL)
    changed = [{name: "other"} for name in key]
    files = {calibration.file_of(key | change) for change in ({}, *changed)}
    assert len(files) == 1 + len(key)
    assert {file.parent for file in files} == {cache}


def test_without_xdg_cache_home_records_are_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration.folder() == tmp_path / ".cache" / "transmamba_jax" / "calibration"


@pytest.mark.usefixtures("cache")
def test_a_record_is_read_back_and_found() -> None:
    assert calibration.find(MODEL) is None
    file = keep()
    found = calibration.find(MODEL)
    assert found is not None
    assert (found.results, found.rows, found.source) == (RESULTS, 4, str(file))
    assert calibration.find(dataclasses.replace(MODEL, head_dim=16)) is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.usefixtures("cache")
def test_the_fastest_by_purpose_length_and_operation() -> None:
    keep()
    read, train = (calibration.kernels(MODEL, KernelsConfig(), purpose) for purpose in ("read", "train"))  # type: ignore
    for chosen, at_64 in ((read, ["sequential", "associative", "associative"]), (train, ["associative"])):
        assert isinstance(chosen, MeasuredKernels)
        assert isinstance(chosen.ssd_choice, Table)
        order = chosen.ssd_choice.order(64)
        assert [candidate.name for candidate in order][: len(at_64)] == at_64
        assert "pallas_gpu" not in {candidate.name for candidate in order}
        assert isinstance(chosen.attention_choice, Table)
        assert chosen.attention_choice.order(64) == (Candidate("blockwise"),)
    assert isinstance(read.ssd_choice, Table)
    assert read.ssd_choice.order(512)[0] == Candidate("sequential", 32)
    assert read.ssd_choice.order(512, state_alone=True) == read.ssd_choice.states[0].order
    assert (
        calibration.describe(read)
        == "ssd sequential (chunks of 32) at 64/512 tokens, attention blockwise at 64/512 tokens"
    )


@pytest.mark.usefixtures("cache")
def test_what_the_options_name_wins() -> None:
    keep()
    chosen = calibration.kernels(MODEL, KernelsConfig(ssd="associative"), "read")
    assert (chosen.ssd_choice, chosen.chunk_size) == ("associative", 64)
    assert isinstance(chosen.attention_choice, Table)
    assert calibration.describe(chosen).startswith("ssd associative, attention blockwise at ")
    both = KernelsConfig(ssd="reference", attention="reference")
    assert calibration.kernels(MODEL, both, "train") is both
    # A chunk size that is not the default is kept: the order is then one of names.
    chosen = calibration.kernels(MODEL, KernelsConfig(chunk_size=16), "read")
    assert isinstance(chosen.ssd_choice, Table)
    assert chosen.ssd_choice.order(64) == (Candidate("sequential"), Candidate("associative"))


def test_what_ran_and_did_not_pass_is_excluded() -> None:
    for outcome in ("wrong", "failed", "hung", "died"):
        results = (
            result("sequential", 32, 1.0, 1.0, outcome),
            result("associative", 64, 1.0, 1.0, outcome),
            result("associative", 128, 1.0, 1.0),
            result("triton", None, 1.0, 1.0, "passed over"),
            result("cudnn", None, 1.0, 1.0, outcome),
        )
        chosen = Record({}, "", 1, results, "here.json").kernels(KernelsConfig(), "read")
        assert chosen.ssd_table is not None
        assert chosen.attention_table is not None
        assert chosen.ssd_table.excluded == (("sequential", f"it is {outcome!r} in the record here.json"),)
        assert [name for name, _ in chosen.attention_table.excluded] == ["cudnn"]
        assert calibration.describe(chosen).endswith("attention by device and shape without cudnn")
        assert calibration.from_tree(json.loads(json.dumps(calibration.to_tree(chosen)))) == chosen


@pytest.mark.usefixtures("cache")
def test_measurements_that_are_given_stay() -> None:
    keep()
    chosen = calibration.kernels(MODEL, KernelsConfig(), "read")
    assert calibration.kernels(MODEL, chosen, "train") is chosen


def test_without_a_record_the_options_stay_as_they_are(cache: Path) -> None:
    assert not cache.exists()
    assert calibration.kernels(MODEL, KernelsConfig(), "train") == KernelsConfig()


def test_without_a_home_folder_there_is_no_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def folder() -> Path:
        raise ValueError("there is no home folder")

    monkeypatch.setattr(calibration, "folder", folder)
    with caplog.at_level(logging.WARNING, logger="transmamba_jax"):
        assert calibration.kernels(MODEL, KernelsConfig(), "train") == KernelsConfig()
    assert [record.getMessage() for record in caplog.records] == ["there is no home folder"]


def _damaged(text: str) -> str:
    return text[: len(text) // 2]


def _renamed(text: str) -> str:
    return text.replace('"outcome"', '"ending"')


def _other_format(text: str) -> str:
    return json.dumps(json.loads(text) | {"format": 99})


def _other_key(text: str) -> str:
    tree = json.loads(text)
    return json.dumps(tree | {"key": tree["key"] | {"jax": "0.1"}})


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("change", [_damaged, _renamed, _other_format, _other_key, lambda _: "[]", lambda _: "\0"])
def test_a_record_that_cannot_be_read_is_ignored_with_a_line(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    file = keep()
    file.write_text(change(file.read_text()))
    with caplog.at_level(logging.WARNING, logger="transmamba_jax"):
        assert calibration.kernels(MODEL, KernelsConfig(), "train") == KernelsConfig()
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"the calibration record {file} is not used: ")
    assert change is not _other_format or line.endswith("its format is 99, and 1 is read")


def test_options_with_tables_go_through_json() -> None:
    record = Record({}, "", 1, RESULTS, "here.json")
    for options in (KernelsConfig(chunk_size=32), record.kernels(KernelsConfig(), "train")):
        assert calibration.from_tree(json.loads(json.dumps(calibration.to_tree(options)))) == options
    for tree in ({"no": 1}, {"ssd_table": 3, "attention_table": None}):
        with pytest.raises(ValueError, match="not of the form"):
            calibration.from_tree(tree)


def test_a_table_is_a_static_argument() -> None:
    rows = (Measured(64, (Candidate("sequential", 32),)),)
    assert hash(MeasuredKernels(ssd_table=Table("", rows))) == hash(MeasuredKernels(ssd_table=Table("", rows)))
