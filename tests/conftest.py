"""Rules of the suite: property tests repeat exactly, and a skip needs a hardware reason."""

import importlib.metadata
import os
import pathlib
import signal
import tempfile
from collections.abc import Generator, Iterator

import hypothesis
import jax
import jaxtyping
import pytest

from tests import programs

# The TPU's compiler (libtpu) runs on any machine. Without these it asks the network whether this is a TPU, and refuses
# a second process on the machine, such as another worker of pytest.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# What is on a developer's disk is no part of the tests. Programs of one run are kept in a temporary folder (see
# `pytest_configure`); processes that tests start compile by themselves, but for those that get `programs.environment`.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# A callback from a jitted CPU program that converts its arguments, as the interpreter of TPU kernels has them, waits
# for ever where the CPU client has one thread: a machine, or a process bound to, one core.
if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1:
    os.environ.setdefault("NPROC", "2")

# Compiling is most of the suite's time, and these flags halve it. The first leaves XLA's own passes as they are and
# skips LLVM's; the second, which jax 0.10 alone has, makes the machine code of fusions in one step instead of two
# (remove it when jax >= 0.11 is required). A flag given by hand wins. Benchmarks check the values of the optimised
# machine code.
_FLAGS = {"--xla_backend_optimization_level": "0"}
if importlib.metadata.version("jax").startswith("0.10."):
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_GIVEN = os.environ.get("XLA_FLAGS", "")
_MISSING = [f"{name}={value}" for name, value in _FLAGS.items() if name not in _GIVEN]
os.environ["XLA_FLAGS"] = " ".join([_GIVEN, *_MISSING]).strip()

# Modules whose annotations have shapes: every call checks shapes, dtypes and types. An int may stand for a float.
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
_ROOT = pathlib.Path(__file__).parents[1]
_SOURCES = {path: path.read_text(encoding="utf-8") for path in (_ROOT / "transmamba_jax").rglob("*.py")}
CHECKED = [
    ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    for path, text in _SOURCES.items()
    if "import jaxtyping" in text or "from jaxtyping" in text or "from transmamba_jax.shapes" in text
]
jaxtyping.install_import_hook(CHECKED, _CHECKER)
# Axes are aligned by hand: an axis that is missing would broadcast without a word.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Keep what this process compiles until it ends: a run that is resumed or repeated compiles once."""
    # A shell starts jobs in the background with Ctrl-C ignored, and so would be every process that a test interrupts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.TemporaryDirectory(prefix="transmamba_jax_programs_")
    config.add_cleanup(folder.cleanup)
    programs.keep_in(folder.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Draw the charts of reports in tests with the marker `draws` alone, and in processes that tests start."""
    if item.get_closest_marker("draws") is not None:
        return (yield)
    from tests import undrawn  # imports the package, which the hook above has to see

    with undrawn.patch():
        return (yield)


@pytest.fixture
def programs_not_kept() -> Iterator[None]:
    """Keep no program that is compiled for a topology: JAX cannot read one back, and warns."""
    with programs.not_kept():
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turn the checks of annotations off: calls that they forbid get the package's own refusals."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def bucket() -> Iterator[object]:
    """Run a server of the Google Cloud Storage API and point this process to it; see tests/buckets.py."""
    from tests.buckets import Bucket

    server = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a skipped test unless it carries the `hardware` marker."""
    report = yield
    if report.skipped and item.get_closest_marker("hardware") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped without the hardware marker: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a module that skips itself."""
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"a module may not skip itself: {report.longrepr}"
    return report
