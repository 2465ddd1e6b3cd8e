"""The Python standard library's own source files as a TFDS data set in array_record: real text without a download."""

import contextlib
import io
import os
import shutil
import sys
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from transmamba_jax.data import prepared
from transmamba_jax.data.cache_folder import locked
from transmamba_jax.data.splits import SPLITS, split_of

_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Sources of the running Python's standard library, one example a file; the version is the Python version."""

    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info[:3]))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python standard library sources without tests, split by file.",
            features=tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()}),
        )

    def _split_generators(self, _: tfds.download.DownloadManager) -> dict[str, Iterator]:
        root = Path(sysconfig.get_path("stdlib"))
        files = source_files(root)
        return {split: self._generate_examples(root, files, split) for split in SPLITS}

    def _generate_examples(self, root: Path, files: list[Path], split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for path in files:
            relative = path.relative_to(root).as_posix()
            if split_of(relative) == split:
                with tokenize.open(path) as file:  # honours an encoding that the file declares
                    yield relative, {"path": relative, "text": file.read()}


def source_files(root: Path) -> list[Path]:
    """Return the library's `.py` files in order, without tests, installed packages and empty files.

    Raises:
        ValueError: there is none (a Python that was installed without its sources).
    """
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED]  # not entered: installed packages are many
        found = [Path(folder, name) for name in names if name.endswith(".py")]
        files += [path for path in found if path.is_file() and path.stat().st_size > 0]
    files.sort()
    if not files:
        raise ValueError(
            f"data.source='stdlib': this Python's standard library at {root} has no source files; use 'text:<glob>'"
        )
    return files


def prepare(cache_dir: Path) -> Path:
    """Return the directory of the prepared data set, preparing it if it is missing or incomplete.

    Processes that come at the same time wait for the first one; what a killed one left behind is removed.
    """
    name = PythonStdlib.name
    directory = cache_dir / name / str(PythonStdlib.VERSION)
    if prepared.is_complete(directory):
        return directory
    with locked(cache_dir / f"{name}.lock"):
        if not prepared.is_complete(directory):
            for leftover in [directory, *directory.parent.glob(f"incomplete.*_{directory.name}")]:
                shutil.rmtree(leftover, ignore_errors=True)
            _build(cache_dir)
    return directory


def _build(cache_dir: Path) -> None:
    # TFDS announces a download and draws bars; nothing is downloaded and it takes seconds.
    quiet = contextlib.ExitStack()
    with quiet, tempfile.TemporaryDirectory() as downloads:
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        builder = PythonStdlib(data_dir=cache_dir, file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False), download_dir=downloads
        )
