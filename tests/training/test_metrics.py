"""The lines of metrics.jsonl, and the count of operations."""

import errno
import json
import math
import struct

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from transmamba_jax.config import ModelConfig
from transmamba_jax.training.metrics import MetricsWriter, flops_per_token

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
        assert writer.has_evaluation(2)
        assert not writer.has_evaluation(1)
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


def test_lines_are_strict_json_and_tensorboard_gets_the_numbers(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "eval/by_position": [[0, 1, 2.0]]})
    assert _lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "eval/by_position": [[0, 1, 2.0]]}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/grad_norm" in events.read_bytes()


class Filling:
    """A file that takes `room` more bytes, in pieces, and then refuses."""

    def __init__(self, file):
        self.file, self.room = file, 10

    def write(self, content):
        if content and self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = content[: min(self.room, 50)]
        self.room -= len(taken)
        return self.file.write(taken)

    def close(self):
        self.file.close()


def test_what_a_full_disk_refuses_is_written_before_the_next_line(tmp_path):
    records = [{"step": step, "loss": step / 2} for step in range(1, 4)]
    with MetricsWriter(tmp_path, 0) as writer:
        files = [Filling(each._file) for each in (writer._file, writer._board)]
        writer._file._file, writer._board._file = files
        for record in records[:2]:
            with pytest.raises(OSError, match="No space left"):
                writer.write(record)
        files[0].room = files[1].room = 10**6
        writer.write(records[2])
    assert _lines(tmp_path) == records
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 3
    writer = MetricsWriter(tmp_path, 0)
    writer._file._file = Filling(writer._file._file)
    for attempt in (lambda: writer.write(records[0]), writer.close):
        with pytest.raises(OSError, match="No space left"):
            attempt()


def test_tensorboard_reads_the_events_and_hides_what_an_earlier_run_wrote_beyond_the_step(tmp_path):
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write({"step": 3, "loss": 0.5, "eval/loss": 1.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    copy = RecordWriter(str(tmp_path / "copy"))
    while content:
        (length,) = struct.unpack_from("<Q", content)
        copy.write(content[12 : 12 + length])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    copy.close()
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert [events[0].file_version, events[1].step, events[1].session_log.status] == ["brain.Event:2", 3, 1]
    values = {value.tag: value.simple_value for value in events[2].summary.value}
    assert (events[2].step, values) == (3, {"train/loss": 0.5, "eval/loss": 1.5})


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
