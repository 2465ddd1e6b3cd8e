"""A server that forks processes which have accidents, and a small run for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.support import little_config
from transmamba_jax import config_file

ROOT = Path(__file__).parents[2]


class Server:
    """Runs tasks of drive.py, each in a process of its own, one after another."""

    def __init__(self, folder):
        self.folder = folder
        self.config = folder / "little.yaml"
        (folder / "text").mkdir()
        for index in range(40):
            (folder / "text" / f"{index:02}.txt").write_text(
                f"document {index} of a small text\n" * 4, encoding="utf-8"
            )
        config = little_config(
            model={"vocab_size": 256},
            data={"source": f"text:{folder / 'text' / '*.txt'}"},
            train={"steps": 12, "sample_tokens": 0, "accumulation": 2},
            checkpoint={"every": 4},
            eval={"every": 6, "windows": 8},
            workdir=str(folder / "run"),
        )
        self.config.write_text(config_file.to_yaml(config), encoding="utf-8")
        self.process = self.start()

    def start(self):
        """Start another server: its tasks run beside those of this one."""
        command = [sys.executable, "-W", "error", "-m", "tests.faults.drive"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def send(self, name, process=None, devices=1, **arguments):
        """Start a task."""
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        output = self.folder / f"output-{(process or self.process).pid}.log"
        task = {"run": name, "arguments": arguments, "environment": {"XLA_FLAGS": flags}, "output": str(output)}
        stream = (process or self.process).stdin
        stream.write(json.dumps(task) + "\n")
        stream.flush()
        return output

    def receive(self, output, process=None, expect=0):
        """Wait for the task and return what it printed."""
        status = (process or self.process).stdout.readline()
        text = output.read_text(encoding="utf-8")
        assert status == f"{expect}\n", text
        return text

    def train(self, workdir, *options, expect=0, accident="none", at=0, devices=1):
        """Run train.py in `workdir`, with an accident."""
        arguments = ["--config", str(self.config), "--workdir", str(workdir), *map(str, options)]
        output = self.send("training", devices=devices, arguments=arguments, accident=accident, at=at)
        return self.receive(output, expect=expect)

    def stop(self, process):
        """End a server when its task has ended."""
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


@pytest.fixture(name="server", scope="session")
def _server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("faults"))
    yield server
    server.stop(server.process)


@pytest.fixture(name="straight", scope="session")
def _straight(server):
    """Return the work directory of a run without an accident."""
    server.train(server.folder / "straight")
    return server.folder / "straight"
