"""Processes that have accidents, without an import each: a server imports everything once and forks what a task names.

A task is a JSON line, the list of its processes, {"run": function, "arguments": {...}, "environment": {...}, "output":
file}; the answer is the list of their exit statuses as `subprocess` reports them. No device is touched before the fork.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import undrawn

ROOT = Path(__file__).parents[1]


def serve(functions: dict[str, Callable[..., int]]) -> None:
    """Run tasks from the standard input until it ends."""
    with undrawn.patch():
        for line in sys.stdin:
            children = [_fork(functions, process) for process in json.loads(line)]
            print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def _fork(functions: dict[str, Callable[..., int]], process: dict[str, Any]) -> int:
    child = os.fork()
    if child > 0:
        return child
    output = os.open(process["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, target)
    os.environ.update(process["environment"])
    status = 70
    try:
        status = functions[process["run"]](**process["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Server:
    """The other end: starts a module that serves, sends it tasks and reads what they printed."""

    def __init__(self, module: str, folder: Path, **environment: str) -> None:
        self.folder = folder
        command = [sys.executable, "-W", "error", "-m", module]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, run: str, *processes: dict[str, Any], devices: int = 1) -> None:
        """Start a process of `run` for each of the arguments, with as many simulated devices."""
        self.outputs = [self.folder / f"output-{self.process.pid}-{index}.log" for index in range(len(processes))]
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        common = {"run": run, "environment": {"XLA_FLAGS": flags}}
        outputs = zip(processes, self.outputs, strict=True)
        task = [{**common, "arguments": arguments, "output": str(output)} for arguments, output in outputs]
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()

    def wait(self) -> tuple[list[int], list[str]]:
        """Wait for the task; return the exit statuses and what was printed."""
        codes = json.loads(self.process.stdout.readline())
        return codes, [output.read_text(encoding="utf-8") for output in self.outputs]

    def receive(self, *expect: int) -> list[str]:
        """Wait for the task, which has to end with these statuses, and return what was printed."""
        codes, texts = self.wait()
        assert codes == list(expect), "\n".join(texts)
        return texts

    def stop(self) -> None:
        """End the server when its task has ended."""
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def write_text(folder: Path) -> str:
    """Write a small text of forty files and return it as a source of data."""
    folder.mkdir()
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(f"document {index} of a small text\n" * 4, encoding="utf-8")
    return f"text:{folder / '*.txt'}"
