"""The run lock of a bucket: an object that is made, renewed and taken over on a condition."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.training import lock_owner, run_lock

LEASE = 1.5  # seconds; renewed every 0.25

HOLDER = """
import sys
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.training import run_lock
with run_lock.hold(expand_path(sys.argv[1]), 1.5):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(name="workdir")
def _workdir(bucket, request):
    assert bucket.url
    name = re.sub(r"[^a-z0-9]", "-", request.node.name)
    return expand_path(f"gs://bucket/{name}")


@pytest.fixture(name="elsewhere")
def _elsewhere(monkeypatch):
    """Return how to be another machine."""
    own = lock_owner.machine()

    def become(name: str = "") -> None:
        monkeypatch.setattr(lock_owner, "machine", lambda: name or own)

    return become


def lock_of(workdir):
    return json.loads((workdir / "run.lock").read_text())


def test_a_lock_is_made_renewed_checked_and_freed(workdir, bucket):
    with run_lock.hold(workdir, LEASE) as lock:
        lock.check()
        owner = lock_of(workdir)
        assert (owner["process"], owner["machine"]) == (os.getpid(), lock_owner.machine())
        made = (workdir / "run.lock").version()
        assert run_lock.shown(workdir) == json.dumps(owner)
        deadline = time.monotonic() + 20
        while (workdir / "run.lock").version() == made:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lock.check()
    assert list(bucket.objects(f"{workdir.name}/")) == []


def test_of_two_runs_that_start_together_one_is_refused(workdir, bucket):
    """Both have read that there is no lock when the first of them writes it."""
    both, held, refused = threading.Barrier(2), [], []

    def together(request):
        if request.writes and request.object.endswith("run.lock"):
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(10)

    def start():
        try:
            with run_lock.hold(workdir, LEASE) as lock:
                held.append(lock)
                ended.wait(20)
        except ValueError as error:
            refused.append(str(error))
            ended.set()

    ended = threading.Event()
    threads = [threading.Thread(target=start) for _ in range(2)]
    with bucket.accident(before=together):
        for thread in threads:
            thread.start()
        ended.wait(20)
        both.abort()
        for thread in threads:
            thread.join()
    assert len(held) == 1
    assert refused == [f"{workdir} belongs to another run that starts or ends now; try again"]


def test_a_run_on_another_machine_is_refused_while_it_renews(workdir, elsewhere):
    elsewhere("another")
    with run_lock.hold(workdir, LEASE):
        elsewhere()
        message = r"belongs to another run: process \d+ on .*, renewed its lock just now and loses it after 2 s without"
        with pytest.raises(ValueError, match=message), run_lock.hold(workdir, LEASE):
            pass


def test_a_run_that_no_longer_renews_is_followed_and_finds_out(workdir, elsewhere, caplog):
    elsewhere("another")
    with run_lock.hold(workdir, LEASE) as dead:
        dead._ended.set()  # as if it were suspended
        dead._thread.join()
        elsewhere()
        begin = time.monotonic()
        with run_lock.hold(workdir, LEASE) as lock:
            assert 0.5 * LEASE < time.monotonic() - begin < LEASE + 10
            assert "more than 2 s: taking it over" in caplog.text
            lock.check()
            with pytest.raises(ValueError, match=r"was taken over by another run: .* stops without saving"):
                dead.check()
            owner = lock_of(workdir)
    assert owner["process"] == os.getpid()
    assert not (workdir / "run.lock").exists()


def test_a_wait_for_a_lease_ends_when_it_is_asked_to(workdir, elsewhere):
    elsewhere("another")
    with run_lock.hold(workdir, LEASE):
        elsewhere()
        with run_lock.hold(workdir, 100.0, stopped=lambda: True) as lock:
            assert lock is None


def test_a_killed_run_of_this_machine_is_followed_at_once_and_a_living_one_refused(workdir, caplog):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"process {other.pid} .*, is still running"),
            run_lock.hold(workdir, LEASE),
        ):
            pass
        other.kill()
        other.wait()
        with run_lock.hold(workdir, 100.0) as lock:
            lock.check()
    assert "no longer runs: taking the lock over" in caplog.text


@pytest.mark.parametrize("status", [503, 429])
def test_a_write_whose_answer_was_lost_is_known_by_its_bytes(workdir, bucket, status):
    """The service made the object, said it failed, and refuses the repetition for its condition."""
    lost = []

    def lose(request):
        if request.writes and request.object.endswith("run.lock") and len(lost) < 1:
            lost.append(request)
            return status
        return None

    with bucket.accident(after=lose), run_lock.hold(workdir, LEASE) as lock:
        lock.check()
        assert lost
        lost.clear()  # the next renewal
        deadline = time.monotonic() + 20
        while not lost:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(LEASE / 2)
        lock.check()
    assert not (workdir / "run.lock").exists()


def test_a_lock_that_was_deleted_is_made_again(workdir):
    with run_lock.hold(workdir, LEASE) as lock:
        (workdir / "run.lock").unlink()
        lock.check()
        deadline = time.monotonic() + 20
        while not (workdir / "run.lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_bucket_that_is_not_there_or_refuses_is_one_error_that_says_what_to_do(workdir, bucket):
    missing = expand_path("gs://no-such-bucket/run")
    with pytest.raises(ValueError, match="there is no bucket no-such-bucket; make it"), run_lock.hold(missing, LEASE):
        pass
    message = "cannot be read and written: Forbidden: .*auth application-default login.*roles/storage.objectUser"
    with (
        bucket.accident(before=lambda _: 403),
        pytest.raises(ValueError, match=message),
        run_lock.hold(workdir, LEASE),
    ):
        pass
