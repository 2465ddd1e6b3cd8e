"""TensorBoard's files, writers that fail, and writers in a thread of their own."""

import logging
import struct
import threading
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from tests.training.runs import metrics_of, train
from tests.training.support import Filling
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.training import writers
from transmamba_jax.training.writers import Background, OnFirstWrite, TensorBoard, Writers


def _events(workdir):
    """Return the events of the one file, after a comparison with the bytes that tensorboardX writes for them."""
    (file,) = (workdir / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    copy = RecordWriter(str(workdir / "copy"))
    while content:
        (length,) = struct.unpack_from("<Q", content)
        copy.write(content[12 : 12 + length])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    copy.close()
    assert (workdir / "copy").read_bytes() == file.read_bytes()
    return events


def _values(event):
    return event.step, {value.tag: value.simple_value for value in event.summary.value}


def test_tensorboard_reads_the_events_and_hides_what_an_earlier_run_wrote_beyond_the_step(tmp_path):
    board = TensorBoard(tmp_path, 2)
    board.write(3, {"train/loss": 0.5, "eval/loss": 1.5})
    board.close()
    events = _events(tmp_path)
    assert [events[0].file_version, events[1].step, events[1].session_log.status] == ["brain.Event:2", 3, 1]
    assert _values(events[2]) == (3, {"train/loss": 0.5, "eval/loss": 1.5})


def test_tensorboard_hides_what_a_run_wrote_that_was_killed_before_its_first_checkpoint(tmp_path):
    TensorBoard(tmp_path, 0).close()
    (first,) = (tmp_path / "tensorboard").iterdir()
    TensorBoard(tmp_path, 0).close()
    first.unlink()
    (_, start) = _events(tmp_path)
    assert (start.step, start.session_log.status) == (1, 1)


def test_tensorboard_in_a_bucket_continues_too(bucket):
    workdir = expand_path("gs://bucket/events")
    for step in (0, 3):
        board = TensorBoard(workdir, step)
        board.write(step + 1, {"train/loss": 0.5})
        board.close()
    assert bucket.url
    assert len(list((workdir / "tensorboard").iterdir())) == 2


def test_what_cannot_be_opened_is_one_warning(caplog):
    def broken():
        raise TypeError("Descriptors cannot be created directly")

    several = Writers({"TensorBoard": lambda: OnFirstWrite(broken)})
    several.write(1, {"a": 1})
    several.write(2, {"a": 2})
    several.close()
    (record,) = caplog.records
    assert "TensorBoard: TypeError: Descriptors cannot be created directly. The run continues" in record.getMessage()


def test_events_that_a_full_disk_refuses_are_written_before_the_next_one(tmp_path, caplog):
    boards = []
    several = Writers({"TensorBoard": lambda: boards.append(TensorBoard(tmp_path, 0)) or boards[0]})
    file = boards[0]._file._file = Filling(boards[0]._file._file)
    several.write(1, {"a": 1})
    several.write(2, {"a": 2})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "TensorBoard: [Errno 28] No space left on device. The run continues; metrics.jsonl has" in caplog.text
    file.room = 10**6
    several.write(3, {"a": 3})
    several.close()
    assert [_values(event) for event in _events(tmp_path)[1:]] == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3})]
    assert len(caplog.records) == 1


class Failing:
    """A writer that another package's error ends at its `count`-th call."""

    def __init__(self, count, calls):
        self.count, self.calls = count, calls
        self._count()

    def _count(self):
        self.count -= 1
        if self.count == 0:
            raise LookupError("no such run")

    def write(self, step, values):
        self._count()
        self.calls.append((step, values))

    def close(self):
        self._count()
        self.calls.append("closed")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_an_error_of_any_kind_in_the_background_is_one_warning(count, caplog):
    calls, good = [], []
    makers = {
        "one": lambda: Background(lambda: Failing(count, calls)),
        "two": lambda: Background(lambda: Failing(9, good)),
    }
    several = Writers(makers)
    for step in (1, 2):
        several.write(step, {"loss": 0.5})
    several.close()
    written = [(1, {"loss": 0.5}), (2, {"loss": 0.5}), "closed"]
    assert good == written
    assert calls == written[: max(count - 2, 0)]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["one: LookupError: no such run. The run continues; metrics.jsonl has every line"] * (count < 5)


def test_a_writer_that_hangs_holds_up_neither_steps_nor_the_end(caplog):
    release, calls = threading.Event(), []

    class Hanging(Failing):
        def write(self, step, values):
            release.wait()
            super().write(step, values)

    background = Background(lambda: Hanging(99, calls), close_seconds=0.1)
    several = Writers({"slow": lambda: background})
    several.write(1, {})
    several.write(2, {})
    several.close()
    assert "slow: not everything was sent within 0.1 s. The run continues" in caplog.text
    assert calls == []
    release.set()
    background._thread.join()
    assert calls == [(1, {}), (2, {}), "closed"]


def test_a_run_whose_writer_cannot_be_opened_is_the_run_without_it(make, capsys):
    short = {"train": {"steps": 3}, "eval": {"every": 0}, "checkpoint": {"every": 0}}
    plain = make("plain", train={"steps": 3, "tensorboard": False}, eval={"every": 0}, checkpoint={"every": 0})
    assert train(plain) == 0
    assert not (Path(plain.workdir) / "tensorboard").exists()
    blocked = make("blocked", **short)
    Path(blocked.workdir).mkdir()
    (Path(blocked.workdir) / "tensorboard").touch()
    capsys.readouterr()
    assert train(blocked) == 0
    assert capsys.readouterr().out.count("TensorBoard: [Errno 17] File exists") == 1
    assert metrics_of(Path(blocked.workdir)) == metrics_of(Path(plain.workdir))


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_is_not_there_is_refused_with_its_extra(make, monkeypatch, package):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match=rf"train\.{package}=a needs the package {package}: .*pip install -e '\.\[{package}\]'"
    ):
        train(make(train={package: "a"}))
