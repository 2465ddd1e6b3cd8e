"""The run lock between real processes, of this machine and, by another name of it, of others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transmamba_jax.training import run_lock

LEASE = 3.0  # seconds; renewed every 0.5

# Holds the lock until a line comes in, and says how that ended. A file system that carries no flock from one machine to
# another is one whose flock always succeeds.
HOLDER = """
import fcntl, sys
from pathlib import Path
from transmamba_jax.training import lock_owner, run_lock
folder, machine, carries = sys.argv[1:]
if machine:
    lock_owner.machine = lambda: machine
if carries == "no":
    fcntl.flock = lambda *_: None
try:
    with run_lock.hold(Path(folder), 3.0) as lock:
        print("held", flush=True)
        sys.stdin.readline()
        lock.check()
        print("kept", flush=True)
except ValueError as error:
    print(error, flush=True)
"""


class Holder:
    """A process that holds the lock."""

    def __init__(self, folder: Path, machine: str = "", carries: str = "yes") -> None:
        command = [sys.executable, "-c", HOLDER, str(folder), machine, carries]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "held\n"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self) -> str:
        return self.process.communicate("\n", timeout=60)[0].strip()


@pytest.fixture(name="start")
def _start(tmp_path):
    """Return how to start a holder of the lock of `tmp_path`."""
    holders = []

    def start(*arguments):
        holders.append(Holder(tmp_path, *arguments))
        return holders[-1]

    yield start
    for holder in holders:
        holder.process.kill()
        holder.process.communicate()


@pytest.fixture(name="hold")
def _hold(tmp_path):
    """Return how to take the lock here; it gives the seconds that this took."""

    def hold() -> float:
        begin = time.monotonic()
        with run_lock.hold(tmp_path, LEASE) as lock:
            seconds = time.monotonic() - begin
            lock.check()
        assert (tmp_path / run_lock.FILE).read_text(encoding="utf-8") == ""
        assert [path.name for path in tmp_path.iterdir()] == [run_lock.FILE]
        return seconds

    return hold


def test_a_run_on_this_machine_is_refused_while_it_lives_and_followed_at_once_when_it_is_killed(start, hold, caplog):
    holder = start()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"process {holder.process.pid} on .* is still running; stop it, or use"):
            hold()
    holder.signal(signal.SIGSTOP)  # its lease ends, but the kernel knows that it lives
    time.sleep(LEASE + 0.5)
    with pytest.raises(ValueError, match="is still running"):
        hold()
    holder.signal(signal.SIGKILL)
    assert hold() < 1.0
    assert f"process {holder.process.pid} on " in caplog.text
    assert "no longer runs: taking the lock over" in caplog.text


def test_a_run_that_ends_leaves_a_free_lock(start, hold, caplog):
    assert start().end() == "kept"
    assert hold() < 1.0
    assert caplog.text == ""


@pytest.mark.parametrize("carries", ["yes", "no"])
def test_a_run_on_another_machine_is_refused_while_it_renews_its_lease(start, hold, carries):
    holder = start("elsewhere", carries)
    with pytest.raises(
        ValueError, match=r"renewed its lock \d s ago and loses it after 3 s without: it is running; stop"
    ):
        hold()
    assert holder.end() == "kept"


@pytest.mark.parametrize("carries", ["yes", "no"])
def test_a_job_that_is_requeued_on_another_machine_waits_for_the_lease_and_starts(start, hold, caplog, carries):
    holder = start("elsewhere", carries)
    holder.signal(signal.SIGKILL)
    assert LEASE / 2 < hold() < 2 * LEASE
    assert "waiting until it is renewed again, or until 3 s have passed without" in caplog.text
    assert "last renewed its lock 3 s ago, more than 3 s: taking it over" in caplog.text


def test_a_request_to_stop_ends_the_wait_and_leaves_the_lock_to_its_owner(start, tmp_path):
    start("elsewhere").signal(signal.SIGKILL)
    content = (tmp_path / run_lock.FILE).read_text(encoding="utf-8")
    requests = iter([False, True])
    begin = time.monotonic()
    with run_lock.hold(tmp_path, LEASE, stopped=lambda: next(requests)) as lock:
        assert lock is None
        assert time.monotonic() - begin < LEASE / 2
    assert (tmp_path / run_lock.FILE).read_text(encoding="utf-8") == content
    with run_lock.hold(tmp_path, LEASE) as lock:  # whoever comes next waits on
        assert time.monotonic() - begin > LEASE / 2
        lock.check()


def test_a_lock_whose_time_lies_in_the_future_is_waited_for_as_long(start, hold, tmp_path):
    start("elsewhere", "no").signal(signal.SIGKILL)
    os.utime(tmp_path / run_lock.FILE, (2**32, 2**32))
    assert LEASE / 2 < hold() < 2 * LEASE


def test_a_run_that_was_suspended_for_longer_than_its_lease_finds_that_it_lost_the_lock(start, tmp_path):
    holder = start("elsewhere", "no")
    holder.signal(signal.SIGSTOP)
    with run_lock.hold(tmp_path, LEASE) as lock:
        holder.signal(signal.SIGCONT)
        said = holder.end()
        assert f"was taken over by another run: process {os.getpid()} on " in said
        assert "stops without saving" in said
        lock.check()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    message = f"workdir {file} cannot be written: .*; use another --workdir"
    with pytest.raises(ValueError, match=message), run_lock.hold(file):
        pass
