"""Rules of the suite: property tests repeat exactly, and a skip needs a hardware reason."""

from collections.abc import Generator

import hypothesis
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


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
