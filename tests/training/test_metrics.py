"""The lines of metrics.jsonl, and the count of operations."""

import dataclasses
import json
import math

import jax
import pytest

from tests.training.support import Filling, little_config
from transmamba_jax.config import ModelConfig
from transmamba_jax.report.costs import flops_per_token
from transmamba_jax.training.metrics import MetricsWriter, Throughput
from transmamba_jax.training.writers import Writers


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({}, [(0,)]),
        ({"schedule_sampling": "pool", "schedule_pool": ("transformer", "mamba2")}, [(12,), (0,)]),
        ({"schedule_sampling": "rows"}, None),
    ],
    ids=["fixed", "pool", "rows"],
)
def test_flops_a_second_are_those_of_the_schedules_that_steps_run(options, points):
    config = little_config(model={"transpoints": (0,)}, train=options)
    at = lambda each: flops_per_token(
        dataclasses.replace(config.model, transpoints=each), 12, config.kernels.chunk_size
    )
    clock = Throughput(config, jax.devices())
    clock.resume()
    clock.step_done()
    rates = clock.read()
    if points is None:
        assert rates.keys() == {"tokens_per_second"}
    else:
        mean = sum(map(at, points)) / len(points)
        assert rates["model_flops_per_second"] == pytest.approx(rates["tokens_per_second"] * mean)


MODEL = {"vocab_size": 50, "num_layers": 1, "d_model": 12, "num_heads": 4, "num_groups": 2, "head_dim": 6}
MODEL |= {"state_dim": 8, "mlp_dim": 20}


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_takes_back_what_lies_beyond_its_step(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": step / 2})
        writer.write({"step": 2, "eval/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with MetricsWriter(tmp_path, 2) as writer:
        assert writer.has(2, "eval/loss")
        assert not writer.has(1, "eval/loss")
        writer.write({"step": 3, "loss": 9.0})
    expected = [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval/loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]
    assert _lines(tmp_path) == expected
    with MetricsWriter(tmp_path, 0):
        assert _lines(tmp_path) == []
    kept = (tmp_path / "metrics.jsonl.old").read_text(encoding="utf-8")
    assert [json.loads(line) for line in kept.splitlines()] == expected  # no checkpoint, and the lines are not lost
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 1, "loss": 7.0})
    with MetricsWriter(tmp_path, 0):
        pass
    kept = (tmp_path / "metrics.jsonl.old").read_text(encoding="utf-8")
    assert [json.loads(line) for line in kept.splitlines()] == [*expected, {"step": 1, "loss": 7.0}]


@pytest.mark.parametrize("foreign", [b"not json", b'{"note": 3}', b"[1]", b"\xff\xfe", b'{"step": true}', b""])
def test_lines_that_no_run_wrote_are_left_out_with_a_line_and_a_copy(tmp_path, foreign, caplog):
    file, good = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 0.5}\n'
    content = good + foreign + b"\n" + foreign + b"\n" + good.replace(b"1", b"2")
    file.write_bytes(content)
    with MetricsWriter(tmp_path, 2):
        pass
    assert _lines(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert "metrics.jsonl: line 2 (and 1 more) has no step and is left out" in caplog.text
    assert (tmp_path / "metrics.jsonl.old").read_bytes() == content


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.calls, self.closed = [], 0

    def write(self, step, values):
        self.calls.append((step, values))

    def close(self):
        self.closed += 1


def test_lines_are_strict_json_and_writers_get_the_numbers(tmp_path):
    kept = Kept()
    with MetricsWriter(tmp_path, 0, Writers({"kept": lambda: kept})) as writer:
        spans = [[0, 1, 2.0], [1, 2, math.nan]]
        writer.write({"step": 1, "loss": math.nan, "eval/loss": 2, "eval/by_position": spans, "note": "text"})
        assert kept.closed == 0
    assert _lines(tmp_path) == [
        {"step": 1, "loss": None, "eval/loss": 2, "eval/by_position": [[0, 1, 2.0]], "note": "text"}
    ]
    ((step, values),) = kept.calls
    assert (step, values.keys(), kept.closed) == (1, {"train/loss", "eval/loss"}, 1)
    assert (math.isnan(values["train/loss"]), values["eval/loss"]) == (True, 2)


def test_what_a_full_disk_refuses_is_written_before_the_next_line(tmp_path):
    records, kept = [{"step": step, "loss": step / 2} for step in range(1, 4)], Kept()
    with MetricsWriter(tmp_path, 0, Writers({"kept": lambda: kept})) as writer:
        writer._file._file = Filling(writer._file._file)
        for record in records[:2]:
            with pytest.raises(OSError, match="No space left"):
                writer.write(record)
        writer._file._file.room = 10**6
        writer.write(records[2])
    assert _lines(tmp_path) == records
    assert [step for step, _ in kept.calls] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, 0, Writers({"kept": lambda: kept}))
    writer._file._file = Filling(writer._file._file)
    for attempt in (lambda: writer.write(records[0]), writer.close):
        with pytest.raises(OSError, match="No space left"):
            attempt()
    assert kept.closed == 2


def _by_counting(config, length, chunk):
    """Sum the multiply-adds of the forward pass over tokens, heads and layers one by one."""
    cfg, total = config, 0
    widths = [cfg.num_groups * cfg.state_dim] * 2 + [cfg.num_heads * cfg.head_dim] * 2 + [cfg.num_heads]
    for layer in range(cfg.num_layers):
        point = min(cfg.transpoints[layer % len(cfg.transpoints)], length)
        for t in range(length):
            total += sum(cfg.d_model * width for width in widths) + cfg.num_heads * cfg.head_dim * cfg.d_model
            total += 3 * cfg.d_model * cfg.mlp_dim + cfg.conv_width * sum(widths[:3])
            if t < point:
                values = cfg.num_heads // cfg.num_groups * cfg.head_dim
                total += cfg.num_groups * sum(cfg.state_dim + values for _ in range(t + 1))
                if point < length:
                    total += cfg.num_heads * cfg.state_dim * cfg.head_dim
            else:
                total += chunk * (cfg.num_groups * cfg.state_dim + cfg.num_heads * cfg.head_dim)
                total += 2 * cfg.num_heads * cfg.state_dim * cfg.head_dim
    return 3 * 2 * (total / length + cfg.d_model * cfg.vocab_size)


@pytest.mark.parametrize("points", [(0,), (64,), (100,), (20,), (0, 16, 64)])
def test_model_flops_equal_a_count_token_by_token(points):
    config = ModelConfig(**{**MODEL, "num_layers": 3}, transpoints=points)
    assert flops_per_token(config, 64, 16) == pytest.approx(_by_counting(config, 64, 16))
