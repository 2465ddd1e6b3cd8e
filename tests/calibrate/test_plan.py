"""Plans: on a simulated machine whose times are known, on this one at small size, and by the compiler of a TPU."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from transmamba_jax import schedule
from transmamba_jax.calibrate import __main__ as command
from transmamba_jax.calibrate import figure, plan, show, stopwatch, trials
from transmamba_jax.calibrate.stopwatch import Timed
from transmamba_jax.config import Config, DataConfig, KernelsConfig, ModelConfig, TrainConfig
from transmamba_jax.runtime import calibration
from transmamba_jax.runtime.calibration import Record, Result
from transmamba_jax.schedule import Schedule

T = 1024
LITTLE = ModelConfig(
    vocab_size=64, num_layers=2, d_model=16, num_heads=2, num_groups=1, head_dim=8, state_dim=8, mlp_dim=16,
    transpoints=(0,), dtype="float32",
)  # fmt: skip
CONFIG = Config(model=dataclasses.replace(LITTLE, num_layers=8), data=DataConfig(seq_len=T, batch_size=2))


class Simulated:
    """Layers of known cost; whole steps have the same and `rest` seconds more, and `loop` where they loop over layers,
    times `drift`.
    """

    rest, loop, drift = 3.0, 0.5, 1.0

    def layer(self, point: int) -> Timed:
        return lambda: 1e-6 * point**2 + 5e-4 * (T - point) + 0.01 * (0 < point < T)

    def unrolled(self) -> Timed:
        return lambda: self.rest + sum(self.layer(0)() for _ in range(8))

    def whole(self, points: Schedule) -> Timed:
        assert len(points) == 8
        drift = 1.0 if set(points) == {0} else self.drift
        loop = self.loop if schedule.smallest_period(points) < 8 else 0.0
        return lambda: drift * (self.rest + loop + sum(self.layer(point)() for point in points))


@pytest.fixture(name="machine")
def _machine(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    machine = Simulated()
    monkeypatch.setattr(plan, "_machine", lambda *_: (2, machine, "a simulated device", "measured"))
    return machine


@pytest.mark.usefixtures("machine")
def test_a_machine_whose_steps_are_sums_is_predicted() -> None:
    found = plan.make_plan(CONFIG)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["Transformer", "Mamba-2", "V9", "hybrid", "recommended"]
    for name in ("V9", "hybrid"):
        assert rows[name].error == pytest.approx(0, abs=1e-9)
    assert abs(rows["recommended"].error or 0) < 0.02  # its TransPoints are between those that were measured
    assert rows["V9"].points == schedule.v9(T)
    assert (rows["Transformer"].measured, rows["Mamba-2"].predicted) == (None, pytest.approx(3.5 + 8 * 0.512))
    assert rows["Mamba-2"].error == pytest.approx(0, abs=1e-9)
    assert found.costs.rest(8) == pytest.approx(3.0)
    assert found.costs.optimum() == 256  # of 1e-6 P^2 - 5e-4 P: the one in the grid, and its neighbours are slower
    assert {192, 320} <= set(found.costs.layer)
    assert rows["Transformer"].cache > rows["V9"].cache > rows["Mamba-2"].cache
    text = "\n".join(plan.text(found))
    assert "speed-optimal common TransPoint P* = 256" in text
    assert "a loop over layers, in schedules that repeat: 500.00 ms" in text
    assert "goal 10%: met" in text
    assert text.endswith(f"model: {{transpoints: [{', '.join(map(str, found.recommended))}]}}")


@pytest.mark.usefixtures("machine")
def test_random_schedules_of_the_config_are_left_out() -> None:
    train = TrainConfig(schedule_sampling="rows", schedule_sampling_steps=100, schedule_distillation=0.5)
    found = plan.make_plan(dataclasses.replace(CONFIG, train=train))
    assert found.recommended == plan.make_plan(CONFIG).recommended


def test_predictions_follow_a_machine_that_is_slower_at_the_check(
    machine: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = machine.whole, []

    def slower(points: Schedule) -> Timed:
        """Take a quarter longer from the first step of V9 on, as its neighbours on a shared machine have it."""
        calls.append(points)
        run = whole(points)
        return lambda: run() * (1.25 if len(calls) > 1 else 1.0)

    monkeypatch.setattr(machine, "whole", slower)
    found = plan.make_plan(CONFIG)
    rows = {row.name: row for row in found.rows}
    assert found.drift == pytest.approx(1.25)
    assert rows["V9"].error == pytest.approx(0, abs=1e-9)
    assert rows["Transformer"].predicted == pytest.approx(1.25 * found.costs.predict((T,) * 8))
    assert "now takes 1.25 times as long as above" in "\n".join(plan.text(found))


def test_a_machine_whose_steps_are_not_sums_misses_the_goal(machine: Simulated) -> None:
    machine.drift = 1.25
    found = plan.make_plan(CONFIG)
    assert {row.name: row.error for row in found.rows}["V9"] == pytest.approx(1 / 1.25 - 1)
    assert "largest error of the prediction 20.0%; goal 10%: missed" in "\n".join(plan.text(found))


@pytest.mark.draws
@pytest.mark.usefixtures("machine")
def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["--plan", "--config", "tiny", "--model.num-layers", "8", "--seq-len", str(T), "--budget", "0.9"]
    assert command.main([*arguments, "--output", str(output), "--figure", str(picture)]) == 0
    assert "the most attention within" in capsys.readouterr().out
    tree = json.loads(output.read_text())
    assert tree["costs"]["length"] == T
    assert [row["name"] for row in tree["rows"]][-1] == "recommended"
    assert picture.read_bytes().startswith(b"\x89PNG")
    figure.draw(plan.make_plan(CONFIG), tmp_path / "plan.svg")
    assert "P* = 256" in (tmp_path / "plan.svg").read_text()


@pytest.mark.usefixtures("machine")
def test_files_that_cannot_be_written_lose_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    files = ["--output", str(tmp_path / "file" / "plan.json"), "--figure", str(tmp_path / "file" / "plan.png")]
    assert command.main(["--plan", "--config", "tiny", "--model.num-layers", "8", "--seq-len", str(T), *files]) == 1
    printed = capsys.readouterr()
    assert "speed-optimal common TransPoint" in printed.out
    assert printed.err.count(" is not written: ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tiny", "--seq-len", "64"], "--seq-len is for --plan, which is not given"),
        (["--config", "tiny", "--objective", "train"], "--objective is for --plan"),
        (["--plan", "--config", "tiny", "--budget", "two"], "--budget must be like"),
        (["--plan", "--config", "tiny", "--figure", "x.pdf"], "--figure must end in .png or .svg"),
        (
            ["--plan", "--config", "tiny", "--topology", "v5e:2x2", "--objective", "decode"],
            "--objective train alone",
        ),
        (["--plan", "--config", "tiny", "--topology", "v9z:1"], "cannot be had"),
        (["--plan", "--config", "tiny", "--topology", "cpu:1"], "must be of a chip with a data sheet"),
        (["--config", "tiny", "--limit", "0"], "--limit must be positive"),
        (["--config", "tiny", "--limit", "nan"], "seconds, found nan"),
        (["--config", "tiny", "--limit", "inf"], "seconds, found inf"),
        (["--config", "tiny", "--limit", "1e300"], "seconds, found 1e+300"),
        (["--plan"], "--config is required"),
        (["--config", "tiny", "--model.no-such", "1"], "no-such"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["train", "decode"])
def test_layers_and_steps_run_on_this_machine(objective: Any) -> None:
    data = DataConfig(seq_len=8, batch_size=2)
    watch = stopwatch.Stopwatch(Config(model=LITTLE, data=data), KernelsConfig(), objective)
    found = stopwatch.medians({"layer": watch.layer(4), "step": watch.whole((0, 4))}, rounds=2)
    assert all(0 < seconds < 30 for seconds in found.values())
    if objective == "decode":
        with pytest.raises(ValueError, match="decode has no operators"):
            watch.parts(4)
    else:
        assert set(watch.parts(0)) == {"SSD"}
        assert set(watch.parts(8)) == {"attention"}
        parts = watch.parts(4)
        assert set(parts) == {"attention", "convert", "SSD"}
        assert all(call() > 0 for call in parts.values())


def test_operators_alone_run_where_float64_is_the_default() -> None:
    data = DataConfig(seq_len=8, batch_size=2)
    with jax.enable_x64(True):
        parts = stopwatch.Stopwatch(Config(model=LITTLE, data=data), KernelsConfig(), "prefill").parts(4)
        assert all(call() > 0 for call in parts.values())


@pytest.mark.slow
@pytest.mark.usefixtures("programs_not_kept")
def test_an_absent_chip_is_predicted_by_its_compiler() -> None:
    # Of two heads the gradients are so small that the compiler of jax 0.12 (libtpu) aborts in their sum over chips.
    sizes = {"d_model": 128, "num_heads": 4, "num_groups": 4, "head_dim": 64, "state_dim": 64, "mlp_dim": 128}
    model = dataclasses.replace(LITTLE, vocab_size=256, dtype="bfloat16", transpoints=(0, 128), **sizes)
    config = Config(model=model, data=DataConfig(seq_len=256, batch_size=4))
    found = plan.make_plan(config, topology="v5e:2x2", quick=True)
    assert found.how == "predicted by the compiler of the chip, not measured"
    assert found.device == "v5e:2x2, TPU v5 lite"
    assert all(0 < seconds < 1e-2 for seconds in found.costs.layer.values())
    assert all(row.error is not None for row in found.rows[2:])
    assert "predicted by the compiler" in next(plan.text(found))


def test_show_prints_records_and_those_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.main(["show"]) == 0
    assert capsys.readouterr().out.startswith("there are no records in ")
    key = {"device": "a chip", "driver": "7", "jax": "0.11", "transmamba_jax": "0.1", "shapes": {"head_dim": 64}}
    results = (
        Result("ssd", "sequential", 32, "passed", "", {"forward": {64: 0.002, 512: 0.01}}),
        Result("ssd", "associative", 64, "passed", "", {"forward": {64: 0.001, 512: 0.02}}),
        Result("ssd", "triton", None, "died", "signal SIGSEGV"),
    )
    calibration.write(Record(key, "2026-01-01 00:00:00", 4, results), calibration.folder() / "a.json")
    (calibration.folder() / "b.json").write_text("{")
    assert command.main(["show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  a chip; driver 7; jax 0.11; transmamba_jax 0.1" in lines
    assert lines[4].split() == ["64", "512"]
    assert lines[5].split() == ["sequential,", "chunks", "of", "32", "2.000", "10.000*"]
    assert lines[6].split() == ["associative,", "chunks", "of", "64", "1.000*", "20.000"]
    assert "  ssd triton: died: signal SIGSEGV" in lines
    assert any(line.endswith("b.json is not used: Expecting property name enclosed in double quotes: line 1 column 2 "
                             "(char 1)") for line in lines)  # fmt: skip
    assert next(show.show([calibration.folder() / "c.json"])).startswith("the calibration record ")
    assert trials.title(results[0]) == "ssd sequential, chunks of 32"
