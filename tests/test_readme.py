"""Run every block of the README, and the Python of the guides, in order, as they stand, on a small configuration."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import transmamba_jax as tm
from tests import programs
from transmamba_jax import config_io

ROOT = Path(__file__).parents[1]
SMALL = {
    "--model.d-model": "32",
    "--model.mlp-dim": "48",
    "--model.head-dim": "16",
    "--model.state-dim": "16",
    "--train.steps": "2",
    "--train.sample-tokens": "4",
    "--checkpoint.every": "2",
    "--eval.every": "2",
    "--eval.windows": "2",
}
ENVIRONMENT = ("make test", "source .venv/bin/activate")
"""Lines that prepare or repeat what runs this test."""


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def commands(page: str) -> list[str]:
    """Return the shell lines of a page without comments, joined where they continue."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line.partition("  #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and line not in ENVIRONMENT]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    """Return a folder with train.py, a small configs/tiny.yaml and what `make train` leaves."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").mkdir()
    overrides = [word for option in SMALL.items() for word in option]
    small = tm.load_config(ROOT / "configs/tiny.yaml", overrides)
    (folder / "configs" / "tiny.yaml").write_text(config_io.to_yaml(small), encoding="utf-8")
    (folder / "train.py").symlink_to(ROOT / "train.py")
    run(folder, "python train.py --config configs/tiny.yaml")
    return folder


def run(folder: Path, command: str) -> None:
    """Run a shell line in the folder with this interpreter and this checkout."""
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**programs.environment(), "PYTHONPATH": search, "JAX_PLATFORMS": "cpu"}
    line = re.sub(r"^python ", f"{sys.executable} ", command)
    result = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


@pytest.mark.slow
def test_the_commands_run(folder):
    lines = commands("README.md")
    assert lines[0] == "make train"
    for line in lines[1:]:
        run(folder, line)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/generate.md", "docs/extend.md"])
def test_the_python_runs(folder, page):
    script = folder / "blocks.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    run(folder, "python blocks.py")


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    prose = re.sub(r"^[|#!].*$", "", prose, flags=re.M)
    sentences = [words.split() for words in re.split(r"(?<=[.:?!])\s+", prose) if words.split()]
    assert sum(map(len, sentences)) / len(sentences) <= 20
