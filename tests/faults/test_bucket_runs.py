"""Runs whose work directory is in a bucket, reached through the HTTP API: accidents of the run and of the bucket."""

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.buckets import Bucket
from tests.faults.conftest import Faults
from tests.training.runs import assert_same_end, metrics_of
from transmamba_jax import checkpoint
from transmamba_jax.checkpoint.__main__ import main as checkpoint_command
from transmamba_jax.report import write_report
from transmamba_jax.runtime.paths import expand_path

STEPS = "--train.steps", 24


class Runs(Faults):
    """Runs train.py; its processes reach the bucket."""

    def __init__(self, folder: Path, bucket: Bucket) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in bucket.environment.items():
                patch.setenv(name, value)
            super().__init__(folder)

    def child(self) -> int:
        """Return the process id of the run."""
        own = self.process.pid
        while True:
            children = Path(f"/proc/{own}/task/{own}/children").read_text(encoding="ascii").split()
            if children:
                return int(children[0])
            time.sleep(0.01)


@pytest.fixture(name="runs", scope="module")
def _runs(tmp_path_factory, bucket):
    runs = Runs(tmp_path_factory.mktemp("bucket"), bucket)
    yield runs
    runs.stop()


@pytest.fixture(name="local", scope="module")
def _local(runs):
    """Return the work directory of a run of 24 steps in a folder."""
    runs.train(runs.folder / "local", *STEPS)
    return runs.folder / "local"


def good(workdir: str) -> list[int]:
    """Return the steps that pass verification."""
    folder = expand_path(workdir) / "checkpoints"
    found = []
    for step in checkpoint.complete_steps(folder):
        with contextlib.suppress(checkpoint.DamagedError):
            checkpoint.verify(folder / str(step))
            found.append(step)
    return found


def flip(bucket: Bucket, pattern: str) -> str:
    """Change one bit in the middle of the largest object whose name begins so, and return its name."""
    found = bucket.objects(pattern)
    name = max(found, key=lambda each: len(found[each]))
    content = bytearray(found[name])
    content[len(content) // 2] ^= 4
    bucket.put(name, bytes(content))
    return name


@pytest.mark.slow
def test_killed_at_step_12_and_resumed_is_bit_for_bit_a_run_in_a_folder(runs, local, bucket, capsys):
    workdir = "gs://bucket/killed"
    text = runs.train(workdir, *STEPS, accident="kill-in-manifest", at=3, expect=-signal.SIGKILL)
    assert "ALARM" not in text
    assert good(workdir) == [4, 8]
    assert "killed/run.lock" in bucket.objects("killed/")
    text = runs.train(workdir, *STEPS)
    assert "no longer runs: taking the lock over" in text
    assert "continuing from step 8" in text
    assert_same_end(expand_path(workdir), local, 24)
    assert f"report      {workdir}/report/index.html" in text
    names = set(bucket.objects("killed/"))
    assert {"killed/report/index.html", "killed/report/loss.png", "killed/config.yaml"} <= names
    assert not [name for name in names if "run.lock" in name or "/saving-" in name or "/deleting-" in name]

    # The commands read it there; a flipped bit is found, and a resumed run goes back to the step before.
    assert checkpoint_command(["verify", workdir]) == 0
    assert "step 24: good" in capsys.readouterr().out
    assert str(write_report(expand_path(workdir))) == f"{workdir}/report/index.html"
    name = flip(bucket, "killed/checkpoints/24/params/ocdbt.process_0/d/")
    assert checkpoint_command(["verify", workdir]) == 1
    text = capsys.readouterr().out
    assert "step 24: DAMAGED: params/" in text
    assert f"{name.partition('24/')[2]} has other bytes than were saved" in text
    text = runs.train(workdir, *STEPS)
    assert "checkpoint 24 skipped: params/" in text
    assert "continuing from step 20" in text
    assert "was damaged or not complete: moved to gs://bucket/killed/checkpoints/rejected-24" in text
    assert_same_end(expand_path(workdir), local, 24)


@pytest.mark.slow
def test_a_second_run_in_the_same_prefix_is_refused(runs, bucket):
    workdir, waiting, folder = "gs://bucket/twice", runs.folder / "waiting", runs.folder / "others"
    folder.mkdir()
    others = Runs(folder, bucket)
    try:
        arguments = runs.arguments(workdir)
        runs.send("training", {"arguments": arguments, "accident": "wait-in-step", "at": str(waiting)})
        while not waiting.exists():
            time.sleep(0.05)
        text = others.train(workdir, expect=2)
        assert "is still running; stop it, or use another --workdir" in text
        assert "compiling" not in text
        waiting.unlink()
        runs.receive(0)
    finally:
        others.stop()
    assert good(workdir)[-1] == 12


@pytest.mark.slow
def test_requests_that_fail_are_repeated_and_the_run_is_the_same(runs, local, bucket):
    """Every eleventh request is answered by an error of the service, and one by nothing at all."""
    statuses, count, lock = (429, 500, 503), [0], threading.Lock()

    def busy(_):
        with lock:
            count[0] += 1
            number = count[0]
        if number == 40:
            time.sleep(7)  # the limit is 5 s
        return statuses[number // 11 % 3] if number % 11 == 0 else None

    with bucket.accident(before=busy):
        text = runs.train("gs://bucket/busy", *STEPS, "--checkpoint.every", 12)
    for reason in "HTTP 429", "HTTP 500", "HTTP 503", "no answer within 5 s":
        assert reason in text
    assert "ALARM" not in text
    found, expected = (checkpoint.restore(folder) for folder in ("gs://bucket/busy", local))
    assert found.data_states == expected.data_states
    assert metrics_of(expand_path("gs://bucket/busy")) == metrics_of(local)


@pytest.mark.slow
@pytest.mark.parametrize("reads_too", [False, True])
def test_a_bucket_that_refuses_is_an_alarm_and_the_run_goes_on(runs, local, bucket, reads_too):
    """The bucket refuses to write, or everything, from the save of step 8 until it is given the metrics of step 10."""
    workdir, refusing = f"gs://bucket/refused-{reads_too}", threading.Event()

    def refuse(request):
        if b'"step": 8' in request.body and b'"step": 10' not in request.body:
            refusing.set()
        if b'"step": 10' in request.body:
            refusing.clear()
        return 403 if refusing.is_set() and (reads_too or request.writes) else None

    with bucket.accident(before=refuse):
        text = runs.train(workdir, *STEPS, "--checkpoint.every", 8)
    assert "ALARM: checkpoint 8 was not saved: Forbidden: " in text
    assert "ALARM: metrics up to step 8 are not written: Forbidden: " in text
    assert f"Failed saves: 1. The checkpoints are {'not known: Forbidden' if reads_too else '[]'}" in text
    assert 8 not in good(workdir)
    found, expected = (checkpoint.restore(folder) for folder in (workdir, local))
    assert found.data_states == expected.data_states
    lines = metrics_of(expand_path(workdir))
    assert {"step": 8, "checkpoint/failed_saves": 1} in lines
    assert [line for line in lines if "checkpoint/failed_saves" not in line] == metrics_of(local)


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("gs://no-such-bucket/run", "there is no bucket no-such-bucket; make it (gcloud storage buckets create"),
        ("gs://NoBucket/run", "gs://NoBucket/run names the bucket 'NoBucket'"),
        ("s3://bucket/run", "checkpoints are in folders and on gs://, orbax refuses s3://"),
        ("gs://bucket/a#1/run", "a checkpoint's name in a bucket must not have '#', where orbax ends it"),
        ("gs://bucket/a;b", "a checkpoint's name in a bucket must not have ';'"),
        ("gs://bucket/run*", "gs://bucket/run* has a wildcard"),
        ("gs:/bucket/run", "write gs://bucket/run"),
        ("az://bucket/run", "must be a path of this machine, gs://BUCKET/... or s3://BUCKET/..."),
    ],
)
def test_a_work_directory_that_cannot_be_is_one_error_before_compilation(runs, workdir, message):
    text = runs.train(workdir, expect=2)
    assert message in text
    assert "compiling" not in text
    assert "Traceback" not in text


def kill_at(bucket: Bucket, runs: Runs, number: int, served: bool):
    """Return an accident that kills the run at a request, before it is served or after."""
    count, lock = [0], threading.Lock()

    def strike(_):
        with lock:
            count[0] += 1
            if count[0] == number:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(runs.child(), signal.SIGKILL)

    return bucket.accident(after=strike) if served else bucket.accident(before=strike)


def killed_between_requests(
    runs: Runs, bucket: Bucket, local: Path, name: str, moments: list[tuple[int, bool]]
) -> None:
    """Kill a run at each of the requests, one start after another, and let the last start finish."""
    workdir = f"gs://bucket/{name}"
    arguments = {"arguments": runs.arguments(workdir, *STEPS)}
    before: list[int] = []
    for number, served in moments:
        with kill_at(bucket, runs, number, served):
            runs.send("training", arguments)
            (code,), (text,) = runs.wait()
        assert code in (0, -signal.SIGKILL), text
        assert not before or f"continuing from step {before[-1]}" in text or code != 0, text
        now = good(workdir)
        assert not before or now[-1] >= before[-1]  # nothing that was complete is lost
        before = now
    text = runs.train(workdir, *STEPS)
    assert not before or f"continuing from step {before[-1]}" in text
    assert_same_end(expand_path(workdir), local, 24)


@pytest.mark.slow
def test_killed_between_requests_loses_no_complete_step(runs, bucket, local):
    killed_between_requests(runs, bucket, local, "requests", [(391, False)])


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(12))
def test_killed_between_any_two_requests(runs, bucket, local, seed):
    moments = random.Random(seed)
    numbers = [(moments.randint(1, 900), moments.random() < 0.5) for _ in range(3)]
    killed_between_requests(runs, bucket, local, f"any-{seed}", numbers)
