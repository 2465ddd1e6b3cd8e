"""Stop requests by signal."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from transmamba_jax.training.preemption import Preemption


@pytest.fixture(name="hang_up", autouse=True)
def _hang_up():
    """SIGHUP as a terminal's programs have it, whatever started the tests."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, earlier)


NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_asks_to_stop_and_the_handlers_come_back(number, caplog):
    before = {each: signal.getsignal(each) for each in NUMBERS}
    threads = threading.active_count()
    with Preemption() as preemption:
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested
    assert {each: signal.getsignal(each) for each in before} == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads
    assert f"{signal.Signals(number).name}: saving and stopping" in caplog.text


def test_a_hang_up_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not preemption.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_other_signals_do_not_stop_the_run():
    earlier = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0)
        assert not preemption.requested
    finally:
        signal.signal(signal.SIGUSR1, earlier)


# The main thread is inside one C call that holds no bytecode boundary, as during a compilation.
BUSY = """
import hashlib
from transmamba_jax.training.preemption import Preemption
with Preemption():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_a_second_interrupt_ends_a_busy_process_at_once():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert b"SIGINT: saving and stopping" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
