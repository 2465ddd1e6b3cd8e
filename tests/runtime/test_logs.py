"""Log lines on outputs of every kind."""

import contextlib
import importlib
import io
import logging
import os
import re
import subprocess
import sys

import pytest

from transmamba_jax.runtime import logs

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.mark.parametrize("name", ["transmamba_jax", "transmamba_jax.evaluate", "pallas_kernels.ssd"])
def test_a_line_is_shown_once_with_a_time_stamp(capsys, name):
    root, other = logging.getLogger(), logging.StreamHandler(sys.stdout)
    root.addHandler(other)
    try:
        with logs.shown():
            logging.getLogger(name).info("one %s", "line")
    finally:
        root.removeHandler(other)
    assert re.fullmatch(rf"{STAMP} one line\n", capsys.readouterr().out)


def test_a_notebook_shows_and_silences(capsys):
    stream = io.StringIO()
    handler, root = logging.StreamHandler(stream), logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        logs.LOGGER.info("first")
        logs.LOGGER.setLevel(logging.ERROR)
        logs.LOGGER.info("second")
    finally:
        root.removeHandler(handler)
        root.setLevel(logging.WARNING)
        logs.LOGGER.setLevel(logging.NOTSET)
    assert stream.getvalue() == "first\n"
    logs.LOGGER.info("third")
    assert capsys.readouterr() == ("", "")


# A name of a file that is not UTF-8, and a character that ASCII lacks.
PROGRAM = r"""
import sys
from transmamba_jax.runtime import logs
with logs.safe_output(), logs.shown():
    for number in range(3):
        logs.LOGGER.info("line %s Δ \udcff", number)
    print("end Δ \udcff", flush=True)
"""


def _run(output, encoding="ascii"):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["sh", "-c", f'exec "$0" -c "$1" {output}', sys.executable, PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, check=False)


@pytest.mark.parametrize(("encoding", "delta"), [("ascii", rb"\u0394"), ("utf-8", "Δ".encode())])
def test_characters_that_the_encoding_lacks_are_escaped(encoding, delta):
    result = _run("", encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    lines = result.stdout.splitlines()
    assert [line[20:] for line in lines[:3]] == [b"line %d %s \\udcff" % (number, delta) for number in range(3)]
    assert lines[3] == b"end %s \\udcff" % delta


@pytest.mark.parametrize("output", [">&-", "> /dev/full", "<&- >&-"])
def test_the_lines_of_a_closed_or_full_output_go_to_the_standard_error(output):
    result = _run(output)
    assert result.returncode == 0
    assert [line for line in (b"line 0", b"line 1", b"line 2", b"end") if line not in result.stderr] == []
    assert b"Traceback" not in result.stderr
    assert result.stdout == b""


@pytest.mark.parametrize("output", [">&- 2>&-", "> /dev/full 2> /dev/full", "2>&- | head -c 1 > /dev/null"])
def test_a_program_ends_well_without_any_output(output):
    assert _run(output).returncode == 0


def test_a_reader_that_leaves_ends_a_printing_command_without_a_traceback():
    program = (
        "from transmamba_jax.runtime import logs\nwith logs.safe_output():\n  while True: print('x' * 1000, flush=True)"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


COMMANDS = ["checkpoint", "convert", "evaluate", "export", "generate", "report"]


@pytest.mark.parametrize("module", [*(f"{name}.__main__" for name in COMMANDS), "data.train_tokenizer"])
def test_every_command_prints_to_any_output(module, monkeypatch, capsys):
    entered = []

    @contextlib.contextmanager
    def note():
        entered.append(module)
        yield

    monkeypatch.setattr(logs, "safe_output", note)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"transmamba_jax.{module}").main(["--help"])
    assert (ended.value.code, entered) == (0, [module])
    assert "usage: " in capsys.readouterr().out
