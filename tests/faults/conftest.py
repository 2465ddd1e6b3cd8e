"""A server of processes that have accidents, and a small run for them."""

import pytest

from tests.forks import Server, write_text
from tests.training.support import little_config
from transmamba_jax import config_io

MODULE = "tests.faults.drive"


class Faults(Server):
    """Runs train.py, and the other tasks of drive.py."""

    def __init__(self, folder):
        super().__init__(MODULE, folder)
        self.config = folder / "little.yaml"
        config = little_config(
            model={"vocab_size": 256},
            data={"source": write_text(folder / "text")},
            train={"steps": 12, "sample_tokens": 0, "accumulation": 2},
            checkpoint={"every": 4},
            eval={"every": 6, "windows": 8},
            workdir=str(folder / "run"),
        )
        self.config.write_text(config_io.to_yaml(config), encoding="utf-8")

    def arguments(self, workdir, *options):
        """Return the command line of a run in `workdir`."""
        return ["--config", str(self.config), "--workdir", str(workdir), *map(str, options)]

    def train(self, workdir, *options, expect=0, accident="none", at=0, devices=1):
        """Run train.py in `workdir`, with an accident, and return what it printed."""
        task = {"arguments": self.arguments(workdir, *options), "accident": accident, "at": at}
        self.send("training", task, devices=devices)
        return self.receive(expect)[0]


@pytest.fixture(name="server", scope="session")
def _server(tmp_path_factory):
    server = Faults(tmp_path_factory.mktemp("faults"))
    yield server
    server.stop()


@pytest.fixture(name="straight", scope="session")
def _straight(server):
    """Return the work directory of a run without an accident."""
    server.train(server.folder / "straight")
    return server.folder / "straight"
